"""Tiny models on disk, made once a session, and what transformers computes with them."""

from __future__ import annotations

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
import transformers
from tiny_models import make_tiny

from llmc.compiler.ir.evaluate import evaluate
from llmc.frontends.hf.lift import lift
from llmc.frontends.lifted import Lifted

Array = np.ndarray
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
_root = Path(mkdtemp(prefix="llmc-tiny-"))
atexit.register(shutil.rmtree, _root, ignore_errors=True)


@cache
def tiny(family: str) -> Path:
    """The directory of a family's tiny model."""
    return make_tiny(family, _root / family)


@cache
def lifted_tiny(family: str) -> Lifted:
    """A family's tiny model, lifted."""
    return lift(tiny(family))


def load_reference(directory: Path) -> torch.nn.Module:
    """The model as transformers loads it, in f32."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model


def random_ids(vocabulary: int, size: int, seed: int = 0) -> Array:
    """[1, size] token ids."""
    return np.random.default_rng([seed, size]).integers(0, vocabulary, (1, size)).astype(np.int32)


def reference_logits(model: torch.nn.Module, ids: Array, positions: Array | None = None) -> Array:
    """[1, S, vocab] from transformers."""
    more = {} if positions is None else {"position_ids": torch.from_numpy(positions).long()}
    with torch.no_grad():
        logits: Array = model(input_ids=torch.from_numpy(ids).long(), use_cache=False, **more).logits.float().numpy()
    return logits


def lifted_logits(lifted: Lifted, ids: Array, positions: Array | None = None) -> Array:
    """[1, S, vocab] from the lifted graph's numpy meaning."""
    if positions is None:
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    found = evaluate(lifted.graph, {"ids": ids, "positions": positions}, lifted.weights.load)["logits"]
    assert isinstance(found, np.ndarray)
    return found
