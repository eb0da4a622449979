"""Linear ops that read the same activations become one: q/k/v side by side, gate and up as one gated linear.

One wide product reads and rounds its activations once and keeps every thread busy; the parts are slices of its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.elementwise import Activation, Cast, Mul, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import PackGroups
from llmc.compiler.ir.llm import GatedLinear, Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Broadcast, Concat, Slice
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import Renewed, rebuild, uncast
from llmc.compiler.passes.schemes import Overrides, describe, find_head, param_names


@dataclass(frozen=True)
class MergeProjections(Pass, name="merge-projections"):
    """Merge linear ops over one x whose weights are known when compiling.

    gate_up: activation(linear) * linear becomes `llm.gated_linear`, also where one linear holds both halves.
    qkv: the other linears of one x become one linear and slices of its last axis, unless another activation follows.
    overrides: as for `quantize`; weights that it gives different schemes stay apart.
    """

    qkv: bool = True
    gate_up: bool = True
    overrides: str = ""

    def run(self, graph: Graph, report: Report) -> Graph:
        overrides = Overrides.parse(self.overrides)
        if self.gate_up:
            graph = _GateUp(graph, overrides, report).run()
        if self.qkv:
            graph = _Siblings(graph, overrides, report).run()
        return graph


def _obstacle(graph: Graph, linear: Linear) -> str:
    """Why this linear cannot share a weight with others of its x; empty when it can."""
    if linear.w not in graph.constants or (linear.bias is not None and linear.bias not in graph.constants):
        return "its weight or bias is computed at run time"
    if linear.w.tensor.encoding is not None and not isinstance(linear.w, PackGroups):
        return "its weight is encoded already: merge before quantizing"
    return "" if linear.residual is None else "a residual is added to it"


def _merged_weight(weights: list[Value]) -> Value:
    """Rows of all weights, one below the other; in their common dtype, or f32 where they differ, or in one encoding."""
    packed = [weight for weight in weights if isinstance(weight, PackGroups)]
    if packed:
        return PackGroups.stacked(packed)
    bases = [uncast(weight) for weight in weights]
    if len({base.dtype for base in bases}) > 1:
        bases = [base if base.dtype == "f32" else Cast(base, "f32") for base in bases]
    return Concat(tuple(bases), 0)


def _merged_bias(linears: list[Linear]) -> Value | None:
    """Biases end to end, zeros for a part without one; None where no part has one."""
    given = [linear.bias for linear in linears if linear.bias is not None]
    if not given:
        return None
    parts: list[Value] = []
    for linear in linears:
        if linear.bias is None:
            parts.append(Broadcast(constant(np.zeros(1), given[0].dtype), (linear.shape[-1],)))
        else:
            parts.append(linear.bias)
    if len({part.dtype for part in parts}) > 1:
        parts = [part if part.dtype == "f32" else Cast(part, "f32") for part in parts]
    return Concat(tuple(parts), 0)


@dataclass(frozen=True)
class _Pair:
    """activation(gate) * up, where both are whole linears, or halves of one."""

    gate: Linear
    up: Linear
    activation: str
    halves: tuple[Slice, Slice] | None = None


class _GateUp:
    """activation(linear) * linear of one x."""

    def __init__(self, graph: Graph, overrides: Overrides, report: Report) -> None:
        self.graph, self.overrides, self.report = graph, overrides, report
        self.outputs = {value for _, value in graph.outputs}

    def run(self) -> Graph:
        return rebuild(self.graph, self._build)

    def _build(self, op: Op, renewed: Renewed) -> Value | None:
        if not isinstance(op, Mul):
            return None
        pair = self._pair(op.a, op.b) or self._pair(op.b, op.a)
        if pair is None:
            return None
        obstacle = self._why_not(pair)
        if obstacle:
            self.report.refuse(describe(pair.gate, pair.gate.w), f"not gated: {obstacle}")
            return None
        x = renewed(pair.gate.x)
        if pair.halves is None:
            linears = [pair.gate, pair.up]
            self.report.hit("gate and up")
            weight, bias = _merged_weight([part.w for part in linears]), _merged_bias(linears)
        else:
            self.report.hit("gate and up in one weight")
            weight, bias = self._gate_first(pair)
        return GatedLinear(x, weight, bias, pair.activation, pair.gate.rounding)

    def _pair(self, activated: Value, other: Value) -> _Pair | None:
        kind = ""
        if isinstance(activated, Activation):
            kind, activated = activated.kind, activated.x
        elif isinstance(activated, Linear):
            kind = activated.activation
        if not kind:
            return None
        if isinstance(activated, Linear) and isinstance(other, Linear):
            return _Pair(activated, other, kind) if activated.x is other.x else None
        if isinstance(activated, Slice) and isinstance(other, Slice) and activated.x is other.x:
            whole = activated.x
            if isinstance(whole, Linear) and _are_halves(activated, other, whole):
                return _Pair(whole, whole, kind, (activated, other))
        return None

    def _why_not(self, pair: _Pair) -> str:
        for value in (pair.gate, pair.up) if pair.halves is None else pair.halves:
            if len(self.graph.users.get(value, ())) > 1 or value in self.outputs:
                return "a part is used elsewhere too"
        if pair.halves is not None:
            if len(self.graph.users[pair.gate]) > 2 or pair.gate in self.outputs:
                return "the product is used elsewhere too"
            if pair.gate.activation:
                return "the halves are activated together"
            return _obstacle(self.graph, pair.gate)
        for user in self.graph.users[pair.gate]:
            if isinstance(user, Activation) and (len(self.graph.users.get(user, ())) > 1 or user in self.outputs):
                return "the activated gate is used elsewhere too"
        if pair.up.activation:
            return "both parts are activated"
        if any(isinstance(user, Activation) for user in self.graph.users[pair.gate]) and pair.gate.activation:
            return "the gate is activated twice"
        if pair.gate.shape != pair.up.shape:
            return f"gate of {pair.gate.type} and up of {pair.up.type} differ"
        if pair.gate.rounding != pair.up.rounding:
            return "the parts round their activations differently"
        if pair.gate.w.tensor.encoding != pair.up.w.tensor.encoding:
            return "the parts are encoded differently already"
        if self.overrides.of(param_names(pair.gate.w)) != self.overrides.of(param_names(pair.up.w)):
            return "overrides give the parts different schemes"
        return _obstacle(self.graph, pair.gate) or _obstacle(self.graph, pair.up)

    @staticmethod
    def _gate_first(pair: _Pair) -> tuple[Value, Value | None]:
        """Weight and bias with the gate's rows first."""
        assert pair.halves is not None
        gate, up = pair.halves
        weight, bias = uncast(pair.gate.w), pair.gate.bias
        if gate.start == 0:
            return weight, bias
        halves = ((gate.start, gate.stop), (up.start, up.stop))
        weight = PackGroups.of_rows(weight, lambda x: Concat(tuple(Slice(x, 0, a, b) for a, b in halves), 0))
        return weight, None if bias is None else Concat(tuple(Slice(bias, 0, a, b) for a, b in halves), 0)


