"""Round weights: each linear op and embedding table gets the precision that its scheme says.

int2 to int8 wrap the weight in `llm.quantize` and tell the op what its activations are rounded to; none, bf16
and f16 cast it. A table shared by the embedding and the head stays shared, at the embedding's precision. Norm weights,
biases and tables that are not looked up by token stay as they are: they are few, and their errors are not averaged out
over an input dimension. Weights that are encoded already, as the source had them, stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmc.compiler.encodings.grouped import fits
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.graph import Graph, rewrite
from llmc.compiler.ir.llm import (
    ACTIVATION_ROUNDINGS,
    Attention,
    Embed,
    GatedLinear,
    Linear,
    PagedAttention,
    Quantize,
)
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.ragged import RelativeBias
from llmc.compiler.ir.types import FLOATS, Tensor
from llmc.compiler.passes.manager import Pass, Report
from llmc.compiler.passes.rewriting import uncast
from llmc.compiler.passes.schemes import (
    INTEGER_SCHEMES,
    Overrides,
    Scheme,
    bits_of,
    describe,
    find_head,
    looks_up_tokens,
    param_names,
    scheme_of,
    weight_ops,
)
from llmc.errors import CompileError

_FINER = "int6"  # what embeddings and heads are rounded to at least: their errors reach every token


@dataclass(frozen=True)
class QuantizeWeights(Pass, name="quantize"):
    """Give weights a precision.

    scheme: none (f32), bf16, f16, int8 or int2 to int6; also an encoding's name. group_size: inputs that share a scale.
    symmetric: up to 4 bits as levels of a table, without minimums. activations: what kernels round activations to in
    front of integer weights (int8, bf16 or f32); in front of float weights only bf16 is a rounding. embedding, head:
    their own schemes; `auto` is the scheme, but int6 where that has fewer bits. overrides: `pattern=scheme;...` over
    params' names. least: as overrides, which win: of weights that their source has rounded, schemes that they get
    where their own is coarser. search: look for scales of least squared error.
    """

    exact: ClassVar[bool] = False

    scheme: str = "int4"
    group_size: int = 64
    symmetric: bool = True
    activations: str = "int8"
    embedding: str = "auto"
    head: str = "auto"
    overrides: str = ""
    least: str = ""
    search: bool = True

    def run(self, graph: Graph, report: Report) -> Graph:
        return _Run(self, graph, report).run()


class _Run:
    """One run: weights that were rounded already, by what they are made of and how."""

    def __init__(self, options: QuantizeWeights, graph: Graph, report: Report) -> None:
        if options.activations not in ACTIVATION_ROUNDINGS:
            known = ", ".join(ACTIVATION_ROUNDINGS)
            raise CompileError(f"unknown activations {options.activations!r}; known: {known}")
        self.options, self.graph, self.report = options, graph, report
        self.overrides = Overrides.parse(options.overrides)
        self.least = Overrides.parse(options.least)
        self.rounded: dict[tuple[Value, Scheme], Value] = {}
        self.tables: dict[Value, Scheme] = {}
        self.scheme = self._scheme(options.scheme)
        few = [name for name, bits in INTEGER_SCHEMES.items() if bits < INTEGER_SCHEMES[_FINER]]
        few = [name for name in few if fits(INTEGER_SCHEMES[name], options.group_size)]
        is_few = any(options.scheme in (name, self._scheme(name).encoding) for name in few)
        finer = self._scheme(_FINER) if is_few else self.scheme
        self.head = finer if options.head == "auto" else self._scheme(options.head)
        self.embedding = finer if options.embedding == "auto" else self._scheme(options.embedding)
        for _, text in self.overrides.items:
            self._scheme(text)
        self.head_op = find_head(graph)
        self.head_weight = None if self.head_op is None else uncast(self.head_op.w)

    def _scheme(self, text: str) -> Scheme:
        return scheme_of(text, self.options.group_size, self.options.symmetric)

    def run(self) -> Graph:
        self._check_overrides()
        for op in self.graph.ops:
            if op in self.graph.constants:
                continue
            if isinstance(op, Embed):
                self._plan_table(op)
            elif isinstance(op, (Linear, GatedLinear)) and not self._is_encoded(op.w):
                self._refused(op, op.w, note=True)
            else:
                self._note_unrecognised(op)
        return rewrite(self.graph, self._rule)

    def _is_encoded(self, weight: Value) -> bool:
        return weight in self.graph.constants and weight.tensor.encoding is not None

    def _plan_table(self, op: Embed) -> None:
        if self._is_encoded(op.table):
            self.report.hit(f"embedding already {op.table.tensor.encoding}")
            return
        if self._refused(op, op.table, note=True):
            return
        base, scheme = uncast(op.table), self._override(op.table)
        if scheme is None and looks_up_tokens(op, self.graph):
            scheme = self._at_least(op.table, self.embedding)
        if scheme is None:
            self.report.hit("table left as it is")
            return
        self.tables[base] = scheme

    def _note_unrecognised(self, op: Op) -> None:
        """Weights that no linear op or embedding reads: experts in a gather, a matmul that was not recognised.

        A table of what attention adds by distance is none: kernels read it in f32.
        """
        if isinstance(op, (Attention, PagedAttention, RelativeBias)):
            return
        for value in op.operands:
            if value in self.graph.constants and isinstance(value.type, Tensor) and value.type.dtype in FLOATS:
                matrix = sum(dim != 1 for dim in value.shape) >= 2
                if matrix and param_names(value) and value.type.encoding is None:
                    reason = f"not read by llm.linear or llm.embed: its weight stays {value.dtype}"
                    self.report.refuse(describe(op, value), reason)

    def _check_overrides(self) -> None:
        if not self.overrides.items:
            return
        weights = [op.w for op in weight_ops(self.graph)]
        weights += [op.table for op in self.graph.ops if isinstance(op, Embed)]
        names = [name for weight in weights for name in param_names(weight)]
        for pattern in self.overrides.unmatched(names):
            raise CompileError(f"override {pattern!r} matches no weight; names look like {', '.join(names[:3])}")

    def _override(self, weight: Value) -> Scheme | None:
        text = self.overrides.of(param_names(weight)) if self.overrides.items else ""
        return self._scheme(text) if text else None

    def _at_least(self, weight: Value, scheme: Scheme) -> Scheme:
        """The scheme, or that which `least` has for the weight where it is finer."""
        text = self.least.of(param_names(weight)) if self.least.items else ""
        if not text or not scheme.encoding or bits_of(text) <= bits_of(scheme.encoding):
            return scheme
        size = self.options.group_size
        bits = next(bits for bits in sorted(INTEGER_SCHEMES.values()) if bits >= bits_of(text) and fits(bits, size))
        return self._scheme(f"int{bits}")

    def _refused(self, op: Op, weight: Value, note: bool = False) -> bool:
        """Whether a weight cannot be rounded; `note` puts the reason into the report."""
        kind = weight.type
        if not isinstance(kind, Tensor) or weight not in self.graph.constants:
            reason = "its weight is computed at run time"
        elif kind.encoding is not None:
            reason = f"its weight is in {kind.encoding} already"
        elif kind.dtype not in FLOATS:
            reason = f"its weight is {kind.dtype}, not floats"
        else:
            return False
        if note:
            self.report.refuse(describe(op, weight), reason)
        return True

    def _rule(self, op: Op) -> Value | None:
        if all(operand in self.graph.constants for operand in op.operands):
            return None
        if isinstance(op, Embed) and uncast(op.table) in self.tables:
            return self._with_table(op)
        if isinstance(op, (Linear, GatedLinear)) and self._is_encoded(op.w):
            return self._with_encoded(op)
        if isinstance(op, (Linear, GatedLinear)) and not self._refused(op, op.w):
            return self._with_weight(op)
        return None

    def _with_table(self, op: Embed) -> Value | None:
        scheme = self.tables[uncast(op.table)]
        self.report.hit(f"embedding {scheme}")
        table = self._round(op.table, scheme)
        return None if table is op.table else op.replace(table=table)

    def _with_weight(self, op: Linear | GatedLinear) -> Value | None:
        base = uncast(op.w)
        scheme = self.tables.get(base)
        kind = "tied head" if scheme is not None else "linear"
        if scheme is None:
            scheme = self._override(op.w)
            if len({self.overrides.of([name]) for name in param_names(op.w)}) > 1:
                why = "overrides give its parts different schemes: the first that matches any part is taken for all"
                self.report.refuse(describe(op, op.w), why)
        if scheme is None:
            is_head = base is self.head_weight
            kind = "head" if is_head else kind
            scheme = self._at_least(op.w, self.head if is_head else self.scheme)
        self.report.hit(f"{kind} {scheme}")
        activations = self.options.activations
        rounding = activations if scheme.encoding or activations == "bf16" else "f32"
        weight = self._round(op.w, scheme)
        return None if weight is op.w and rounding == op.rounding else op.replace(w=weight, rounding=rounding)

    def _with_encoded(self, op: Linear | GatedLinear) -> Value | None:
        """A weight of the source's own integers. Its activations are rounded as asked for, or as the source does."""
        kind = "head" if op is self.head_op else "linear"
        self.report.hit(f"{kind} already {op.w.tensor.encoding}")
        activations = self.options.activations
        return None if activations in ("f32", op.rounding) else op.replace(rounding=activations)

    def _round(self, weight: Value, scheme: Scheme) -> Value:
        base = uncast(weight)
        found = self.rounded.get((base, scheme))
        if found is None:
            if scheme.encoding:
                wide = base if base.dtype == "f32" else Cast(base, "f32")
                found = Quantize(wide, scheme.encoding, self.options.search)
            else:
                found = base if base.dtype == scheme.dtype else Cast(base, scheme.dtype)
            self.rounded[base, scheme] = found
        return found
