"""A Hugging Face model directory to a graph, its weights and what else an artifact needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmc.compiler.ir.dims import Dim, symbol
from llmc.compiler.ir.elementwise import Cast, constant
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Param, Value
from llmc.compiler.ir.types import FLOATS, Array, Tensor, dtype_of
from llmc.errors import FrontendError
from llmc.frontends.hf import capture
from llmc.frontends.hf.aten import Translation, cast, from_torch
from llmc.frontends.hf.checkpoint import ModelWeights
from llmc.frontends.hf.config import load_config
from llmc.frontends.hf.model import MetaModel, build
from llmc.frontends.hf.source import resolve
from llmc.frontends.hf.tokenizer import read_text
from llmc.frontends.hf.weights import ArrayWeights, RandomWeights, open_checkpoint
from llmc.frontends.lifted import Lifted, WeightSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

for _part in ("aten_math", "aten_shape", "aten_complex"):
    importlib.import_module(f"llmc.frontends.hf.{_part}")  # registers its handlers

_DEFAULT_CONTEXT = 2048  # for a model that names no limit
_SMALL = 4096  # elements of a computed buffer that becomes a constant in the graph; larger ones are params


def lift(source: str | Path, *, max_context: int | None = None, weights: str = "checkpoint", seed: int = 0) -> Lifted:
    """Read a model: a directory, or a name on the Hugging Face hub. No weight is loaded; none of its code runs.

    max_context: tokens a sequence may have (default: the model's own limit); rotary frequencies are settled for it.
    weights: "checkpoint", or "random" for `RandomWeights(seed)`.
    """
    model_dir = resolve(source)
    config = load_config(model_dir)
    positions = _max_positions(config)
    context = max_context if max_context is not None else positions or _DEFAULT_CONTEXT
    if context < 2:
        raise FrontendError(f"max context is {context}: at least 2 tokens are needed")
    if weights not in ("checkpoint", "random"):
        raise FrontendError(f"weights must be 'checkpoint' or 'random', not {weights!r}")
    # The checkpoint's headers are checked before the slower export.
    checkpoint = open_checkpoint(model_dir) if weights == "checkpoint" else None
    dtype = _checkpoint_dtype(config)  # building the model changes the config's
    notes: list[str] = []
    traced = _trace(config, context, notes)
    model = traced.meta.model
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if checkpoint is None:
        values: WeightSource = RandomWeights(shapes, dtype, seed)
    else:
        values = ModelWeights(model, checkpoint)
        notes += values.notes
    if traced.longest < context:
        notes.append(f"{traced.longest} tokens at most: the model treats a full context of {context} differently")
        context = traced.longest
    if positions is not None and context > positions:
        notes.append(
            f"the model was made for {positions} positions: of {context}, the later ones may make no sense to it"
        )
    graph, large = _translate(traced, values, context)
    if large:
        values = _Layered(ArrayWeights(large), values)
    text = read_text(model_dir, config)
    text_config = config.get_text_config(decoder=True)
    return Lifted(
        graph=graph,
        weights=values,
        name=_name(source, model_dir),
        architecture=str(config.model_type),
        parameters=sum(value.numel() for value in model.parameters()),
        vocab_size=int(text_config.vocab_size),
        layers=_layer_count(config),
        max_positions=positions or context,
        max_context=context,
        text=text,
        notes=(*notes, *text.notes),
        config=config.to_diff_dict(),
    )


@dataclass(frozen=True)
class _Traced:
    meta: MetaModel
    program: torch.export.ExportedProgram
    longest: int


def _trace(config: PreTrainedConfig, context: int, notes: list[str]) -> _Traced:
    """The exported program, with attention captured when the model's every layer lets it be, else written out.

    transformers' default attention (sdpa) is tried before its plain one (eager): where they differ, the default is what
    users of the model have seen.
    """
    reasons = []
    for implementation in (capture.IMPLEMENTATION, "sdpa", "eager"):
        try:
            traced = _export(config, implementation, context)
        except FrontendError:
            raise
        except Exception as error:  # a model may fail anywhere when it meets an attention that it does not know
            reasons.append(_one_line(error))
            continue
        if implementation != capture.IMPLEMENTATION:
            notes.append(f"attention is not captured but recognised from its parts: {reasons[0]}")
            return traced
        reason = _why_not_captured(traced.program, _layer_count(config))
        if not reason:
            return traced
        reasons.append(reason)
    raise FrontendError(
        f"model type {config.model_type!r} cannot be exported with the settings of its config.json: {reasons[-1]}"
    )


def _export(config: PreTrainedConfig, implementation: str, context: int) -> _Traced:
    meta = build(config, implementation, context)
    program, longest = capture.export(meta.model, meta.takes_positions, context)
    if any(_mutates(node) for node in program.graph.nodes):
        with capture.quietly():
            program = program.run_decompositions({})
    return _Traced(meta, program, longest)


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_mask(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.llmc.mask.default


def _why_not_captured(program: torch.export.ExportedProgram, layers: int) -> str:
    """Empty when every layer's attention is one op and every mask goes to one; else what is amiss."""
    calls, strays = 0, set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.target is torch.ops.llmc.attention.default:
                calls += 1
                if any(_is_mask(source) and source.args[4] == capture.UNKNOWN for source in node.all_input_nodes):
                    return "a layer's mask is neither causal nor a causal window"
            elif any(_is_mask(source) for source in node.all_input_nodes):
                strays.add(str(node.target))
    if strays:
        return f"the model itself works on its mask ({', '.join(sorted(strays))})"
    if calls != layers:
        return f"{calls} of {layers} layers use the attention interface"
    return ""


def _translate(traced: _Traced, source: WeightSource, context: int) -> tuple[Graph, dict[str, Array]]:
    """The graph, and those computed buffers that are params in it."""
    program = traced.program
    size = symbol("S", 2, context)
    inputs = {name: Input(name, Tensor((1, size), "i32")) for name in ("ids", "positions")}
    names = _canonical_names(traced.meta.model)
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    large: dict[str, Array] = {}
    given: dict[torch.fx.Node, Any] = {}
    sizes: dict[str, Dim] = {}
    assert isinstance(size, Dim)
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in inputs:
            given[node] = Cast(inputs[node.name], "i64")
            sizes[str(node.meta["val"].shape[1])] = size
        elif node.name in weights:
            name = weights[node.name].removeprefix("model.")
            given[node] = _weight(names.get(name, name), traced.meta, source, large)
        elif node.name in signature.inputs_to_lifted_tensor_constants:
            given[node] = from_torch(
                program.constants[signature.inputs_to_lifted_tensor_constants[node.name]], node.name
            )
    translation = Translation(sizes)
    # The logits are the last output; before them stand buffers that the model writes to.
    meaning = translation.run(program.graph_module, given)
    logits: Value = cast(meaning[-1] if isinstance(meaning, (tuple, list)) else meaning, "f32")
    return Graph("model", tuple(inputs.values()), (("logits", logits),)), large


def _weight(name: str, meta: MetaModel, source: WeightSource, large: dict[str, Array]) -> Value:
    """A weight of the checkpoint as a param cast to f32, or a computed buffer as a constant."""
    if name in meta.buffers:
        array = meta.buffers[name]
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        if array.size <= _SMALL:
            return constant(array, dtype_of(array.dtype))
        large[name] = array
        return Param(name, Tensor(array.shape, dtype_of(array.dtype)))
    dtype = source.dtype(name)
    param = Param(name, Tensor(source.shape(name), dtype))
    return Cast(param, "f32") if dtype in FLOATS and dtype != "f32" else param


def _canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """For each name of a parameter, the first name of the same one: tied weights are one param."""
    first: dict[int, str] = {}
    names = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(value), name)
    return names


class _Layered:
    """Two sources as one; the first wins."""

    def __init__(self, upper: WeightSource, lower: WeightSource) -> None:
        self._upper, self._lower = upper, lower
        self._names = set(upper.names)

    @property
    def names(self) -> list[str]:
        return [*self._upper.names, *(name for name in self._lower.names if name not in self._names)]

    def _of(self, name: str) -> WeightSource:
        return self._upper if name in self._names else self._lower

    def dtype(self, name: str) -> str:
        return self._of(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def load(self, name: str) -> Array:
        return self._of(name).load(name)


def _name(source: str | Path, directory: Path) -> str:
    """The hub's name of the model without its organization and revision, or the directory's."""
    return directory.resolve().name if Path(source).expanduser().is_dir() else str(source).split("@")[0].split("/")[-1]


def _max_positions(config: PreTrainedConfig) -> int | None:
    """The model's own limit on positions, whatever it calls it."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return value
    return None


def _layer_count(config: PreTrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _checkpoint_dtype(config: PreTrainedConfig) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(getattr(config, "dtype", None) or torch.float32, "f32")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
