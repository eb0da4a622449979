"""An ONNX file to a graph, its weights and what else an artifact needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmc.compiler.ir.dims import Dim, symbol, symbols_of
from llmc.compiler.ir.elementwise import constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.integers import parameter_count
from llmc.compiler.ir.llm import Attention
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.structural import Broadcast, Softmax
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.lifted import ENCODE, GENERATE, RUN, Lifted, Text, WeightSource
from llmc.frontends.onnx.conventions import (
    Role,
    TextInputs,
    empty_past,
    is_named_present,
    is_present,
    text_inputs,
)
from llmc.frontends.onnx.encoder import as_encoder
from llmc.frontends.onnx.forms import broadcast, cast, reshape
from llmc.frontends.onnx.free_sizes import FreeSizes
from llmc.frontends.onnx.initializers import NoiseWeights
from llmc.frontends.onnx.model import Bodies, OnnxModel, Signature, signature_dtype
from llmc.frontends.onnx.position_tables import longest_sequence
from llmc.frontends.onnx.recognition import (
    replaceable,
    token_rows,
    without_token_types,
)
from llmc.frontends.onnx.text import Companions, model_name
from llmc.frontends.onnx.translation import Body, Item, Translation, objects
from llmc.frontends.padding import without_padding

_DEFAULT_CONTEXT = 2048  # for a model that names no limit
_SHORT = 8  # tokens of the graph in which tables of positions are looked for


def lift(
    path: str | Path,
    *,
    max_context: int | None = None,
    weights: str = "checkpoint",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    max_dims: Mapping[str, int] | None = None,
    dims: Mapping[str, int] | None = None,
) -> Lifted:
    """Read a model's file. No weight is loaded; nothing of it runs.

    max_context: tokens a sequence may have (default: the model's own limit). weights: "checkpoint", or "random" for
    noise from `seed`. tokenizer: the directory of one, where none lies beside the model. max_dims: the greatest value
    of each free size of a graph that is not text. dims: free sizes that are numbers, in such a graph.
    """
    if weights not in ("checkpoint", "random"):
        raise FrontendError(f"weights must be 'checkpoint' or 'random', not {weights!r}")
    if max_context is not None and max_context < 2:
        raise FrontendError(f"max context is {max_context}: at least 2 tokens are needed")
    model = OnnxModel(Path(path))
    text, why_not = text_inputs(model.inputs)
    if text is None:
        lifted = _run_graph(model, FreeSizes.of(model.inputs, dims or {}, max_dims or {}), why_not)
        unread = () if tokenizer is None else ("--tokenizer has no effect: this graph does not take texts",)
        return replace(lifted, notes=(*lifted.notes, *unread))
    for name in sorted({**(max_dims or {}), **(dims or {})}):
        raise FrontendError(f"{name!r:.60} is no size of a text model: --max-context bounds it")
    return _Text(model, text, Companions(model.path, tokenizer)).lifted(max_context, weights, seed)


def _run_graph(model: OnnxModel, sizes: FreeSizes, why_not_text: str) -> Lifted:
    """A graph of any kind, with the inputs and outputs that the file gives it."""
    bodies = model.bodies()
    graph, sizes = _plain_graph(model, bodies, sizes)
    notes = [f"compiled as a graph of plain tensors, not as text: {why_not_text}"] if why_not_text else []
    return Lifted(
        graph=graph,
        weights=bodies.weights,
        name=model_name(model.path),
        architecture="onnx",
        parameters=parameter_count(graph),
        vocab_size=0,
        layers=0,
        max_positions=0,
        max_context=0,
        text=Text(),
        notes=(*notes, *sizes.notes),
        task=RUN,
    )


def _plain_graph(model: OnnxModel, bodies: Bodies, sizes: FreeSizes) -> tuple[Graph, FreeSizes]:
    """The graph, and its free sizes as far as it leaves them free."""
    while True:
        inputs = sizes.inputs(model.inputs)
        given = {value.name: Item(value) for value in inputs}
        try:
            items = Translation(bodies.functions).run(bodies.main, given)
        except FrontendError as error:
            settled = sizes.after(error.__cause__)
            if settled is None:
                raise FrontendError(f"{error}{sizes.remedy(error.__cause__)}") from error
            sizes = settled
            continue
        outputs = zip(bodies.main.outputs, (item.value for item in items), strict=True)
        return Graph("model", inputs, tuple(outputs)), sizes


@dataclass(frozen=True)
class _Translated:
    """One translation: the outputs that are kept, and the inputs of the graph.

    padding: the token id that the graph asks for and that is taken to be nowhere, if there is one.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, Value], ...]
    padding: int | None


