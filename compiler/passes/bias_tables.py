"""What attention adds to a score by the distance of key and query only, as a table that is evaluated when compiling."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.encoded import PAGE
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Iota, Pad, Reshape, Slice
from llmc.compiler.passes.flatten_sequences import Mixes
from llmc.compiler.passes.probe import NOT_TOKENS, Probe
from llmc.compiler.passes.relative_bias import relative_table
from llmc.errors import IRError

SIZES = (3, 8, 13)
LONGEST = 1024  # tokens that a bias is looked at for, at most
MOST_ELEMENTS = 1 << 28  # of a bias for the longest sequence: a GiB in f32, while compiling


def bias_table(probe: Probe, bias: Value, heads: int | Dim) -> Value:
    """f32[heads, 2 * span - 1]: what a query adds to a key by key - query + span - 1; span covers whole pages.

    bias [..., heads or 1, S, S] must come of positions, sizes and weights, for any S by the distance alone; Mixes says
    what is in the way. The table comes of weights only, so that it is computed when compiling.
    """
    if not probe.sources.get(bias, frozenset(("ids",))) <= NOT_TOKENS:
        raise Mixes("token ids decide what it adds to scores")
    assert probe.size is not None and isinstance(heads, int)
    longest = min((symbol.high or 0 for symbol in probe.size.symbols()), default=0)
    if not longest:
        raise Mixes("it adds a bias by position, and the longest sequence is not known")
    if heads * longest * longest > MOST_ELEMENTS:
        raise Mixes(f"its bias for {longest} tokens is too large to be looked at: compile with a smaller --max-context")
    if product(bias.shape[:-2]) not in (1, heads):
        raise Mixes(f"it adds a bias {bias.type} to scores of {heads} heads")
    if bias.shape[-2:] != (probe.size, probe.size):  # the same for all queries, or for all keys
        bias = Broadcast(bias, (*bias.shape[:-2], probe.size, probe.size))
    # Weights are read only where the bias is not relative whatever they are: a model may store buckets.
    if all(relative_table(probe, bias, longest, stand_ins) is None for stand_ins in (True, False)):
        for size in sorted({*SIZES, min(longest, LONGEST)}):
            _require_relative(probe, bias, size)
        raise Mixes("it adds a bias by position, which could not be told to depend on distance alone")
    square = _for_size(bias, probe, longest)
    square = Reshape(square, (int(product(bias.shape[:-2])), longest, longest))  # type: ignore[arg-type]
    if square.shape[0] != heads:
        square = Broadcast(square, (heads, longest, longest))
    # The last query sees distances from 1 - longest to 0, the first one those from 0 on.
    parts = (Slice(square, 1, longest - 1, longest), Slice(Slice(square, 1, 0, 1), 2, 1, longest))
    table: Value = Reshape(Concat(parts, 2), (heads, 2 * longest - 1))
    table = table if table.dtype == "f32" else Cast(table, "f32")
    spare = -longest % PAGE  # kernels look at whole pages
    return Pad(table, (0, spare), (0, spare)) if spare else table


def _require_relative(probe: Probe, bias: Value, size: int) -> None:
    """Refuse a bias that differs along a diagonal, whatever the weights are."""
    try:
        found = probe.evaluate([bias], size, stand_ins=True)[0]
    except IRError as error:
        raise Mixes(f"its bias cannot be evaluated: {error}") from None
    found = found.reshape(-1, size, size)
    if not np.array_equal(found[:, 1:, 1:], found[:, :-1, :-1], equal_nan=True):
        _, query, key = np.argwhere(found[:, 1:, 1:] != found[:, :-1, :-1])[0]
        raise Mixes(
            f"its bias is not decided by the distance of key and query: that of query {query} and key {key} is "
            f"{found[0, query, key]:.6g}, one token on it is {found[0, query + 1, key + 1]:.6g}"
        )


def _for_size(value: Value, probe: Probe, size: int) -> Value:
    """The value for a sequence of `size` tokens from position 0 on."""
    assert probe.size is not None
    binding: Mapping[str, int | Dim] = {symbol.name: size for symbol in probe.size.symbols()}
    new: dict[Value, Value] = {}
    for old in topological([value]):
        if isinstance(old, Input):
            new[old] = Reshape(Iota(size, old.dtype), (1, size))
        elif isinstance(old, Op):
            bound = old.bind(binding).attributes()
            fields = {key: _mapped(item, new) for key, item in old.named_operands()}
            changed = {k: v for k, v in {**fields, **bound}.items() if v is not getattr(old, k)}
            new[old] = old.replace(**changed) if changed else old
    return new.get(value, value)


def _mapped(operand: Value | tuple[Value, ...] | None, new: Mapping[Value, Value]) -> object:
    """An operand field over new values; itself where nothing changed."""
    if isinstance(operand, tuple):
        mapped = tuple(new.get(value, value) for value in operand)
        return operand if all(a is b for a, b in zip(mapped, operand, strict=True)) else mapped
    return None if operand is None else new.get(operand, operand)
