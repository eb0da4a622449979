"""How quantized tensors are rounded: encodings, and the functions that turn weights into them and back.

`encode` takes any float array whose last axis is the input dimension; rows are independent, so that a large weight may
be encoded block by block of rows with the same result.
"""

from __future__ import annotations

from llmc.compiler.encodings.grouped import GroupQuantized, decode, encode, storage_bytes, stored_bytes

__all__ = ["GroupQuantized", "decode", "encode", "storage_bytes", "stored_bytes"]
