"""The reference of `llmc eval --reference`: the original model in transformers, f32, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.errors import FrontendError, LlmcError


class TransformersReference:
    """The original: called with token ids [n], it gives float32 logits [n, vocab]."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            result = self._model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float()
        array: NDArray[np.float32] = result.numpy()
        return array

    def write(self, start: int, texts: int, length: int, seed: int = 0) -> list[NDArray[np.int32]]:
        """Texts of `length` ids that begin with `start` and are drawn from what the model predicts."""
        import torch

        found = torch.full((texts, length), start)
        generator = torch.Generator().manual_seed(seed)
        past = None
        with torch.inference_mode():
            for at in range(1, length):
                out = self._model(found[:, at - 1 : at], past_key_values=past, use_cache=True)
                past = out.past_key_values
                chances = torch.softmax(out.logits[:, -1].double(), dim=-1)
                found[:, at] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return list(found.numpy().astype(np.int32))


def transformers_reference(directory: Path) -> TransformersReference:
    """The model in a directory. Runs no code of the model's own."""
    if not directory.is_dir():
        raise FrontendError(f"--reference {directory}: no such directory")
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise LlmcError(f"--reference needs {error.name}: pip install 'llmc[compile]'") from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
        model.eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises many kinds
        raise FrontendError(f"--reference {directory} cannot be loaded: {type(error).__name__}: {error}") from error
    return TransformersReference(model)
