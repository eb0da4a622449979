"""A transformers model on the meta device, with the values of its computed buffers beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from llmc.errors import FrontendError
from llmc.frontends.hf.config import quiet
from llmc.frontends.hf.weights import to_numpy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmc.frontends.hf.classes import ModelClass

_MOST_BUFFER_BYTES = 1 << 30


@dataclass(frozen=True)
class MetaModel:
    """model: every tensor on the meta device. buffers: what transformers computes instead of storing, by name.

    stretches: whether its rotary frequencies follow the length of a sequence beyond the model's own limit.
    """

    model: PreTrainedModel
    buffers: dict[str, NDArray[np.generic]]
    stretches: bool

    def takes(self, argument: str) -> bool:
        """Whether the model's forward has an argument of that name, such as `position_ids`."""
        return argument in inspect.signature(self.model.forward).parameters


def build(kind: ModelClass, config: PreTrainedConfig, implementation: str, context: int) -> MetaModel:
    """Build the model for `context` tokens. implementation: of attention, as transformers names it."""
    with quiet(), torch.device("meta"):
        model = kind.build(config, implementation)
        model.eval()  # type: ignore[no-untyped-call]
    if hasattr(model, "set_experts_implementation"):
        with quiet():
            _choose_experts(model)
    buffers = _compute_buffers(model)
    stretches = _fix_rope(model, buffers, context)
    for name, value in buffers.items():
        if name.endswith("inv_freq") and not value.isfinite().all():
            raise FrontendError(f"rotary frequencies {name} are not finite: are rope_theta and its scaling right?")
    return MetaModel(model, {name: to_numpy(value) for name, value in buffers.items()}, stretches)


def _choose_experts(model: PreTrainedModel) -> None:
    """Experts as products over gathered weights: the only form whose trace does not depend on the routing."""
    try:
        model.set_experts_implementation("batched_mm")
    except (ValueError, KeyError, AttributeError):
        return  # the model has no experts, or its own way with them


def _compute_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The values of non-persistent buffers, as `from_pretrained` computes them; the model is left on meta."""
    names = [name for name, _ in model.named_non_persistent_buffers()]
    for name in names:
        module, leaf = _owner(model, name)
        buffer = getattr(module, leaf)
        size = buffer.numel() * buffer.element_size()
        if size > _MOST_BUFFER_BYTES:
            raise FrontendError(f"buffer {name} of the model has {size} bytes: is max_position_embeddings right?")
        setattr(module, leaf, torch.zeros_like(buffer, device="cpu"))
    for module in model.modules():
        setattr(module, "_is_hf_initialized", False)  # noqa: B010  building on meta marked them; the buffers' values are still to come
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    with quiet():
        model.initialize_weights()  # type: ignore[no-untyped-call]
    values = {}
    for name in names:
        module, leaf = _owner(model, name)
        values[name] = getattr(module, leaf).detach()
        setattr(module, leaf, values[name].to("meta"))
    return values


def _owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _fix_rope(model: PreTrainedModel, buffers: dict[str, torch.Tensor], context: int) -> bool:
    """Let frequencies that depend on the sequence's length (dynamic, longrope) be traced with that law.

    transformers switches them in its modules' state as a sequence grows, which no trace holds. Up to the original
    length they are the module's own; only beyond it does the law matter. Returns `MetaModel.stretches`.
    """
    stretches = False
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        layered = isinstance(kinds, dict)
        if kinds is None or not hasattr(module, "config"):
            continue
        laws: dict[str | None, _Law] = {}
        for layer_type, kind in kinds.items() if layered else [(None, kinds)]:
            if kind != "longrope" and "dynamic" not in str(kind):
                continue
            parameters = module.config.rope_parameters
            parameters = parameters[layer_type] if layered else parameters
            original = int(module.original_max_seq_len)
            if kind == "longrope":
                original = int(parameters.get("original_max_position_embeddings") or original)
            if context > original:
                stretches |= kind != "longrope"
                laws[layer_type] = _law(module, str(kind), layer_type, original, buffers, path)
        module.rope_type = dict.fromkeys(kinds, "default") if layered else "default"
        if laws:
            _obey(module, laws)
    return stretches


_Law = Callable[[torch.Tensor], torch.Tensor]  # frequencies [pairs] of a sequence, by the number of its tokens


def _law(
    module: torch.nn.Module,
    kind: str,
    layer_type: str | None,
    original: int,
    buffers: dict[str, torch.Tensor],
    path: str,
) -> _Law:
    """The frequencies of a rotary module: its own up to `original` tokens, beyond them as transformers has it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = f"{layer_type}_" if layer_type else ""
    arguments = {"layer_type": layer_type} if layer_type else {}
    beyond = ROPE_INIT_FUNCTIONS[kind]
    if kind == "longrope":  # one other set for every length
        values, _ = beyond(module.config, torch.device("cpu"), seq_len=original + 1, **arguments)
        buffers[f"{path}.{prefix}long_inv_freq"] = values
        module.register_buffer(f"{prefix}long_inv_freq", values.to("meta"), persistent=False)

    def frequencies(length: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = getattr(module, f"{prefix}inv_freq")
        if kind == "longrope":
            other: torch.Tensor = getattr(module, f"{prefix}long_inv_freq")
        else:
            other, _ = beyond(module.config, length.device, seq_len=length, **arguments)
        return torch.where(length > original, other, own)

    return frequencies


def _obey(module: torch.nn.Module, laws: Mapping[str | None, _Law]) -> None:
    """While the module runs, its frequencies are those of the sequence that it runs for."""
    forward = module.forward

    def lawful(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> object:
        given = () if layer_type is None else (layer_type,)
        law = laws.get(layer_type)
        if law is None:
            return forward(x, position_ids, *given)
        name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        own = module._buffers[name]
        module._buffers[name] = law(torch.max(position_ids) + 1)
        try:
            return forward(x, position_ids, *given)
        finally:
            module._buffers[name] = own

    module.forward = lawful
