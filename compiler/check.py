"""`--check`: run the graph before and after each pass, in f64, on the same tokens, and blame the pass that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.check_rounding import check_rounding
from llmc.compiler.check_sizes import Sizes, array_draws, choose_sizes
from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import Data, LoadParam, bind_symbols, evaluate_values
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.llm import Quantize
from llmc.compiler.ir.op import Value
from llmc.compiler.ir.types import NUMPY_DTYPES, Array, Tensor, precise
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.scenario import Scenario, evaluate_with, is_token_graph, random_params, vocabulary_of
from llmc.errors import CompileError, IRError

# Recognisers replace constants that sources print with seven digits, such as sqrt(2 / pi), by the exact ones; anything
# else differs by f64 rounding only. Relative to the largest value of an output.
TOLERANCE = 1e-7
CLEARLY = 1e-3  # a difference in f64 that no small mistake makes
ROUNDED = 1e-4  # of what f32 makes of one graph in two orders: 1e-6 a layer as a rule
RUNS = 16  # about how many passes change a graph
BUDGET = 3e12  # multiply-adds of all runs together: some minutes of one core


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


@dataclass(frozen=True)
class Lowering(Pass):
    """Stands for what a target does to a graph before it chooses kernels: ops in simpler ones."""

    name: ClassVar[str] = "lowering"


@dataclass(frozen=True)
class Calibration(Pass):
    """Stands for rounding that is no pass: it runs the graph (`calibrate.py`)."""

    name: ClassVar[str] = "calibration"


@dataclass
class Checker:
    """An observer for `run_passes`.

    load_param None: random weights. lengths: of the sequences that a graph of tokens is run on; None: chosen from the
    first graph seen (`check_sizes`), of at most `context` tokens and at a cost of about `budget` multiply-adds for all
    `runs` evaluations. A graph of arrays is run at several sizes. A pass whose class says `exact = False` changes
    values by intent: what it rounds is compared with the bound of its encoding (`check_rounding`), the rest exactly,
    and its result is what later passes are compared with. `differences` has one entry for each pass and output, in
    order, zero where a pass changed nothing.
    """

    load_param: LoadParam | None = None
    seed: int = 0
    lengths: tuple[int, ...] | None = None
    tolerance: float = TOLERANCE
    context: int = 1 << 28
    budget: float = BUDGET
    runs: int = RUNS
    differences: list[Difference] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)  # what was run, for people
    rounded: list[str] = field(default_factory=list)  # what was compared with its encoding, for people
    artifact: list[str] = field(default_factory=list)  # what was compared of the artifact, for people
    not_run: str = ""  # why the artifact was not run
    _graph: Graph | None = None
    _outputs: dict[str, Array] = field(default_factory=dict)
    _scenario: Scenario | None = None
    _draws: list[dict[str, Data]] = field(default_factory=list)
    _quantized: dict[Value, Data] = field(default_factory=dict)

    def __call__(self, item: Pass, before: Graph, after: Graph, report: Report) -> None:
        """Compare; CompileError names the pass, the output and how far it is off."""
        if self.load_param is None:
            self.load_param = random_params(before, self.seed)
        if self._graph is not before:
            self._prepare(before)
            self._graph, self._outputs = before, self._run(before, f"the graph before {item.name}")
        exact = item.exact
        if after is before:
            self.differences += [Difference(item.name, name, 0.0, 0.0, exact=exact) for name in self._outputs]
            return
        if exact:
            outputs = self._run(after, f"the graph after {item.name}")
            try:
                self._compare_all(item, outputs, self.tolerance)
            except CompileError:
                if not self.differs_by_rounding(before, after):
                    raise
        else:
            with np.errstate(all="ignore"):
                unrounded = check_rounding(item, before, after, self.load_param, self._quantized_weights(after))
            self.rounded += unrounded.compared
            found = self._run(unrounded.graph, f"the graph after {item.name}, with nothing rounded,")
            self._compare_all(item, found, max(self.tolerance, unrounded.tolerance))
            outputs = self._run(after, f"the graph after {item.name}")
        for name, expected in self._outputs.items():
            self.differences.append(self._compare(item, name, expected, outputs[name], exact))
        self._graph, self._outputs = after, outputs

    def evaluate(self, graph: Graph, exact: bool = True) -> dict[str, Array]:
        """The outputs of a graph by name, rows as the scenario's: in f64, or with everything in its own dtype."""
        if self.load_param is None:
            self.load_param = random_params(graph, self.seed)
        return self._run(graph, "a graph", exact)

    def differs_by_rounding(self, before: Graph, after: Graph) -> bool:
        """Whether two graphs that differ much in f64 are equal in their own dtypes, in which they run.

        A threshold that lies on a rounding, such as floor(distance * (1 / 31)), is on its other side in f64. What is
        wrong by more than CLEARLY in f64 is wrong by more than ROUNDED in f32 too.
        """
        gaps = []
        for exact in (True, False):
            pair = [self.evaluate(graph, exact) for graph in (before, after)]
            if any(name not in pair[1] or pair[1][name].shape != array.shape for name, array in pair[0].items()):
                return False
            gaps.append(max(difference_of("", n, a, pair[1][n], True, None).relative for n, a in pair[0].items()))
        return gaps[0] > CLEARLY and gaps[1] <= ROUNDED

    @property
    def outputs(self) -> dict[str, Array]:
        """What the last graph gave, in f64, by name."""
        return self._outputs

    @property
    def scenario(self) -> Scenario | None:
        """The tokens that graphs were run on; None for a graph of arrays."""
        return self._scenario

    @property
    def draws(self) -> list[dict[str, Data]]:
        """The inputs that a graph of arrays was run on."""
        return self._draws

    def _prepare(self, graph: Graph) -> None:
        """Chooses what to run, once for graphs with the same inputs."""
        assert self.load_param is not None
        if not is_token_graph(graph):
            with precise():
                self._draws, self.sizes = array_draws(graph, self.seed, self.budget, self.runs)
            return
        if self._scenario is None:
            lengths = self.lengths
            if lengths is None:
                chosen = choose_sizes(graph, self.context, self.load_param, self.budget, self.runs)
                lengths, text = chosen.lengths, str(chosen)
            else:
                text = str(Sizes(lengths, max(lengths)))
            self.sizes = [text]
            self._scenario = Scenario.random(vocabulary_of(graph), self.seed, lengths)

    def _run(self, graph: Graph, what: str, exact: bool = True) -> dict[str, Array]:
        assert self.load_param is not None
        try:
            with precise() if exact else nullcontext(), np.errstate(all="ignore"):
                known = self._quantized_weights(graph)
                if is_token_graph(graph):
                    if self._scenario is None:
                        self._prepare(graph)
                    assert self._scenario is not None
                    return self._scenario.run(graph, self.load_param, known)
                if not self._draws:
                    self._prepare(graph)
                outputs: dict[str, Array] = {}
                for draw in self._draws:
                    inputs = draw if exact else in_own_dtypes(graph, draw)
                    names = self.names_of(graph, inputs)
                    for name, data in evaluate_with(graph, inputs, self.load_param, known).items():
                        if not isinstance(data, (Encoded, Pages)):
                            outputs[names[name]] = np.asarray(data)
                return outputs
        except IRError as error:
            raise CompileError(f"{what} does not evaluate: {error}") from error

    def lowered(self, graph: Graph) -> None:
        """The graph in the ops that kernels are for: compared with what the last pass left; CompileError."""
        if graph is not self._graph and self._graph is not None:
            self(Lowering(), self._graph, graph, Report("lowering"))

    def calibrated(self, graph: Graph, load_param: LoadParam) -> None:
        """The graph with weights that were rounded by what layers see, which no bound of an encoding holds for: how far
        it is from the one before is said, and what follows is compared with it."""
        self.load_param = load_param
        outputs = self._run(graph, "the graph after rounding by what layers see")
        for name, expected in self._outputs.items():
            self.differences.append(self._compare(Calibration(), name, expected, outputs[name], exact=False))
        self._graph, self._outputs = graph, outputs

    def summary(self) -> list[str]:
        """What was compared, at which sizes, and how near it came: lines for people."""
        exact = len({d.pass_name for d in self.differences if d.exact})
        lines = [f"checked: {exact} passes, in f64, each before and after: {'; '.join(self.sizes)}"]
        lines += [f"checked: {text} against the bounds of their encodings" for text in self.rounded]
        lines += [str(difference) for difference in self.differences if not difference.exact and difference.largest]
        lines += [f"checked: {text}" for text in self.artifact]
        if self.not_run:
            lines.append(f"not checked: the artifact itself, its kernels and its threads: {self.not_run}")
        return lines

    def names_of(self, graph: Graph, inputs: dict[str, Data]) -> dict[str, str]:
        """What the outputs of a graph of arrays are called among `outputs`: with their sizes."""
        sizes = ", ".join(f"{name}={size}" for name, size in sorted(bind_symbols(graph, inputs).items()))
        return {name: f"{name} at {sizes}" if sizes else name for name, _ in graph.outputs}

    def _quantized_weights(self, graph: Graph) -> dict[Value, Data]:
        """The graph's quantized weights, each rounded once for all passes: searching for scales is slow."""
        assert self.load_param is not None
        wanted = [op for op in graph.ops if isinstance(op, Quantize) and op in graph.constants]
        for op in wanted:
            if op not in self._quantized:
                self._quantized[op] = evaluate_values([op], {}, self.load_param, {})["0"]
        kept: dict[Value, Data] = {op: self._quantized[op] for op in wanted}
        if wanted:
            self._quantized = kept
        return kept

    def _compare_all(self, item: Pass, outputs: dict[str, Array], tolerance: float) -> None:
        """CompileError where an output is missing or differs."""
        missing = sorted(self._outputs.keys() - outputs.keys())
        if missing:
            raise CompileError(f"pass {item} lost output {missing[0]!r}")
        for name, expected in self._outputs.items():
            difference = self._compare(item, name, expected, outputs[name], exact=True)
            if not difference.relative <= tolerance:
                raise CompileError(
                    f"pass {item} changed what the graph computes: {difference}; allowed is {tolerance:g}. "
                    f"See --print-ir-diff {item.name} for what it rewrote"
                )

    def _compare(self, item: Pass, name: str, expected: Array, found: Array, exact: bool) -> Difference:
        if expected.shape != found.shape:
            raise CompileError(f"pass {item} changed output {name!r} from {expected.shape} to {found.shape}")
        place = None if self._scenario is None else self._scenario.place
        return difference_of(item.name, name, expected, found, exact, place)


