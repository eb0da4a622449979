"""The reference of `llmc eval --reference`: the original model in transformers, f32, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.errors import FrontendError, LlmcError

if TYPE_CHECKING:
    from llmc.runtime.perplexity import Reference


def transformers_reference(directory: Path) -> Reference:
    """A function from token ids [n] to float32 logits [n, vocab]. Runs no code of the model's own."""
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

    def logits(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            result = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float()
        array: NDArray[np.float32] = result.numpy()
        return array

    return logits
