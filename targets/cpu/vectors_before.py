"""The words of `vectors` as `embedding` still uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.targets.cpu import vectors

if TYPE_CHECKING:
    from tvm.tirx import Buffer, Expr


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    return vectors.cast(value, dtype)


def load_raw(buffer: Buffer, start: Expr | int, lanes: int) -> Expr:
    return vectors.load(buffer, start, lanes)


def load(buffer: Buffer, start: Expr | int, lanes: int) -> Expr:
    return vectors.as_f32(vectors.load(buffer, start, lanes))


def store(buffer: Buffer, start: Expr | int, value: Expr, lanes: int) -> None:
    vectors.store(buffer, start, value)
