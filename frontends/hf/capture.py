"""Each attention of a model kept as one op, through transformers' own interfaces.

A model that calls the attention interface gives one `llmc.attention` a call. Its mask arrives as an `llmc.mask` op that
says what the mask means (causal or not, and perhaps a window), found by evaluating the model's own mask function on a
grid of positions. An attention with a mask of any other meaning, or with an argument that has no place in the op, is
not captured: the caller exports the model's own attention instead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "llmc"
UNKNOWN = -1  # the window of a mask that has no name here
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
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """q [1, heads, S, dim], k and v [1, kv_heads, S, dim] -> [1, S, heads, dim]. Exported only."""
    raise RuntimeError("llmc::attention is exported, never run")


@attention.register_fake
def _(q, k, v, mask, sinks, scale, causal, window, softcap):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("llmc::mask", mutates_args=())
def attention_mask(like: torch.Tensor, queries: int, keys: int, causal: bool, window: int) -> torch.Tensor:
    """What a mask means: `causal`, and only keys less than `window` away if not 0. Exported only."""
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
    if softcap == 0:  # the op has no cap then, and the model divides by it
        raise Refused("attention's scores are capped at 0")
    causal = others.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    captured = torch.ops.llmc.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        float(scale),
        bool(causal),
        sliding_window or 0,
        float(softcap or 0.0),
    )
    return captured, None


def meaning_of(mask_function: Callable[..., Any]) -> tuple[bool, int]:
    """(causal, window) of a transformers mask function, from its values; `Refused` when it is of another kind.

    A window reaches back only where causal, and to both sides where not: |query - key| < window. It is the first query
    that no longer sees key 0, by bisection; the claim is then checked on a grid of positions around 0, the powers of
    two and the window's first multiples, where other masks (chunks, blocks) differ.
    """

    def seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.long)
        found = torch.as_tensor(mask_function(zero, zero, queries[:, None], keys[None, :]))
        return found.broadcast_to(len(queries), len(keys))

    with _disable_current_modes():
        try:
            first = torch.zeros(1, dtype=torch.long)
            window = bisect_left(range(_FURTHEST + 1), True, key=lambda query: not seen(torch.tensor([query]), first))
            window = 0 if window > _FURTHEST else window
            centres = [0, *(1 << i for i in range(3, 24)), *(window * i for i in (1, 2, 3))]
            points = torch.tensor(sorted({c + d for c in centres for d in range(-4, 20) if c + d >= 0}))
            found = seen(points, points)
        except Exception as error:
            raise Refused(f"the mask depends on more than positions ({type(error).__name__})") from error
        distance = points[:, None] - points[None, :]
        near = (distance.abs() < window) if window else torch.ones_like(found)
        for causal in (True, False):
            if torch.equal(found, near & (distance >= 0) if causal else near):
                return causal, window
        raise Refused("the mask is neither of all tokens nor of those before, in a window or not")


def _captured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
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
