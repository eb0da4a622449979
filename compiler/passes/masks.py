"""The masks that `llm.attention` can express, and the check that a mask given in numbers is one of them.

Adding one number to all of a query's scores changes nothing, so that biases count relative to what a query adds to the
key at its own place: that key must be seen. `HIDDEN` says when a key is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HIDDEN = -5e3
"""A key whose bias is this far below that of a key which the same query sees is hidden.

Sources write -1e4, the least float or -inf. In f32, exp(x) is 0 below x = -104: a key with this bias has no weight
unless the products of one query, scaled, lie more than 4,896 apart: beyond that its softmax picks one key in any case.
"""
FURTHEST_SHIFT = 1e6  # of all scores of a query: beside a greater number f32 would lose the scores
_ROUNDING = 2.0**-21  # of a source's own f32 arithmetic: four products or sums, relative to the greatest number

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


class Unrecognised(Exception):
    """Scores that `llm.attention` cannot express; the text says which, with the first example."""


@dataclass(frozen=True)
class Mask:
    """A mask [heads, queries, keys]: a query at p sees keys up to p (causal), the last `window` of them (0: all).

    Not causal: it sees all keys, or those less than `window` away on both sides.

    `slopes` [heads] add slope * key position (ALiBi, Press et al. 2022), up to a constant a row, which softmax ignores.
    """

    causal: bool
    window: int
    slopes: tuple[float, ...] | None

    def shows(self, distances: Places) -> NDArray[np.bool_]:
        """Whether keys at these distances (key - query) are seen."""
        seen = np.ones(distances.shape, bool)
        if self.causal:
            seen &= distances <= 0
        if self.window:
            seen &= np.abs(distances) < self.window
        return seen


NO_MASK = Mask(False, 0, None)


@dataclass(frozen=True)
class Scores:
    """softcap * tanh(scale * raw / softcap) + mask; softcap 0 means scale * raw."""

    scale: float
    softcap: float
    mask: Mask


@dataclass(frozen=True)
class ByDistance:
    """A bias at every distance that occurs: `distances` [D] of a key from its query, with 0 among them.

    own: [heads, D] in the source's own dtypes. exact: the same in f64, from which slopes are read.
    """

    distances: Places
    own: Floats
    exact: Floats

    def __post_init__(self) -> None:
        if np.isnan(self.own).any() or np.isnan(self.exact).any():
            raise Unrecognised("its mask makes scores that are not a number")
        if np.isposinf(self.own).any():
            raise Unrecognised("its mask makes scores infinite")

    @property
    def zero(self) -> int:
        """Where the distance 0 is."""
        return int(np.flatnonzero(self.distances == 0)[0])

    @property
    def relative(self) -> Floats:
        """`own` less what each head adds at distance 0; Unrecognised where a query does not see its own place."""
        return _relative(self.own, self.own[:, self.zero])

    @property
    def is_causal(self) -> bool:
        """Whether every key after its query is hidden; where there is none, whether any key is."""
        hidden = self.relative <= HIDDEN
        ahead = hidden[:, self.distances > 0]
        return bool(ahead.all()) if ahead.size else bool(hidden.any())


def _relative(bias: Floats, own: Floats) -> Floats:
    """A bias [heads, ...] less what is added to the key at the query's place, [heads, ...] without the last axis."""
    if not (own > HIDDEN).all():
        raise Unrecognised("the mask hides from a query the key at its own place")
    if not (own <= FURTHEST_SHIFT).all():
        raise Unrecognised(f"the mask adds {own.max():g} to scores, which f32 loses beside such a number")
    return bias - own[..., None]


def mask_of(bias: ByDistance, exact_shift: bool = False) -> Mask:
    """The mask that says at every distance what the bias says; Unrecognised with the first difference.

    exact_shift: a constant a row counts as well (attention with sinks).
    """
    relative = bias.relative
    if exact_shift and np.abs(bias.own[:, bias.zero]).max() > _ROUNDING:
        raise Unrecognised("its mask adds a number to all keys of a query, which counts beside sinks")
    causal = bias.is_causal
    side = bias.distances <= 0 if causal else np.ones(bias.distances.shape, bool)
    slopes = _slopes(bias, relative, side)
    hidden = (relative <= HIDDEN).any(axis=0) & side
    nearest = int(np.abs(bias.distances[hidden]).min()) if hidden.any() else 0
    windows = dict.fromkeys((0, nearest))
    masks = [Mask(causal, window, slopes) for window in windows]
    for mask in masks:
        if not _differs(mask, relative, bias.distances).any():
            return mask
    _require_alike(relative > HIDDEN, bias.distances)
    _refuse(masks[-1], relative, bias.distances)
    raise AssertionError


