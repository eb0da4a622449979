"""Tiny models exported to ONNX as users export them: by both exporters of torch, with and without a cache.

    path = export("llama", "optimum", folder)

Styles: "dynamo" (torch.export, no cache), "dynamo-cache" (the cache nested as
transformers' own is, with names of the exporter's making), "script"
(the older TorchScript exporter, no cache), "optimum" (that with flat `past_key_values.N.key` inputs and `present.N.key`
outputs, as Optimum writes decoders), "optimum-dynamo" (the same inputs through torch.export).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import make_tiny

CACHED = ("dynamo-cache", "optimum", "optimum-dynamo")
STYLES = ("dynamo", "script", *CACHED)
_TOKENS, _PAST, _BATCH = 4, 5, 2  # of the example that is traced


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No warnings and no log lines of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class FlatCache(torch.nn.Module):
    """A decoder whose cache is a flat list of keys and values, as in Optimum's exports."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        present = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return found.logits, *present


class NestedCache(torch.nn.Module):
    """A decoder whose cache is flattened as torch flattens transformers' own: the exporter makes up all names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: dict[str, list[torch.Tensor]],
    ) -> tuple[torch.Tensor, ...]:
        pairs = zip(past_key_values["key_cache"], past_key_values["value_cache"], strict=True)
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=transformers.DynamicCache(list(pairs))
        )
        layers = found.past_key_values.layers
        return found.logits, *(layer.keys for layer in layers), *(layer.values for layer in layers)


class NoCache(torch.nn.Module):
    """A decoder of whole sequences."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class Encoder(torch.nn.Module):
    """An encoder with chosen outputs, in order."""

    def __init__(self, model: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *types: torch.Tensor) -> Any:
        given = {"token_type_ids": types[0]} if types else {}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        return tuple(found[name] for name in self.outputs)


def export_encoder(directory: Path, head: str, outputs: tuple[str, ...], types: bool, style: str = "script") -> Path:
    """Write `onnx/model.onnx` into a model's directory, where Optimum puts it. types: with token_type_ids."""
    auto = getattr(transformers, f"AutoModelFor{head}") if head else transformers.AutoModel
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    tokens = torch.arange(_BATCH * _TOKENS).reshape(_BATCH, _TOKENS) + 5
    arguments = (tokens, torch.ones_like(tokens), torch.zeros_like(tokens))[: len(names)]
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    path = directory / "onnx" / "model.onnx"
    path.parent.mkdir()
    with quietly():
        model = auto.from_pretrained(directory, dtype=torch.float32).eval()
        _export(Encoder(model, outputs), arguments, path, style, names, list(outputs), axes)
    return path


def export(family: str, style: str, folder: Path, **changes: object) -> Path:
    """The `.onnx` file of a tiny decoder in a folder with its config and tokenizer; `changes` as for `make_tiny`."""
    directory = make_tiny(family, folder / "hf", **changes)
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        path = folder / "hf" / "model.onnx"
        export_decoder(model, style, path)
    return path


def export_decoder(model: Any, style: str, path: Path) -> None:
    """Write a decoder in a style."""
    tokens = torch.arange(_BATCH * _TOKENS).reshape(_BATCH, _TOKENS) + 5
    if style in ("dynamo", "script"):
        arguments = (tokens, torch.ones_like(tokens))
        axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
        _export(NoCache(model), arguments, path, style, ["input_ids", "attention_mask"], ["logits"], axes)
        return
    with torch.no_grad():
        cache = model(tokens.repeat(1, 2)[:, :_PAST], use_cache=True).past_key_values
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    flat = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if style == "dynamo-cache":
        growing = [{0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for _ in cache.layers]
        with torch.no_grad():
            torch.onnx.export(
                NestedCache(model), (), path, dynamo=True, verbose=False,
                kwargs={
                    "input_ids": tokens, "attention_mask": mask,
                    "past_key_values": {"key_cache": flat[::2], "value_cache": flat[1::2]},
                },
                dynamic_shapes={
                    "input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"},
                    "past_key_values": {"key_cache": growing, "value_cache": growing},
                },
            )  # fmt: skip
        return
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1)
    past = [f"past_key_values.{i}.{kind}" for i in range(len(cache.layers)) for kind in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        **{name: {0: "batch_size", 2: "past_sequence_length"} for name in past},
    }
    names = ["input_ids", "attention_mask", "position_ids", *past]
    kind = "script" if style == "optimum" else "dynamo"
    _export(FlatCache(model), (tokens, mask, positions, *flat), path, kind, names, ["logits", *present], axes)


def _export(
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
    path: Path,
    style: str,
    inputs: list[str],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
) -> None:
    named = {"input_names": inputs, "output_names": outputs}
    with torch.no_grad():
        if style == "script":
            torch.onnx.export(module, arguments, path, dynamo=False, dynamic_axes=axes, opset_version=17, **named)
            return
        shapes = [axes[name] for name in inputs]
        if len(inputs) > 3:  # the flat cache is one argument, of varying length
            shapes = [*shapes[:3], tuple(shapes[3:])]
        torch.onnx.export(module, arguments, path, dynamo=True, verbose=False, dynamic_shapes=tuple(shapes), **named)
