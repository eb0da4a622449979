"""Which operators of ONNX files llmc translates."""

from __future__ import annotations

from llmc.frontends.onnx.translation import HANDLERS, discover


def supported_ops() -> tuple[str, ...]:
    """Every operator with a translation, by name; those of other domains than the standard one with theirs."""
    discover()
    return tuple(sorted(f"{domain}.{op}" if domain else op for domain, op in HANDLERS))
