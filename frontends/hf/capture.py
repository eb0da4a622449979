"""torch.export of a decoder with each attention kept as one op, through transformers' own interfaces.

A model that calls the attention interface gives one `llmc.attention` a call. Its mask arrives as an `llmc.mask` op that
says what the mask means (causal, and perhaps a window), found by evaluating the model's own mask function on a grid of
positions. An attention with a mask of any other meaning, or with an argument that has no place in the op, is not
captured: the caller exports the model's own attention instead.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "llmc"
UNKNOWN = -1  # the window of a mask that is neither causal nor a causal window
_FURTHEST = 1 << 24  # a window beyond this is no window
# Arguments that transformers' own plain attention ignores as well.
_IGNORED = frozenset(
    (
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_causal",
        "past_key_values",
        "past_key_value",
        "layer_idx",
        "logits_to_keep",
        "position_embeddings",
    )
)


class Refused(Exception):
    """An attention that the captured op cannot express; the message says which part."""


@torch.library.custom_op("llmc::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    layer: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """q [1, heads, S, dim], k and v [1, kv_heads, S, dim] -> [1, S, heads, dim]. Exported only."""
    raise RuntimeError("llmc::attention is exported, never run")


@attention.register_fake
def _(q, k, v, mask, sinks, layer, scale, causal, window, softcap):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("llmc::mask", mutates_args=())
def attention_mask(like: torch.Tensor, queries: int, keys: int, causal: bool, window: int) -> torch.Tensor:
    """What a mask means: `causal`, and only the last `window` keys if not 0. Exported only."""
    raise RuntimeError("llmc::mask is exported, never run")


@attention_mask.register_fake
def _(like, queries, keys, causal, window):  # type: ignore[no-untyped-def]
    return like.new_empty((1, 1, queries, keys), dtype=torch.bool)


def _captured(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls once a layer."""
    for name, argument in others.items():
        if name not in _IGNORED and isinstance(argument, torch.Tensor):
            raise Refused(f"attention takes a tensor argument {name!r}")
    if isinstance(sliding_window, torch.Tensor) or isinstance(scaling, torch.Tensor):
        raise Refused("attention's scale or window is computed by the model")
    causal = others.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    captured = torch.ops.llmc.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        -1 if layer is None else layer,
        float(scale),
        bool(causal),
        sliding_window or 0,
        float(softcap or 0.0),
    )
    return captured, None


def meaning_of(mask_function: Callable[..., Any]) -> tuple[bool, int]:
    """(causal, window) of a transformers mask function, from its values; `Refused` when it is neither.

    The window is the first query that no longer sees key 0, by bisection; the claim is then checked on a grid of
    positions around 0, the powers of two and the window's first multiples, where other masks (chunks, blocks) differ.
    """

    def seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.long)
        found = torch.as_tensor(mask_function(zero, zero, queries[:, None], keys[None, :]))
        return found.broadcast_to(len(queries), len(keys))

    with _disable_current_modes():
        try:
            everything = seen(torch.arange(16), torch.arange(16))
            low, high = 0, _FURTHEST  # key 0 is seen from `low`, and not from `high`
            first = torch.zeros(1, dtype=torch.long)
            if bool(seen(torch.tensor([high]), first).all()):
                low = high
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if bool(seen(torch.tensor([middle]), first).all()) else (low, middle)
            window = 0 if low == _FURTHEST else high
            centres = [0, *(1 << i for i in range(3, 24)), *(window * i for i in (1, 2, 3))]
            points = torch.tensor(sorted({c + d for c in centres for d in range(-4, 20) if c + d >= 0}))
            found = seen(points, points)
        except Exception as error:
            raise Refused(f"the mask depends on more than positions ({type(error).__name__})") from error
        if bool(everything.all()) and bool(found.all()):
            return False, 0
        expected = points[None, :] <= points[:, None]
        if window:
            expected = expected & (points[None, :] > points[:, None] - window)
        if not torch.equal(found, expected):
            raise Refused("the mask is neither causal nor a causal window")
        return True, window


