"""Branches and loops. What decides them must be known when compiling, except that a branch may become a choice.

A branch that is known is put in place of the If, a loop as often as it runs. Ops have no effects, so where a condition
is known only when running, both branches are computed and one result is chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.shapes import axis_of
from llmc.frontends.onnx.forms import concat, cut, numbers, reshape, squeeze, unsqueeze
from llmc.frontends.onnx.translation import Body, Item, Node, SizeUnknown, Translation, Unsupported, handles, objects

_MOST_STEPS = 4096


@handles("If")
def _if(t: Translation, node: Node, condition: Item) -> Sequence[Item | Value]:
    around = t.around
    branches: list[Body] = [node.attributes[name] for name in ("then_branch", "else_branch")]
    if condition.numbers is not None:
        return t.run(branches[0 if condition.numbers.item() else 1], around)
    chosen = reshape(condition.value, ())
    then, other = (t.run(body, around) for body in branches)
    then, other = _looking_up_if(chosen, then, around), _looking_up_if(e.Not(chosen), other, around)
    return [_choice(chosen, a, b) for a, b in zip(then, other, strict=True)]


def _looking_up_if(condition: Value, items: Sequence[Item], around: Mapping[str, Item | None]) -> list[Item]:
    """What a body computes, with index 0 in its lookups where the condition fails: its result is not used then,
    and an index that is out of range is no error."""
    outer = [item.value for item in around.values() if item is not None and item.known is None]
    new: dict[Value, Value] = {}
    for value in topological([item.value for item in items if item.known is None], outer):
        if not isinstance(value, Op):
            continue
        rebuilt = value.map_operands(lambda operand: new.get(operand, operand))
        fields = ["x"] if isinstance(value, s.CheckedIndex) else [lookup.field for lookup in value.lookups()]
        for field in fields:
            index: Value = getattr(rebuilt, field)
            if not isinstance(index, e.Constant):
                rebuilt = rebuilt.replace(**{field: e.Where(condition, index, e.constant(0, index.dtype))})
        if rebuilt is not value:
            new[value] = rebuilt
    return [item if item.known is not None else Item(new.get(item.value, item.value)) for item in items]


def _choice(condition: Value, a: Item, b: Item) -> Value:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Unsupported(
            f"its condition is known only when running, and its branches differ: {a.value.type} and {b.value.type}"
        )
    return e.Where(condition, a.value, b.value)


def _number(i: int) -> Item:
    return Item(known=objects([i], ()))


@handles("Loop")
def _loop(t: Translation, node: Node, most: Item | None = None, going: Item | None = None, *state: Item) -> list[Item]:
    """Steps one after another. A condition that is known only when running keeps the state as it is once it fails."""
    body: Body = node.attributes["body"]
    around = t.around
    steps: Iterable[int] = itertools.count() if most is None else range(int(numbers(most, "how often it runs").item()))
    carried = list(state)
    rows: list[list[Item]] = [[] for _ in body.outputs[1 + len(carried) :]]
    condition: Item | None = going
    for i in steps:
        if condition is not None and condition.numbers is not None and not condition.numbers.item():
            break
        if i == _MOST_STEPS:
            raise Unsupported(f"it runs more than {_MOST_STEPS} times, or for how long is known only when running")
        flag = condition if condition is not None else Item(known=objects([True], ()), dtype="bool")
        given = dict(zip(body.inputs, (_number(i), flag, *carried), strict=True))
        after, *results = t.run(body, {**around, **given})
        new, scanned = results[: len(carried)], results[len(carried) :]
        if condition is not None and condition.numbers is None:
            if rows:
                raise Unsupported("how many rows it gives is known only when running")
            running = reshape(condition.value, ())
            new = _looking_up_if(running, new, {**around, **given})
            new = [Item(_choice(running, a, b)) for a, b in zip(new, carried, strict=True)]
            after = Item(e.And(running, reshape(after.value, ())))
        carried = list(new)
        condition = after
        for kept, row in zip(rows, scanned, strict=True):
            kept.append(row)
    if any(not kept for kept in rows):
        raise Unsupported("it never runs, and what it would give has no shape then")
    return [*carried, *(Item(concat([unsqueeze(row.value, 0) for row in kept], 0)) for kept in rows)]


@handles("Scan", since=9)
def _scan(t: Translation, node: Node, *items: Item) -> list[Item | Value]:
    """A body for each element of an axis of some inputs, with a state that goes from one to the next."""
    body: Body = node.attributes["body"]
    around = t.around
    scanned = node.attributes["num_scan_inputs"]
    carried, inputs = list(items[: len(items) - scanned]), items[len(items) - scanned :]
    results = len(body.outputs) - len(carried)
    in_axes = node.get("scan_input_axes") or [0] * scanned
    in_backward = node.get("scan_input_directions") or [0] * scanned
    out_axes = node.get("scan_output_axes") or [0] * results
    out_backward = node.get("scan_output_directions") or [0] * results
    axes = [axis_of(axis, item.rank) for axis, item in zip(in_axes, inputs, strict=True)]
    lengths = {item.shape[axis] for axis, item in zip(axes, inputs, strict=True)}
    if len(lengths) != 1:
        raise Unsupported(f"its inputs have different lengths: {', '.join(map(str, lengths))}")
    length = lengths.pop()
    if not isinstance(length, int) or not 0 < length <= _MOST_STEPS:
        raise SizeUnknown(f"it runs over {length} elements; a known number from 1 to {_MOST_STEPS} is supported")
    rows: list[list[Value]] = [[] for _ in range(results)]
    for i in range(length):
        elements = []
        for item, axis, backward in zip(inputs, axes, in_backward, strict=True):
            at = length - 1 - i if backward else i
            elements.append(Item(squeeze(cut(item.value, axis, at, at + 1), axis)))
        given = dict(zip(body.inputs, (*carried, *elements), strict=True))
        found = t.run(body, {**around, **given})
        carried = found[: len(carried)]
        for kept, row in zip(rows, found[len(carried) :], strict=True):
            kept.append(row.value)
    stacked = []
    for kept, axis, backward in zip(rows, out_axes, out_backward, strict=True):
        ordered = kept[::-1] if backward else kept
        stacked.append(concat([unsqueeze(row, axis) for row in ordered], axis_of(axis, ordered[0].rank + 1)))
    return [*carried, *stacked]
