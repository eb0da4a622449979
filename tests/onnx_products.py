"""Whether onnxruntime multiplies bytes exactly on this computer."""

from __future__ import annotations

import pytest

from llmc.runtime import cpu

# Without an instruction that sums four products in 32 bits it sums two in 16, and stops where they end.
exact_products = pytest.mark.skipif(
    not {"avx512vnni", "avxvnni"} & cpu.features(), reason="onnxruntime's products of bytes saturate on this computer"
)
