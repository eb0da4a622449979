"""Recurrent layers, one step after another: RNN, GRU and LSTM over a known number of steps.

Gates, in the order in which the weights hold them: GRU's update and reset and its candidate (Cho et al., 2014), LSTM's
input, output and forget and its candidate (Gers and Schmidhuber, 2000, for the peepholes).
"""

from __future__ import annotations

from collections.abc import Callable

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.op import Value
from llmc.frontends.onnx.forms import broadcast, cast, concat, cut, like, squeeze, transpose, unsqueeze
from llmc.frontends.onnx.translation import Item, Node, SizeUnknown, Translation, Unsupported, handles

_STEPS = 512
_ACTIVATIONS: dict[str, Callable[[Value], Value]] = {"tanh": e.Tanh, "sigmoid": e.Sigmoid, "relu": e.Relu}


class Layer:
    """One direction of a layer. x [steps, batch, inputs]; w [gates * hidden, inputs]; r [gates * hidden, hidden].

    bias [2 * gates * hidden], for w and for r; state: the hidden one [batch, hidden], and LSTM's cell.
    """

    def __init__(
        self, node: Node, direction: int, w: Value, r: Value, bias: Value | None, peepholes: Value | None
    ) -> None:
        self.node, self.w, self.r, self.peepholes = node, w, r, peepholes
        hidden = r.shape[1]
        if not isinstance(hidden, int):
            raise SizeUnknown("the size of its state must be known when compiling")
        self.hidden = hidden
        self.gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[node.op]
        size = self.gates * hidden
        empty = broadcast(like(0, w), (size,))
        self.w_bias, self.r_bias = (
            (empty, empty) if bias is None else (cut(bias, 0, 0, size), cut(bias, 0, size, 2 * size))
        )
        default = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}[node.op]
        names = (node.get("activations") or default * 2)[direction * len(default) :][: len(default)]
        unknown = [name for name in names if name.lower() not in _ACTIVATIONS]
        if unknown or node.get("activation_alpha") or node.get("activation_beta"):
            raise Unsupported(
                f"activations {names} are not supported, only {', '.join(_ACTIVATIONS)} without parameters"
            )
        self.functions = [_ACTIVATIONS[name.lower()] for name in names]

    def part(self, x: Value, gate: int, count: int = 1) -> Value:
        """Some gates of all of them, along the last axis."""
        return cut(x, x.rank - 1, gate * self.hidden, (gate + count) * self.hidden)

    def projected(self, x: Value) -> Value:
        """Every step's input times the weights, at once."""
        return e.Add(s.Matmul(x, transpose(self.w, (1, 0))), self.w_bias)

    def step(self, own: Value, h: Value, c: Value | None) -> tuple[Value, Value | None]:
        """The state after a step. own [batch, gates * hidden]: what its input brings."""
        recurrent = transpose(self.r, (1, 0))
        if self.node.op == "GRU":
            return self._gru(own, h, recurrent), None
        total = e.Add(own, e.Add(s.Matmul(h, recurrent), self.r_bias))
        if c is None:
            return self.functions[0](total), None
        gate, candidate, shown = self.functions
        i, o, f, new = (self.part(total, n) for n in range(4))
        if self.peepholes is not None:
            i = e.Add(i, e.Mul(self.part(self.peepholes, 0), c))
            f = e.Add(f, e.Mul(self.part(self.peepholes, 2), c))
        cell = e.Add(e.Mul(gate(f), c), e.Mul(gate(i), candidate(new)))
        if self.peepholes is not None:
            o = e.Add(o, e.Mul(self.part(self.peepholes, 1), cell))
        return e.Mul(gate(o), shown(cell)), cell

    def _gru(self, own: Value, h: Value, recurrent: Value) -> Value:
        gate, candidate = self.functions
        gates = e.Add(s.Matmul(h, cut(recurrent, 1, 0, 2 * self.hidden)), self.part(self.r_bias, 0, 2))
        both = gate(e.Add(self.part(own, 0, 2), gates))
        update, reset = self.part(both, 0), self.part(both, 1)
        weights, bias = self.part(recurrent, 2), self.part(self.r_bias, 2)
        if self.node.get("linear_before_reset", 0):
            inner: Value = e.Mul(reset, e.Add(s.Matmul(h, weights), bias))
        else:
            inner = e.Add(s.Matmul(e.Mul(reset, h), weights), bias)
        new = candidate(e.Add(self.part(own, 2), inner))
        return e.Add(e.Mul(e.Sub(like(1, update), update), new), e.Mul(update, h))


@handles("RNN", "GRU", "LSTM")
def _recurrent(
    t: Translation, node: Node, x: Item, w: Item, r: Item, bias: Item | None = None, lengths: Item | None = None,
    h: Item | None = None, c: Item | None = None, peepholes: Item | None = None,
) -> list[Value]:  # fmt: skip
    """X [steps, batch, inputs] -> Y [steps, directions, batch, hidden], the last states [directions, batch, hidden].

    With layout=1 the batch comes first in all of these.
    """
    if node.get("clip") is not None or node.get("input_forget", 0):
        raise Unsupported("clip and input_forget are not supported")
    first = bool(node.get("layout", 0))
    value = transpose(x.value, (1, 0, 2)) if first else x.value
    steps, batch = value.shape[:2]
    if not isinstance(steps, int) or not 0 < steps <= _STEPS:
        raise SizeUnknown(f"it runs over {steps} steps; a known number from 1 to {_STEPS} is supported")
    direction = node.get("direction", "forward")
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    rows, hiddens, cells = [], [], []
    for d, reverse in enumerate(backward):
        own = [None if item is None else squeeze(cut(item.value, 0, d, d + 1), 0) for item in (w, r, bias, peepholes)]
        assert own[0] is not None
        assert own[1] is not None
        layer = Layer(node, d, own[0], own[1], own[2], own[3])
        zeros = broadcast(like(0, value), (batch, layer.hidden))
        state = zeros if h is None else _direction(h, d, first)
        cell = None if node.op != "LSTM" else zeros if c is None else _direction(c, d, first)
        given = layer.projected(value)
        results: list[Value] = [zeros] * steps
        for i in reversed(range(steps)) if reverse else range(steps):
            new, new_cell = layer.step(squeeze(cut(given, 0, i, i + 1), 0), state, cell)
            results[i] = new
            if lengths is not None:
                # Past a sequence's end its state stays, and nothing comes out.
                there = unsqueeze(e.Greater(cast(lengths.value, "i64"), e.constant(i)), 1)
                results[i] = e.Where(there, new, zeros)
                new = e.Where(there, new, state)
                new_cell = None if new_cell is None or cell is None else e.Where(there, new_cell, cell)
            state, cell = new, new_cell
        rows.append(concat([unsqueeze(result, 0) for result in results], 0))
        hiddens.append(state)
        cells.append(cell)
    axis = 1 if first else 0
    y = concat([unsqueeze(row, 1) for row in rows], 1)
    found = [transpose(y, (2, 0, 1, 3)) if first else y, concat([unsqueeze(x, axis) for x in hiddens], axis)]
    last = [unsqueeze(cell, axis) for cell in cells if cell is not None]
    return [*found, concat(last, axis)] if last else found


def _direction(state: Item, d: int, first: bool) -> Value:
    axis = 1 if first else 0
    return squeeze(cut(state.value, axis, d, d + 1), axis)
