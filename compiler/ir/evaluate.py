"""Run a graph in numpy: the meaning of every op, one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from llmc.compiler.ir.dims import Dim, symbol, symbols_of
from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import Array, Tensor
from llmc.errors import IRError

Data = Array | Encoded | Pages
LoadParam = Callable[[str], Array]


def bind_symbols(graph: Graph, inputs: Mapping[str, Data]) -> dict[str, int]:
    """The value of every symbol, read off the inputs' shapes."""
    binding: dict[str, int] = {}
    for value in graph.inputs:
        if not isinstance(value.type, Tensor):
            continue
        data = inputs[value.name]
        shape = data.shape if not isinstance(data, Pages) else ()
        if len(shape) != value.type.rank:
            raise IRError(f"input {value.name} has shape {list(shape)}, expected {value.type}")
        for dim, size in zip(value.type.shape, shape, strict=True):
            found = _symbol_plus(dim)
            if found is None:
                continue
            name, more = found
            if binding.setdefault(name, size - more) != size - more:
                raise IRError(f"input {value.name}: {name} is {size - more} here and {binding[name]} elsewhere")
    return binding


def _symbol_plus(dim: int | Dim) -> tuple[str, int] | None:
    """The symbol's name and the constant of a size such as T or B + 1; None for any other size."""
    for found in symbols_of(dim):
        more = dim - symbol(found.name, found.low, found.high)
        if isinstance(more, int):
            return found.name, more
    return None


def evaluate(graph: Graph, inputs: Mapping[str, Data], load_param: LoadParam) -> dict[str, Data]:
    """The graph's outputs by name. Params are loaded when first needed; values are dropped after their last use."""
    return evaluate_values(
        [value for _, value in graph.outputs],
        {value: inputs[value.name] for value in graph.inputs},
        load_param,
        bind_symbols(graph, inputs),
        [name for name, _ in graph.outputs],
    )


def evaluate_values(
    roots: list[Value],
    known: Mapping[Value, Data],
    load_param: LoadParam,
    binding: Mapping[str, int],
    names: list[str] | None = None,
) -> dict[str, Data]:
    """Evaluate some values, given others; keyed by `names` (default: "0", "1", ...)."""
    from llmc.compiler.ir.types import numpy_dtype

    order = topological(roots, known)
    remaining: dict[Value, int] = {}
    for value in order:
        if isinstance(value, Op):
            for operand in value.operands:
                remaining[operand] = remaining.get(operand, 0) + 1
    kept = {*known, *roots}
    data: dict[Value, Data] = dict(known)
    for value in order:
        if isinstance(value, Input):
            raise IRError(f"no value given for input {value.name}")
        if isinstance(value, Param):
            data[value] = load_param(value.name).astype(numpy_dtype(value.tensor.dtype), copy=False)
            continue
        assert isinstance(value, Op)
        arguments: list[Data | None] = []
        for _, named in value.named_operands():
            if isinstance(named, tuple):
                arguments.extend(data[item] for item in named)
            else:
                arguments.append(None if named is None else data[named])
        try:
            # As in a kernel, a float that overflows is infinite and says nothing.
            with np.errstate(all="ignore"):
                data[value] = value.bind(binding).evaluate(*arguments)
        except IRError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            raise IRError(f"{value.name} : {value.type} does not evaluate: {error}") from error
        for operand in value.operands:
            remaining[operand] -= 1
            if remaining[operand] == 0 and operand not in kept:
                del data[operand]
    keys = names if names is not None else [str(i) for i in range(len(roots))]
    return {name: data[root] for name, root in zip(keys, roots, strict=True)}
