"""A config to an exported program: with attention captured where the model lets it be, else written out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmc.errors import FrontendError
from llmc.frontends.hf import capture
from llmc.frontends.hf.classes import ModelClass
from llmc.frontends.hf.export import Call, Exported, export, first_position, quietly
from llmc.frontends.hf.model import MetaModel, build
from llmc.frontends.hf.refusal import Whereabouts
from llmc.frontends.lifted import GENERATE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Traced:
    """A model without weights, and the program that it runs. room: tokens that its table of positions has room for,
    where that is not the config's number. notes: for the user to read."""

    meta: MetaModel
    exported: Exported
    room: int | None
    notes: tuple[str, ...]


def trace(
    kind: ModelClass,
    config: PreTrainedConfig,
    context: int,
    token_types: bool = False,
    outputs: tuple[str, ...] | None = None,
    untied: Callable[[PreTrainedModel], Collection[str]] = lambda model: (),
) -> Traced:
    """The program for up to `context` tokens, or fewer where the model has no more positions (see `Exported.longest`).

    token_types: give the model token types where it takes them. outputs: those to keep (default: all; a decoder has
    logits). transformers' default attention (sdpa) is tried before its plain one (eager): where they differ, the
    default is what users of the model have seen. untied: which parameters of a model just built are their own, though
    the config ties them to others.
    """
    reasons = []
    for implementation in (capture.IMPLEMENTATION, "sdpa", "eager"):
        where = Whereabouts()
        try:
            meta = build(kind, config, implementation, context)
            _untie(meta.model, untied(meta.model))
            with where.watching(meta.model):
                exported, room = _export(kind, meta, context, token_types, outputs)
        except FrontendError:
            raise
        except Exception as error:  # a model may fail anywhere when it meets an attention that it does not know
            reasons.append(where.describe(error))
            continue
        if implementation != capture.IMPLEMENTATION:
            note = f"attention is not captured but recognised from its parts: {reasons[0]}"
            return Traced(meta, _without_mutations(exported), room, (note,))
        reason = _why_not_captured(exported.program, int(config.get_text_config(decoder=True).num_hidden_layers))
        if not reason:
            return Traced(meta, _without_mutations(exported), room, ())
        reasons.append(reason)
    raise FrontendError(f"model type {config.model_type!r} cannot be compiled: {reasons[-1]}")


def _untie(model: torch.nn.Module, names: Collection[str]) -> None:
    """Parameters of their own under these names: the exporter knows a shared one by one of its names only."""
    for name in names:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        shared = getattr(owner, leaf)
        setattr(owner, leaf, torch.nn.Parameter(torch.empty_like(shared), requires_grad=False))


def _export(
    kind: ModelClass, meta: MetaModel, context: int, token_types: bool, outputs: tuple[str, ...] | None
) -> tuple[Exported, int | None]:
    arguments = {"input_ids": "ids"}
    first, room = (0, None)
    if kind.task != GENERATE:
        first, room = first_position(meta.model, meta.takes("token_type_ids"))
    if meta.takes("position_ids"):
        arguments["position_ids"] = "positions"
    if token_types and meta.takes("token_type_ids"):
        arguments["token_type_ids"] = "token_types"
    one_type = kind.task != GENERATE and not token_types and getattr(meta.model.config, "type_vocab_size", 0) > 0
    fixed = {"use_cache": False} if kind.task == GENERATE or meta.takes("use_cache") else {}
    kept = ("logits",) if kind.task == GENERATE else outputs
    longest = context if room is None else min(context, room)
    exported = export(
        meta.model, Call(arguments, first, one_type and meta.takes("token_type_ids"), fixed, kept), longest
    )
    if not exported.outputs:
        raise FrontendError(f"{type(meta.model).__name__} returns no {' or '.join(kept or ('tensor',))}")
    return exported, room


def _without_mutations(exported: Exported) -> Exported:
    """The program with every op that writes into its operand as one that does not. This is slow."""
    if not any(_mutates(node) for node in exported.program.graph.nodes):
        return exported
    with quietly():
        return replace(exported, program=exported.program.run_decompositions({}))


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_mask(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.llmc.mask.default


def _why_not_captured(program: torch.export.ExportedProgram, layers: int) -> str:
    """Empty when every layer's attention is one op and every mask goes to one; else the reason why not."""
    calls, strays = 0, set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.target is torch.ops.llmc.attention.default:
                calls += 1
                if any(_is_mask(source) and source.args[4] == capture.UNKNOWN for source in node.all_input_nodes):
                    return "a layer's mask is none of those that are known"
            elif any(_is_mask(source) for source in node.all_input_nodes):
                strays.add(str(node.target))
    if strays:
        return f"the model itself works on its mask ({', '.join(sorted(strays))})"
    if calls != layers:
        return f"{calls} of {layers} layers use the attention interface"
    return ""