@dataclass(frozen=True)
class _Whole:
    """The graph of a text model with all its outputs, and what was asked for."""

    graph: Graph
    context: int
    notes: tuple[str, ...]
    weights: str
    seed: int


class _Text:
    """A text model on its way to a graph of one sequence."""

    def __init__(self, model: OnnxModel, inputs: TextInputs, companions: Companions) -> None:
        self.model = model
        self.inputs = inputs
        self.companions = companions
        self.wide_floats = model.wide_floats()
        self.bodies = model.bodies(self.wide_floats)
        self.has_past = bool(inputs.having(Role.PAST))
        self.kept = [output for output in model.outputs if not is_present(output)]
        if not self.kept:
            raise FrontendError(f"{model.path} has no output but keys and values: nothing to compute")
        self.main = self._trimmed()

    def _left_out(self) -> list[str]:
        """A note about outputs of more axes than a row a token has, such as attention's probabilities.

        Where there is a past, such outputs are keys and values whatever they are called.
        """
        dropped = [output for output in self.model.outputs if output not in self.kept and not is_named_present(output)]
        return [] if self.has_past else _told_left_out([output.name for output in dropped], "a row a token or a text")

    def _trimmed(self) -> Body:
        """The model's graph without the outputs that are not kept."""
        main = self.bodies.main
        return Body(main.inputs, tuple(output.name for output in self.kept), main.nodes, main.initializers)

    def translate(self, longest: int) -> _Translated:
        """The graph for sequences of 1 to `longest` tokens."""
        size = symbol("S", 1, longest)
        ids, positions, types = (Input(name, Tensor((1, size), "i32")) for name in ("ids", "positions", "token_types"))
        given = {}
        for signature in self.model.inputs:
            given[signature.name] = self._given(signature, size, ids, positions, types)
        items = Translation(self.bodies.functions, self.wide_floats).run(self.main, given)
        values = tuple((name, item.value) for name, item in zip(self.main.outputs, items, strict=True))
        inputs = (ids, positions, types) if self.inputs.having(Role.TOKEN_TYPES) else (ids, positions)
        graph, padding = without_padding(Graph("model", inputs, values), self.companions.pad_id)
        return _Translated(inputs, graph.outputs, padding)

    def _given(self, signature: Signature, size: Dim, ids: Input, positions: Input, types: Input) -> Item:
        """What an input of the model is for one sequence of S tokens, without padding or a past."""
        role = self.inputs.roles[signature.name]
        dtype = signature_dtype(signature, "input")
        dtype = "f32" if dtype in self.wide_floats else dtype
        dims = signature.dims or ()
        if role is Role.PAST:
            shape = empty_past(signature, self._ids())
            return Item(constant(np.zeros(shape), dtype), objects([], shape))
        if role is Role.MASK:
            return Item(Broadcast(constant(np.ones((1, 1)), dtype), (1, size)))
        if role in (Role.IDS, Role.POSITIONS, Role.TOKEN_TYPES):
            source = {Role.IDS: ids, Role.POSITIONS: positions}.get(role, types)
            value = cast(source, dtype)
            kinds = [dim for dim in dims[:-2] if isinstance(dim, int)]  # of positions, all the same for text
            return Item(reshape(value, (size,)) if len(dims) == 1 else broadcast(value, (*kinds, 1, size)))
        number = {Role.LENGTH: size, Role.LAST: size - 1}.get(role, 0)
        return Item(known=objects([number], (1,) * len(dims)), dtype=dtype)

    def _ids(self) -> Signature:
        name = self.inputs.having(Role.IDS)[0]
        return next(signature for signature in self.model.inputs if signature.name == name)

    def lifted(self, max_context: int | None, weights: str, seed: int) -> Lifted:
        """The model as a decoder or an encoder; as a decoder that may be an encoder where the files do not say."""
        context, notes = self._context(max_context)
        translated = self.translate(context)
        outputs = tuple((name, cast(value, "f32")) for name, value in translated.outputs)
        if translated.padding is not None:
            notes = [
                *notes,
                f"token {translated.padding} is padding to this model, and texts are computed without padding: it is a "
                "token like any other in them",
            ]
        notes = [*notes, *self._left_out()]
        whole = _Whole(Graph("model", translated.inputs, outputs), context, tuple(notes), weights, seed)
        logits = self._vocabulary_logits(whole.graph, token_rows(whole.graph))
        decodes = self._decodes()
        if logits is None or decodes is False:
            return self._encoder(whole)
        decoder = self._decoder(whole, logits)
        return decoder if decodes else replace(decoder, otherwise=lambda: self._encoder(whole))

    def _decoder(self, whole: _Whole, logits: Value) -> Lifted:
        graph = Graph("model", whole.graph.inputs[:2], (("logits", logits),))
        if len(whole.graph.inputs) > 2:
            graph = without_token_types(graph, whole.graph.inputs[2])
        vocabulary = logits.shape[2]
        assert isinstance(vocabulary, int)
        text = self.companions.text(vocabulary)
        others = [name for name, value in whole.graph.outputs if value is not logits]
        notes = (*text.notes, *_told_left_out(others, "a decoder's logits"))
        return self._with_facts(whole, graph, self.bodies.weights, vocabulary, text, notes, GENERATE, None)

    def _encoder(self, whole: _Whole) -> Lifted:
        vocabulary = token_rows(whole.graph)
        made = as_encoder(whole.graph, self.companions, self.bodies.weights, vocabulary, whole.context)
        return self._with_facts(whole, made.graph, made.weights, vocabulary, made.text, made.notes, ENCODE, made.facts)

    def _with_facts(
        self,
        whole: _Whole,
        graph: Graph,
        source: WeightSource,
        vocabulary: int,
        text: Text,
        notes: tuple[str, ...],
        task: str,
        encoder: dict[str, object] | None,
    ) -> Lifted:
        """A graph with what is known of the model."""
        if whole.weights == "random":
            source = NoiseWeights(source, replaceable(graph), whole.seed)
        return Lifted(
            graph=graph,
            weights=source,
            name=model_name(self.model.path),
            architecture=self.companions.architecture or "onnx",
            parameters=parameter_count(graph),
            vocab_size=vocabulary,
            layers=self.companions.layers or self._layer_count(graph),
            max_positions=self.companions.max_positions or whole.context,
            max_context=whole.context,
            text=text,
            notes=(*whole.notes, *notes),
            config=self.companions.config,
            task=task,
            encoder=encoder,
        )

    def _context(self, max_context: int | None) -> tuple[int, list[str]]:
        """Tokens a sequence may have: as asked, unless the model's own tables end before."""
        first = self.translate(min(_SHORT, max_context or _SHORT))
        graph = Graph("model", first.inputs, first.outputs)
        size = next(iter(symbols_of(graph.input("ids").shape[1])))
        room = longest_sequence(graph, size, self.bodies.weights)
        declared = self.companions.max_positions
        context = max_context or min((n for n in (declared, room) if n is not None), default=_DEFAULT_CONTEXT)
        if room is not None and context > room:
            return room, [f"{room} tokens at most: the model's tables of positions end there"]
        if declared is not None and context > declared:
            note = f"the model was made for {declared} positions: of {context}, the later ones may make no sense to it"
            return context, [note]
        return context, []

    def _decodes(self) -> bool | None:
        """Whether the files say that the model is a decoder; None where they do not say."""
        classes = self.companions.class_names
        if self.has_past or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
            return True
        return False if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in classes) else None

    def _vocabulary_logits(self, graph: Graph, vocabulary: int) -> Value | None:
        size = graph.input("ids").shape[1]
        named = dict(graph.outputs).get("logits")
        for value in [named] if named is not None else [value for _, value in graph.outputs]:
            width = value.shape[-1] if value.rank == 3 else None
            if not isinstance(width, int) or width < max(vocabulary, 1):
                continue
            if value.shape[:-1] == (1, size):
                return value
            if self.has_past and named is not None:
                raise FrontendError(
                    f"{self.model.path} gives logits {list(value.shape)} of some tokens only: "
                    "export the model with logits of all tokens"
                )
        return None

    def _layer_count(self, graph: Graph) -> int:
        """Layers, as far as a graph shows them: a softmax or an attention each."""
        return sum(isinstance(op, (Softmax, Attention)) for op in graph.ops) or len(self.inputs.having(Role.PAST)) // 2


def _told_left_out(names: Sequence[str], kept: str) -> list[str]:
    """A note about outputs that an artifact does not have; none where there are none. kept: what it has."""
    shown = ", ".join(f"{name:.60}" for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [f"left out of the outputs, which are {kept}: {shown}"] if names else []
