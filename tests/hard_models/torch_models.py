"""Hard models as transformers models: of a class that transformers is told of, with a checkpoint as users have them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto import modeling_auto

from hard_models.building import text
from hard_models.drawing import TORCH, Spec, draw
from hard_models.ops_onnx import weight
from hard_models.ops_torch import TorchOps
from hard_models.parts import ROWS, VOCABULARY, WIDTH

KIND = "hard_decoder"


class HardConfig(PreTrainedConfig):
    """drawn_as: the seed that draws the model."""

    model_type = KIND
    drawn_as: int = 0
    vocab_size: int = VOCABULARY
    hidden_size: int = WIDTH
    num_hidden_layers: int = 1
    max_position_embeddings: int = ROWS


class HardForCausalLM(PreTrainedModel):
    """The drawn model. Weights are made as they are first used: on the meta device without values."""

    config_class = HardConfig

    def __init__(self, config: HardConfig) -> None:
        super().__init__(config)
        self.spec = draw(config.drawn_as, TORCH)
        with torch.no_grad():
            self._logits(torch.zeros(1, 4, dtype=torch.long), None)  # registers all weights
        self.post_init()

    def _kept(self, of: str, shape: tuple[int, ...], array: np.ndarray | None, scale: float) -> torch.Tensor:
        name = "w_" + of.replace(".", "_")
        if not hasattr(self, name):
            if array is not None:
                self.register_buffer(name, torch.empty(shape, dtype=torch.from_numpy(array[:1]).dtype))
                if getattr(self, name).device.type != "meta":
                    getattr(self, name).copy_(torch.from_numpy(array))
            else:
                parameter = torch.nn.Parameter(torch.empty(shape), requires_grad=False)
                if parameter.device.type != "meta":
                    parameter.copy_(torch.from_numpy(weight(self.spec.drawn_as, of, shape, scale)))
                self.register_parameter(name, parameter)
        return getattr(self, name)  # type: ignore[no-any-return]

    def _logits(self, ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        m = TorchOps(ids.device, ids.shape[1], self._kept)
        if self.spec.positions == "range" or position_ids is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        else:
            positions = position_ids[0]
        return text(m, self.spec, ids, positions, _length(self.spec, ids, positions))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **others: object
    ) -> CausalLMOutput:
        """Logits of each token."""
        return CausalLMOutput(logits=self._logits(input_ids, position_ids))

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Every weight is in the checkpoint."""


def _length(spec: Spec, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The number of tokens, in one of the ways in which models find it."""
    if spec.positions == "range":
        return torch.full((), ids.shape[1], dtype=torch.long, device=ids.device)
    return positions.max() + 1 if spec.positions == "input" else torch.ones_like(ids[0]).sum()


@contextlib.contextmanager
def known() -> Iterator[None]:
    """transformers knows the class, as if it were one of its own."""
    with mock.patch.dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, {KIND: HardForCausalLM.__name__}):
        AutoConfig.register(KIND, HardConfig, exist_ok=True)
        AutoModelForCausalLM.register(HardConfig, HardForCausalLM, exist_ok=True)
        yield


@dataclass(frozen=True)
class TorchReference:
    """What torch says a model computes."""

    model: HardForCausalLM

    def __call__(self, ids: np.ndarray) -> np.ndarray | None:
        with torch.no_grad():
            try:
                return self.model(torch.from_numpy(ids)[None]).logits[0].numpy()  # type: ignore[no-any-return]
            except IndexError:  # beyond a table
                return None


def module_of(spec: Spec) -> TorchReference:
    """The model with its weights."""
    with _quietly():
        config = HardConfig(drawn_as=spec.drawn_as, num_hidden_layers=spec.layers)
        return TorchReference(HardForCausalLM(config).eval())


def write(spec: Spec, folder: Path) -> tuple[Path, TorchReference]:
    """The folder of a model, and what torch says it computes."""
    reference = module_of(spec)
    with _quietly():
        reference.model.save_pretrained(folder)
    return folder, reference


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