def _captured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "meta",
    **_: object,
) -> torch.Tensor:
    """The mask function that transformers calls: it states the mask's meaning as an op."""
    try:
        causal, window = meaning_of(mask_function)
    except Refused:
        # Models make masks of every kind that they know, also those that no layer uses.
        causal, window = False, UNKNOWN
    like = torch.empty((), device=device)
    mask: torch.Tensor = torch.ops.llmc.mask(like, q_length, kv_length, causal, window)
    return mask


AttentionInterface.register(IMPLEMENTATION, _captured)
AttentionMaskInterface.register(IMPLEMENTATION, _captured_mask)


class _Logits(torch.nn.Module):
    """A causal language model as a function of ids and positions."""

    def __init__(self, model: torch.nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        arguments = {"position_ids": positions} if self.takes_positions else {}
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True, **arguments).logits
        return logits


class _TracedNumbers(TorchFunctionMode):
    """Tensors that the model makes from Python numbers lose them on the meta device; `torch.full` keeps them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and args:
            return _traced(args[0], kwargs) if _is_numbers(args[0]) else function(*args, **kwargs)
        if function is torch.Tensor.__getitem__:
            return function(args[0], _without_lists(args[1], args[0].device))
        return function(*args, **kwargs)


def _is_numbers(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 4096 and all(_is_numbers(item) for item in value)
    return isinstance(value, (bool, int, float))


def _without_lists(index: Any, device: torch.device) -> Any:
    """An index with its lists of numbers as traced tensors, or as a slice where one list holds one number."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list) and part and _is_numbers(part)]
    if not lists:
        return index
    if len(lists) == 1 and len(lists[0]) == 1 and not any(isinstance(part, torch.Tensor) for part in parts):
        at = lists[0][0]
        return tuple(slice(at, at + 1 or None) if part is lists[0] else part for part in parts)
    return tuple(_traced(part, {"device": device}) if isinstance(part, list) else part for part in parts)


def _traced(value: object, options: dict[str, object]) -> torch.Tensor:
    if isinstance(value, (list, tuple)) and value:
        return torch.stack([_traced(item, options) for item in value])
    if isinstance(value, (list, tuple)):
        return torch.empty(0, **options)  # type: ignore[call-overload, no-any-return]
    inferred = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
    dtype = options.get("dtype") or inferred
    return torch.full((), value, dtype=dtype, device=options.get("device") or "cpu")  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No warnings and no log lines from torch and transformers: what matters becomes an error or a note of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(model: torch.nn.Module, takes_positions: bool, longest: int) -> tuple[torch.export.ExportedProgram, int]:
    """Trace `model` (on the meta device) for 2..longest tokens of one sequence, in one piece from position 0.

    Returns the longest length that the trace holds for: one less where a model with a table of exactly `longest`
    positions treats a full table differently.
    """
    try:
        return _export(model, takes_positions, longest), longest
    except torch._dynamo.exc.UserError as error:
        if longest < 4 or f"!= {longest}" not in str(error):
            raise
        return _export(model, takes_positions, longest - 1), longest - 1


def _export(model: torch.nn.Module, takes_positions: bool, longest: int) -> torch.export.ExportedProgram:
    size = min(7, longest)
    ids = torch.zeros(1, size, dtype=torch.long, device="meta")
    positions = torch.arange(size, device="meta")[None]
    tokens = torch.export.Dim("S", min=2, max=longest)
    # Positions that restart would mean several sequences packed into one row; ours hold one.
    one_sequence = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    # Stack traces take a third of the time, and nobody reads them.
    untraced = mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True)
    with quietly(), torch.no_grad(), one_sequence, untraced, _TracedNumbers():
        return torch.export.export(
            _Logits(model, takes_positions).eval(),
            (ids, positions),
            dynamic_shapes={"ids": {1: tokens}, "positions": {1: tokens}},
            strict=False,
        )