def in_own_dtypes(graph: Graph, inputs: Mapping[str, Data]) -> dict[str, Data]:
    """Arrays as a model takes them: floats in f64, of values that their dtypes have, in those dtypes."""
    found = dict(inputs)
    for value in graph.inputs:
        data = inputs[value.name]
        if isinstance(value.type, Tensor) and isinstance(data, np.ndarray):
            found[value.name] = data.astype(NUMPY_DTYPES[value.dtype])
    return found


def difference_of(
    what: str,
    name: str,
    expected: Array,
    found: Array,
    exact: bool = True,
    place: Callable[[int, int], tuple[int, ...]] | None = None,
) -> Difference:
    """How far `found` is from `expected`, of the same shape; place(row, rows): which token a row of a matrix is."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    gaps = gaps_between(a, b)
    worst = int(np.argmax(gaps)) if gaps.size else 0
    largest = float(gaps.reshape(-1)[worst]) if gaps.size else 0.0
    finite = np.abs(a[np.isfinite(a)])
    scale = float(finite.max()) if finite.size else 0.0
    relative = largest / scale if scale else largest
    where: tuple[int, ...] = ()
    if largest and place is not None and a.ndim == 2:
        where = place(worst // a.shape[1], a.shape[0])
    divergence = kl_divergence(a, b) if name == "logits" and not exact else 0.0
    return Difference(what, name, largest, relative, divergence, where, exact)


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
