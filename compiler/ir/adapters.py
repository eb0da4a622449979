"""llm-level ops of adapters that are loaded at run time (LoRA: Hu et al. 2021, arXiv 2106.09685).

Each token of a step has the number of its adapter, 0 for none. What an adapter adds to a linear op lies in tables, with
one entry for each number: the caller fills them between steps. Entry 0 stays empty. As the slots of a cache, numbers
are looked at before a step runs (`runtime/csrc/step_check.h`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from llmc.compiler.ir.elementwise import Activation, Add, Cast, Less, Mul, constant
from llmc.compiler.ir.op import Op, Tokens, Value
from llmc.compiler.ir.shapes import require
from llmc.compiler.ir.structural import Concat, Gather, Matmul, Reshape, Slice, split_exact
from llmc.compiler.ir.types import Array, Tensor, numpy_dtype


class LowRank(Op, name="llm.low_rank"):
    """y [T, n] plus, for each token t with adapter s = adapters[t] and each part p of the columns, B A x of that part:

        y[t, columns of p] += (x[t] @ a[s, p, :r].T) @ b[s, :r, columns of p]    with r = ranks[s, p]

    x [T, k], adapters [T], a [entries, parts, rank, k], b [entries, rank, n], ranks i32 [entries, parts]. Part p has
    the columns from columns[p - 1] (0 for the first) to columns[p]. The scale is in b. What a and b hold from r on, and
    of entries whose ranks are 0, changes nothing.
    """

    tokens = Tokens.FIRST
    in_place = "y"

    y: Value
    x: Value
    adapters: Value
    a: Value
    b: Value
    ranks: Value
    columns: tuple[int, ...]

    def infer(self) -> Tensor:
        require(self.y.rank == 2 and self.x.rank == 2, "needs y [T, n] and x [T, k]")
        require(self.y.shape[0] == self.x.shape[0] == self.adapters.shape[0], "y, x and adapters have different rows")
        require(self.adapters.dtype == "i32" and self.adapters.rank == 1, "adapters are i32 [T]")
        require(self.ranks.dtype == "i32", "ranks are i32")
        require(self.a.rank == 4 and self.b.rank == 3, "needs a [entries, parts, rank, k] and b [entries, rank, n]")
        entries, parts, rank, k = self.a.shape
        require(self.ranks.shape == (entries, parts), f"ranks of {self.ranks.shape} for a of {self.a.shape}")
        require(self.b.shape == (entries, rank, self.y.shape[1]), f"b of {self.b.shape}, results {self.y.shape}")
        require(k == self.x.shape[1], f"a of {self.a.shape}, activations {self.x.shape}")
        ends = (0, *self.columns)
        rising = all(low < high for low, high in itertools.pairwise(ends))
        require(
            rising and len(self.columns) == parts and ends[-1] == self.y.shape[1], f"{parts} parts end at {ends[1:]}"
        )
        return self.y.tensor

    def spans(self) -> Iterator[tuple[int, int]]:
        """The columns of each part: first, and behind the last."""
        return itertools.pairwise((0, *self.columns))

    def evaluate(self, y: Array, x: Array, adapters: Array, a: Array, b: Array, ranks: Array) -> Array:
        wide = numpy_dtype("f32")
        out = y.astype(wide)
        for t, s in enumerate(adapters.tolist()):
            for p, (low, high) in enumerate(self.spans()):
                r = int(ranks[s, p])
                if r > 0:
                    inner = a[s, p, :r].astype(wide) @ x[t].astype(wide)
                    out[t, low:high] += inner @ b[s, :r, low:high].astype(wide)
        return out.astype(y.dtype)

    def decompose(self) -> Value:
        rows, rank = self.x.shape[0], self.a.shape[2]
        number = constant(np.arange(int(rank)), "i32")  # type: ignore[arg-type]  # tables have fixed sizes
        ranks = Gather(self.ranks, self.adapters, 0)  # [T, parts]
        a, b = Gather(self.a, self.adapters, 0), Gather(self.b, self.adapters, 0)
        x = Reshape(self.x, (rows, self.x.shape[1], 1))
        sums: list[Value] = []
        for p, (low, high) in enumerate(self.spans()):
            factor = Reshape(Slice(a, 1, p, p + 1), (rows, rank, self.x.shape[1]))
            inner = Reshape(Matmul(factor, x), (rows, rank))
            used = Cast(Less(number, Slice(ranks, 1, p, p + 1)), "f32")
            inner = Reshape(Mul(inner, used), (rows, 1, rank))
            sums.append(Reshape(Matmul(inner, Slice(b, 2, low, high)), (rows, high - low)))
        return Add(self.y, sums[0] if len(sums) == 1 else Concat(tuple(sums), 1))


class Activated(Op, name="llm.activated"):
    """activation(y) + residual, or with `gated` activation(y[:, :F]) * y[:, F:] + residual: what stands behind the sums
    of a linear op that an adapter adds to."""

    tokens = Tokens.ROWS

    y: Value
    residual: Value | None = None
    activation: str = "silu"
    gated: bool = False

    def infer(self) -> Tensor:
        width = split_exact(self.y.shape[-1], 2) if self.gated else self.y.shape[-1]
        shape = (*self.y.shape[:-1], width)
        if self.residual is not None:
            require(self.residual.shape == shape, f"residual of {self.residual.shape}, result {shape}")
        return Tensor(shape, self.y.dtype)

    def evaluate(self, y: Array, residual: Array | None) -> Array:
        from llmc.compiler.ir.elementwise import ACTIVATIONS

        wide = y.astype(numpy_dtype("f32"))
        gate, up = np.split(wide, 2, axis=-1) if self.gated else (wide, None)
        found = ACTIVATIONS[self.activation](gate)
        found = found if up is None else found * up
        return np.asarray(found if residual is None else found + residual.astype(found.dtype), y.dtype)

    def decompose(self) -> Value:
        last, width = self.y.rank - 1, self.shape[-1]
        found: Value
        if self.gated:
            up = Slice(self.y, last, width, width * 2)
            found = Mul(Activation(Slice(self.y, last, 0, width), self.activation), up)
        else:
            found = Activation(self.y, self.activation)
        return found if self.residual is None else Add(found, self.residual)