def _require_alike(seen: NDArray[np.bool_], distances: Places) -> None:
    """Unrecognised where heads see different keys."""
    unlike = np.argwhere(seen != seen[:1])
    if len(unlike):
        head, place = unlike[0].tolist()
        raise Unrecognised(f"head {head} and head 0 differ in whether a query sees the key {_away(distances[place])}")


def _away(distance: int) -> str:
    return f"{abs(int(distance))} {'after' if distance > 0 else 'before'} it"


def _slopes(bias: ByDistance, relative: Floats, side: NDArray[np.bool_]) -> tuple[float, ...] | None:
    """What each head adds per position, from the furthest key that it sees; None where nothing is added."""
    found = []
    for own, exact in zip(relative, bias.exact - bias.exact[:, bias.zero, None], strict=True):
        seen = np.flatnonzero(side & (own > HIDDEN) & (bias.distances != 0))
        if not seen.size:
            found.append(0.0)
            continue
        furthest = seen[np.abs(bias.distances[seen]).argmax()]
        found.append(_snapped(float(exact[furthest] / bias.distances[furthest])))
    return tuple(found) if any(found) else None


def _differs(mask: Mask, relative: Floats, distances: Places) -> NDArray[np.bool_]:
    """Where a relative bias [heads, ...] at distances [...] is not the mask; hidden keys may be so by any number."""
    slopes = np.asarray(mask.slopes or (0.0,)).reshape(-1, *(1,) * distances.ndim)
    said = np.where(mask.shows(distances), slopes * distances, -np.inf)
    limit = _ROUNDING * np.abs(slopes) * int(np.abs(distances).max())
    with np.errstate(invalid="ignore"):
        equal = np.abs(said - relative) <= limit
    both_hidden = (said <= HIDDEN) & (relative <= HIDDEN)
    return np.asarray(~(equal | both_hidden))


def _refuse(mask: Mask, relative: Floats, distances: Places, queries: Places | None = None) -> None:
    """Unrecognised with the first place where a relative bias [heads, ...] at distances [...] is not the mask.

    queries: the places of an axis of queries, if there is one.
    """
    wrong = np.argwhere(_differs(mask, relative, distances))
    if not len(wrong):
        return
    place = tuple(wrong[0].tolist())
    head, distance = place[0], int(distances[place[1:]])
    if queries is None:
        pair = f"a query and the key {_away(distance)}"
        seen_pair = f"a query {{}} the key {_away(distance)}"
    else:
        query = int(queries[place[1]])
        pair = f"the query at {query} and the key at {query + distance}"
        seen_pair = f"the query at {query} {{}} the key at {query + distance}"
    seen = bool(relative[place] > HIDDEN)
    if seen and mask.shows(np.asarray([distance]))[0]:
        raise Unrecognised(f"head {head} adds {relative[place]:.6g} for {pair}, which is no slope times a distance")
    kind = "not causal" if mask.causal else "neither causal nor a window on both sides"
    kind += f" with a window of {mask.window}" if mask.window and mask.causal else ""
    raise Unrecognised(f"the mask is {kind}: {seen_pair.format('sees' if seen else 'does not see')}")


def require_mask(mask: Mask, bias: Floats, queries: Places, keys: Places, exact_shift: bool = False) -> None:
    """Unrecognised unless an additive mask [heads, Q, K] at places [Q] and [K] is `mask`, all of it.

    The keys are at 0, 1, ..., and each query stands at one of them.
    """
    if np.isnan(bias).any():
        raise Unrecognised("its mask makes scores that are not a number")
    own = np.take_along_axis(bias, np.broadcast_to(queries[None, :, None], (len(bias), len(queries), 1)), axis=2)
    if exact_shift and np.abs(own).max() > _ROUNDING:
        raise Unrecognised("its mask adds a number to all keys of a query, which counts beside sinks")
    relative = _relative(bias, own[..., 0])
    _refuse(mask, relative, keys[None, :] - queries[:, None], queries)


def describe_mask(bias: Floats, queries: Places, exact_shift: bool = False) -> Mask:
    """What an additive mask [heads, Q, K] means; Unrecognised with the first difference.

    The keys are at 0, 1, ..., the queries at consecutive places up to that of the last key.
    """
    keys = np.arange(bias.shape[2])
    # The last query sees every distance up to 0, the first one the others.
    distances = np.concatenate([keys - queries[-1], keys[queries[0] + 1 :] - queries[0]])
    values = np.concatenate([bias[:, -1], bias[:, 0, queries[0] + 1 :]], axis=1)
    mask = mask_of(ByDistance(distances, values, values), exact_shift)
    require_mask(mask, bias, queries, keys, exact_shift)
    return mask


def _snapped(value: float) -> float:
    """The f32 number that `value` is but for rounding, or `value`."""
    near = float(np.float32(value))
    return near if abs(near - value) <= 1e-12 * abs(value) else value