def _are_halves(a: Slice, b: Slice, whole: Linear) -> bool:
    """Whether two slices are the halves, in either order, of the last axis."""
    last = whole.rank - 1
    if a.axis % whole.rank != last or b.axis % whole.rank != last or a.step != 1 or b.step != 1:
        return False
    size = whole.shape[-1]
    spans = [(a.start, a.stop), (b.start, b.stop)]
    first, second = spans if a.start == 0 else spans[::-1]
    return first[0] == 0 and first[1] == second[0] and second[1] == size and first[1] * 2 == size


class _Siblings:
    """Linears of one x side by side."""

    def __init__(self, graph: Graph, overrides: Overrides, report: Report) -> None:
        self.graph, self.overrides, self.report = graph, overrides, report
        self.merged: dict[tuple[int, ...], Linear] = {}
        self.group_of: dict[Value, list[Linear]] = {}

    def run(self) -> Graph:
        for group in self._groups():
            self.report.hit(f"{len(group)} linears")
            self.group_of.update(dict.fromkeys(group, group))
        return rebuild(self.graph, self._build)

    def _groups(self) -> list[list[Linear]]:
        """What is merged: linears of one x, rounding, scheme and activation (own or following), in order."""
        head = find_head(self.graph)
        siblings: dict[tuple[Value, str], list[Linear]] = {}
        for op in self.graph.ops:
            if isinstance(op, Linear) and op is not head and op not in self.graph.constants:
                siblings.setdefault((op.x, self._activation(op)), []).append(op)
        found: list[list[Linear]] = []
        for linears in siblings.values():
            if len(linears) > 1:
                found += self._mergeable(linears)
        return found

    def _mergeable(self, linears: list[Linear]) -> list[list[Linear]]:
        alike: dict[tuple[str, str, str], list[Linear]] = {}
        for linear in linears:
            obstacle = _obstacle(self.graph, linear)
            if obstacle:
                self.report.refuse(describe(linear, linear.w), f"not merged with its siblings: {obstacle}")
            else:
                key = (linear.rounding, self.overrides.of(param_names(linear.w)), str(linear.w.tensor.encoding or ""))
                alike.setdefault(key, []).append(linear)
        if len(alike) > 1:
            names = " and ".join(describe(part[0], part[0].w) for part in alike.values())
            self.report.refuse(
                names, "not merged: their roundings, encodings or the schemes that overrides give them differ"
            )
        return [part for part in alike.values() if len(part) > 1]

    def _activation(self, linear: Linear) -> str:
        """Its activation; one that follows it counts, so that it can still be fused into it."""
        users = self.graph.users.get(linear, ())
        if not linear.activation and len(users) == 1 and isinstance(users[0], Activation):
            return f"then {users[0].kind}"
        return linear.activation

    def _build(self, op: Op, renewed: Renewed) -> Value | None:
        group = self.group_of.get(op)
        if group is None:
            return None
        key = tuple(id(linear) for linear in group)
        merged = self.merged.get(key)
        if merged is None:
            first = group[0]
            merged = Linear(
                renewed(first.x),
                _merged_weight([linear.w for linear in group]),
                _merged_bias(group),
                None,
                first.activation,
                first.rounding,
            )
            self.merged[key] = merged
        start: int | Dim = 0
        for linear in group:
            if linear is op:
                break
            start = start + linear.shape[-1]
        return Slice(merged, merged.rank - 1, start, start + linear.shape[-1])
