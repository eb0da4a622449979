"""The inputs of a graph that is not text: its free sizes as symbols with bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.onnx.conventions import is_batch_size
from llmc.frontends.onnx.model import Signature, signature_dtype

_DEFAULT_BATCH, _DEFAULT_SIZE = 8, 1024
_MOST_SIZE = 1 << 31
_NAME = re.compile(r"[A-Za-z_]\w{0,63}\Z")


def plain_inputs(inputs: Sequence[Signature], max_dims: Mapping[str, int]) -> tuple[Input, ...]:
    """An input of the graph for each of the model's, in its own dtype.

    A size that the file names is the symbol of that name (of a name made of it, if it is no plain word); one that it
    does not name is INPUT_AXIS. max_dims: the greatest value by symbol; default: 8 for a batch, 1024 for others.
    """
    sizes: dict[str, Dim] = {}
    by_text: dict[str, str] = {}
    for signature in inputs:
        if signature.dims is None:
            raise FrontendError(
                f"input {signature.name!r:.100} has no shape, not even a rank: onnx.shape_inference may find it"
            )
        for axis, dim in enumerate(signature.dims):
            if not isinstance(dim, int):
                text = dim if dim is not None else f"{signature.name}_{axis}"
                if text not in by_text:
                    by_text[text] = _plain_name(text, sizes)
                    sizes[by_text[text]] = _size(by_text[text], max_dims)
    unknown = sorted(set(max_dims) - set(sizes))
    if unknown:
        known = f"its free sizes are {', '.join(sizes)}" if sizes else "it has no free sizes"
        raise FrontendError(f"the model has no size {unknown[0]!r:.60}: {known}")
    return tuple(
        Input(
            signature.name,
            Tensor(
                tuple(
                    dim
                    if isinstance(dim, int)
                    else sizes[by_text[dim if dim is not None else f"{signature.name}_{axis}"]]
                    for axis, dim in enumerate(signature.dims or ())
                ),
                signature_dtype(signature, "input"),
            ),
        )
        for signature in inputs
    )


def _plain_name(text: str, taken: Mapping[str, Dim]) -> str:
    """A word for a size: its own text, or what is left of it."""
    plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")[:48]
    if not _NAME.match(plain):
        plain = f"size_{plain}".rstrip("_")
    unique, number = plain, 2
    while unique in taken:
        unique, number = f"{plain}_{number}", number + 1
    return unique


def _size(name: str, max_dims: Mapping[str, int]) -> Dim:
    most = max_dims.get(name, _DEFAULT_BATCH if is_batch_size(name) else _DEFAULT_SIZE)
    if not 1 <= most <= _MOST_SIZE:
        raise FrontendError(f"the greatest value of {name} is {most}: it must be within 1..{_MOST_SIZE}")
    return symbol(name, 1, most)
