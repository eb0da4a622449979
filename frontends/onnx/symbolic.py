"""What is known of small tensors when compiling: numbers are folded, sizes are followed through shape arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Constant, constant
from llmc.compiler.ir.op import Op, Value
from llmc.errors import LlmcError
from llmc.frontends.onnx.translation import SMALL, Item, Node, Objects

Folder = Callable[..., Objects]
FOLDERS: dict[str, Folder] = {}


def folds(*ops: str) -> Callable[[Folder], Folder]:
    """Register what an op of the standard domain does to known elements: (node, one object array or None an input)."""

    def register(function: Folder) -> Folder:
        FOLDERS.update(dict.fromkeys(ops, function))
        return function

    return register


def fold(node: Node, items: Sequence[Item | None]) -> Item | None:
    """The result of shape arithmetic on known integers, sizes among them; None where the op or an input is no such."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op == "Shape" and items and items[0] is not None:
        shape = items[0].shape
        rank = len(shape)
        start, end = (
            int(np.clip(v + rank if v < 0 else v, 0, rank)) for v in (node.get("start", 0), node.get("end", rank))
        )
        return Item(known=objects(shape[start:end]))
    folder = FOLDERS.get(node.op)
    given = [item for item in items if item is not None]
    if (
        folder is None
        or not given
        or any(item.known is None or item.dtype not in ("i64", "i32", "bool") for item in given)
    ):
        return None
    if not any(isinstance(x, Dim) for item in given for x in item.known.flat):  # type: ignore[union-attr]
        return None  # plain numbers: the op's own handler, and then `numbers_of`
    try:
        known = folder(node, *(None if item is None else item.known for item in items))
    except (LlmcError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return None
    return Item(known=known, dtype=given[0].dtype) if known.size <= SMALL else None


def numbers_of(value: Value) -> Item:
    """An item for a value; where it comes of small constants alone it is evaluated, and its elements are known."""
    if (
        isinstance(value, Op)
        and not isinstance(value, Constant)
        and all(isinstance(x, Constant) for x in value.operands)
    ):
        shape = value.shape
        if all(isinstance(dim, int) for dim in shape) and int(np.prod(shape, dtype=object)) <= SMALL:
            try:
                with np.errstate(all="ignore"):
                    value = constant(value.evaluate(*(x.evaluate() for x in value.operands)), value.dtype)  # type: ignore[attr-defined]
            except (LlmcError, ValueError, IndexError):
                return Item(value)
    if isinstance(value, Constant) and value.value.array.size <= SMALL:
        return Item(value, objects(value.evaluate().tolist(), value.value.array.shape))
    return Item(value)


def objects(elements: Any, shape: tuple[int, ...] | None = None) -> Objects:
    """An object array of Python numbers and sizes. shape: needed where `elements` is nested or a scalar."""
    if shape is None:
        array = np.empty(len(elements), object)
        array[:] = list(elements)
        return array
    flat = np.empty(int(np.prod(shape)), object)
    flat[:] = np.asarray(elements, object).reshape(-1)
    return flat.reshape(shape)
