"""The tensor functions of `ops_onnx`, as torch runs and exports them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_TYPES = {"f32": torch.float32, "i64": torch.int64, "i32": torch.int32, "bool": torch.bool}


class TorchOps:
    """size: tokens. keep: a weight or stored array by its name: (name, shape, array or None, scale) -> tensor."""

    style = "torch"

    def __init__(
        self, device: torch.device, size: int, keep: Callable[[str, tuple[int, ...], np.ndarray | None, float], Tensor]
    ) -> None:
        self.device = device
        self.size = size
        self.keep = keep

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> Tensor:
        return self.keep(name, shape, None, scale)

    def table(self, name: str, array: np.ndarray) -> Tensor:
        return self.keep(name, array.shape, array, 1.0)

    def const(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array.tolist(), device=self.device, dtype=_TYPES[_named(array.dtype)])

    def as_value(self, value: object, dtype: str) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((), value, dtype=_TYPES[dtype], device=self.device)  # type: ignore[call-overload, no-any-return]

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(_TYPES[dtype])

    def f(self, x: Tensor) -> Tensor:
        return x.float()

    def eq(self, a: Tensor, b: object) -> Tensor:
        return a == b

    def where(self, condition: Tensor, a: object, b: object) -> Tensor:
        return torch.where(condition, a, b)  # type: ignore[call-overload, no-any-return]

    def power(self, x: object, y: object) -> Tensor:
        return torch.pow(x, y)  # type: ignore[call-overload, no-any-return]

    def maximum(self, x: Tensor, y: object) -> Tensor:
        return torch.maximum(x, y) if isinstance(y, Tensor) else x.clamp(min=y)  # type: ignore[call-overload]

    def minimum(self, x: Tensor, y: object) -> Tensor:
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)  # type: ignore[call-overload]

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    def softmax(self, x: Tensor, axis: int = -1) -> Tensor:
        return torch.softmax(x, axis)

    def log_softmax(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1)

    def softplus(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x)

    def transpose(self, x: Tensor, *permutation: int) -> Tensor:
        return x.permute(permutation)

    def reshape(self, x: Tensor, *sizes: int) -> Tensor:
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])

    def concat(self, values: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat(list(values), axis)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int = -1) -> list[Tensor]:
        return list(torch.split(x, list(sizes), axis))

    def slice(self, x: Tensor, start: int, stop: int | None, axis: int, step: int = 1) -> Tensor:
        axis = axis % x.dim()
        return x[(slice(None),) * axis + (slice(start, stop, step),)]

    def top(self, x: Tensor, length: Tensor, axis: int) -> Tensor:
        return self.slice(x, 0, self.size, axis)

    def rows(self, table: Tensor, index: Tensor) -> Tensor:
        return table[index]

    def take(self, x: Tensor, indices: Sequence[int], axis: int) -> Tensor:
        return x.index_select(axis, torch.tensor(list(indices), device=self.device))

    def reduce(self, op: str, x: Tensor, axis: int, keep: bool = True) -> Tensor:
        if op == "Max":
            return x.amax(axis, keepdim=keep)
        return x.sum(axis, keepdim=keep) if op == "Sum" else x.mean(axis, keepdim=keep)

    def triangle(self, length: Tensor, upper: bool = False, diagonal: int = 0) -> Tensor:
        ones = torch.ones(self.size, self.size, device=self.device)
        return (torch.triu(ones, diagonal) if upper else torch.tril(ones, diagonal)).bool()

    def is_nan(self, x: Tensor) -> Tensor:
        return torch.isnan(x)

    def bitand(self, x: Tensor, y: Tensor) -> Tensor:
        return x & y

    def shifted(self, x: Tensor, by: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, by, 0))[:, : x.shape[1]]

    def flipped(self, x: Tensor, axis: int) -> Tensor:
        return x.flip(axis)

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        """Functions that torch has by the same name and in the same form: exp, log, sqrt, matmul, ..."""
        return getattr(torch, name)  # type: ignore[no-any-return]


def _named(dtype: np.dtype) -> str:
    return {"f": "f32", "i": "i64", "b": "bool"}[dtype.kind]
