"""`--check`: run the graph before and after each pass, in f64, on the same tokens, and blame the pass that differs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import Array, precise
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.scenario import Scenario, evaluate_with, is_token_graph, random_inputs, random_params, vocabulary_of
from llmc.errors import CompileError, IRError

# Recognisers replace constants that sources print with seven digits, such as sqrt(2 / pi), by the exact ones; anything
# else differs by f64 rounding only. Relative to the largest value of an output.
TOLERANCE = 1e-7


@dataclass(frozen=True)
class Difference:
    """How far a pass moved one output.

    `largest` is the largest absolute difference, `relative` that over the largest absolute value before, `divergence`
    the mean Kullback-Leibler divergence, in nats, of the next-token distributions (for `logits` only, else 0).
    `where` is (sequence, position) of the largest difference, or (sequence,), empty for a graph without tokens.
    """

    pass_name: str
    output: str
    largest: float
    relative: float
    divergence: float = 0.0
    where: tuple[int, ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        text = (
            f"{self.pass_name}: {self.output} differs by {self.largest:.3g} ({self.relative:.3g} of its largest value)"
        )
        if self.output == "logits" and not self.exact:
            text += f", KL divergence {self.divergence:.3g} nats"
        if len(self.where) == 2:
            text += f", most at token {self.where[1]} of sequence {self.where[0]}"
        elif self.where:
            text += f", most in sequence {self.where[0]}"
        return text


@dataclass
class Checker:
    """An observer for `run_passes`.

    `load_param` None: random weights. A pass whose class says `exact = False` changes values by intent: its difference
    is noted, and its result is what later passes are compared with. `differences` has one entry for each pass and
    output, in order, zero where a pass changed nothing.
    """

    load_param: LoadParam | None = None
    seed: int = 0
    lengths: tuple[int, ...] = (5, 2, 9)
    tolerance: float = TOLERANCE
    differences: list[Difference] = field(default_factory=list)
    _graph: Graph | None = None
    _outputs: dict[str, Array] = field(default_factory=dict)
    _scenario: Scenario | None = None
    _quantized: dict[Value, Data] = field(default_factory=dict)

    def __call__(self, item: Pass, before: Graph, after: Graph, report: Report) -> None:
        """Compare; CompileError names the pass, the output and how far it is off."""
        if self.load_param is None:
            self.load_param = random_params(before, self.seed)
        if self._graph is not before:
            self._graph, self._outputs = before, self._run(before, f"the graph before {item.name}")
        exact = bool(getattr(item, "exact", True))
        if after is before:
            self.differences += [Difference(item.name, name, 0.0, 0.0, exact=exact) for name in self._outputs]
            return
        outputs = self._run(after, f"the graph after {item.name}")
        missing = sorted(self._outputs.keys() - outputs.keys())
        if missing:
            raise CompileError(f"pass {item} lost output {missing[0]!r}")
        for name, expected in self._outputs.items():
            difference = self._compare(item, name, expected, outputs[name], exact)
            self.differences.append(difference)
            if exact and not difference.relative <= self.tolerance:
                raise CompileError(
                    f"pass {item} changed what the graph computes: {difference}; allowed is {self.tolerance:g}. "
                    f"See --print-ir-diff {item.name} for what it rewrote"
                )
        self._graph, self._outputs = after, outputs

    def _run(self, graph: Graph, what: str) -> dict[str, Array]:
        assert self.load_param is not None
        try:
            with precise(), np.errstate(all="ignore"):
                known = self._quantized_weights(graph)
                if not is_token_graph(graph):
                    found = evaluate_with(graph, random_inputs(graph, self.seed), self.load_param, known)
                    return {
                        name: np.asarray(data) for name, data in found.items() if not isinstance(data, (Encoded, Pages))
                    }
                if self._scenario is None:
                    self._scenario = Scenario.random(vocabulary_of(graph), self.seed, self.lengths)
                return self._scenario.run(graph, self.load_param, known)
        except IRError as error:
            raise CompileError(f"{what} does not evaluate: {error}") from error

    def _quantized_weights(self, graph: Graph) -> dict[Value, Data]:
        """The graph's quantized weights, each rounded once for all passes: searching for scales is slow."""
        assert self.load_param is not None
        wanted = [op for op in graph.ops if isinstance(op, Quantize) and op in graph.constants]
        for op in wanted:
            if op not in self._quantized:
                self._quantized[op] = evaluate_values([op], {}, self.load_param, {})["0"]
        self._quantized = {op: self._quantized[op] for op in wanted}
        return self._quantized

    def _compare(self, item: Pass, name: str, expected: Array, found: Array, exact: bool) -> Difference:
        if expected.shape != found.shape:
            raise CompileError(f"pass {item} changed output {name!r} from {expected.shape} to {found.shape}")
        a, b = expected.astype(np.float64), found.astype(np.float64)
        gaps = gaps_between(a, b)
        worst = int(np.argmax(gaps)) if gaps.size else 0
        largest = float(gaps.reshape(-1)[worst]) if gaps.size else 0.0
        finite = np.abs(a[np.isfinite(a)])
        scale = float(finite.max()) if finite.size else 0.0
        relative = largest / scale if scale else largest
        where: tuple[int, ...] = ()
        if largest and self._scenario is not None and a.ndim == 2:
            where = self._scenario.place(worst // a.shape[1], a.shape[0])
        divergence = kl_divergence(a, b) if name == "logits" else 0.0
        return Difference(item.name, name, largest, relative, divergence, where, exact)


def gaps_between(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|a - b|, 0 where both are the same infinity or not a number, infinite where only one is."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gaps = np.abs(a - b)
    return np.where(same, 0.0, np.where(np.isnan(gaps), np.inf, gaps))


def kl_divergence(reference: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(other)), in nats; logits are [rows, classes]."""

    def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    with np.errstate(all="ignore"):
        p, q = log_softmax(reference), log_softmax(other)
        return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
