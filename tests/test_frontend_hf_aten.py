"""Each aten op means in our graph what it means in torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmc.compiler.ir.evaluate import evaluate
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.errors import FrontendError
from llmc.frontends.hf import graph  # noqa: F401  (registers the handlers)
from llmc.frontends.hf.aten import Translation, dtype_name
from llmc.frontends.hf.capture import Refused, meaning_of
from llmc.frontends.hf.export import quietly

Function = Callable[..., torch.Tensor]


class Wrapped(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


def translated(function: Function, *tensors: torch.Tensor) -> np.ndarray:
    """The function's value by way of torch.export, our graph and numpy."""
    with quietly():
        program = torch.export.export(Wrapped(function), tensors, strict=False).run_decompositions({})
    holes = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = tuple(
        Input(f"x{i}", Tensor(tuple(tensor.shape), dtype_name(tensor.dtype))) for i, tensor in enumerate(tensors)
    )
    (value,) = Translation({}).run(program.graph_module, dict(zip(holes, inputs, strict=True)))
    data = {value.name: tensor.numpy() for value, tensor in zip(inputs, tensors, strict=True)}
    found = evaluate(Graph("op", inputs, (("y", value),)), data, lambda name: np.zeros(0))["y"]
    assert isinstance(found, np.ndarray)
    return found


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, high: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


X, Y, N = floats(3, 7, 5), floats(3, 7, 5, seed=1), integers(3, 7, 5)
Q, K, V = floats(1, 6, 4, 8), floats(1, 2, 4, 8, seed=1), floats(1, 2, 4, 8, seed=2)

CASES: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=2.5), (X, Y)),
    "add an int": (lambda x: x + 1, (X,)),
    "integers plus a float": (lambda n: n + 0.5, (N,)),
    "integers plus floats": (lambda n, x: n + x, (N, X)),
    "a scalar tensor follows": (lambda x: x.bfloat16() * torch.ones(()), (X,)),
    "subtract from a number": (lambda x: 1 - x, (X,)),
    "divide integers": (lambda n: n / 2, (N,)),
    "floor division": (lambda n: n // 2, (N - 3,)),
    "floor division of floats": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), (X,)),
    "remainder": (lambda n: n % 3, (N - 3,)),
    "powers": (lambda x: x**2 + x**3 + x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + x.abs() ** 1.7, (X,)),
    "power of a number": (lambda x: torch.pow(10000.0, x), (X,)),
    "comparisons": (lambda x, y: (x < y) | (x > 0.5) & (x != y) | ~(x >= y), (X, Y)),
    "arithmetic with a factor": (
        lambda x, y: torch.rsub(x, y, alpha=2) + torch.sub(x, y, alpha=3) + torch.rsub(x, 2.0, alpha=0.5),
        (X, Y),
    ),
    "division towards zero": (lambda n: torch.div(n - 3, 2, rounding_mode="trunc"), (N,)),
    "extremes of two": (lambda x, y: torch.max(x, y) - torch.min(x, y) + torch.maximum(x, y) * x.max(), (X, Y)),
    "a scalar tensor follows when compared": (
        lambda x: (x.bfloat16() <= torch.full((), 0.1)) & (x >= torch.full((), 0.1).half()),
        (torch.full((3,), 0.1),),
    ),
    "compare integers with a float": (lambda n: n <= 1.5, (N,)),
    "logical": (lambda n: torch.logical_and(n, n > 1) ^ torch.logical_not(n), (N,)),
    "where with numbers": (lambda x: torch.where(x > 0, x, -1.0), (X,)),
    "masked fill": (lambda x: x.masked_fill(x > 0, float("-inf")).exp(), (X,)),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0) + x.clamp(max=0.1), (X,)),
    "activations": (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) + F.relu(x) + x.tanh(), (X,)),
    "log softmax": (lambda x: F.log_softmax(x * 60, 1) + F.log_softmax(x.half(), -1, dtype=torch.float32), (X,)),
    "softplus": (lambda x: F.softplus(x * 30) + F.softplus(x, beta=2.0), (X,)),
    "softplus with a threshold": (lambda x: F.softplus(x, 2.0, 1.5) + F.softplus(x, threshold=-1.0), (X,)),
    "expm1 and log1p": (lambda x: torch.expm1(x) + torch.log1p(x.abs()), (X,)),
    "softmax": (lambda x: F.softmax(x, dim=1), (X,)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b, 1e-3), (X, floats(5), floats(5, seed=3))),
    "layer norm without weights": (lambda x: F.layer_norm(x, (5,)), (X,)),
    "rms norm": (lambda x, w: F.rms_norm(x, (5,), w, 1e-3), (X, floats(5))),
    "rms norm of halves": (
        lambda x: F.rms_norm(x.bfloat16(), (5,)).float() + F.rms_norm(x.half(), (5,), eps=0.1),
        (X,),
    ),
    "reductions": (lambda x: x.mean(-1) + x.sum((0, 2))[None] + x.amax(2) + x.amin(-1), (X,)),
    "variance": (lambda x: x.var(-1) + x.var(-1, unbiased=False), (X,)),
    "reductions that keep their axes": (
        lambda x: (
            x.max(-1, keepdim=True)[1]
            + x.max(1, keepdim=True)[0]
            + x.argmax(-2, keepdim=True)
            + x.sum(-2, keepdim=True)
            + x.mean((0, -1), keepdim=True)
            + x.var((0, 2), keepdim=True, correction=2)
        ),
        (X,),
    ),
    "reductions of everything": (
        lambda x, n: x.sum() + x.mean() + x.amax() + x.any() + x.all() + x.var(correction=0) + n.sum() + n.any(),
        (X, N),
    ),
    "variance and mean": (lambda x: torch.var_mean(x, 1)[0] * torch.var_mean(x, 1, correction=0)[1], (X,)),
    "vector norms": (lambda x: torch.linalg.vector_norm(x, dim=(0, -1)) + x.norm(dim=1, keepdim=True).sum(), (X,)),
    "max with indices": (lambda x: x.max(1)[0] + x.max(1)[1] + x.argmax(1), (X,)),
    "any and all": (lambda x: (x > 1).any(1) ^ (x > -1).all(1), (X,)),
    "cumsum": (lambda n: n.cumsum(1), (N,)),
    "count of truths": (lambda x: (x > 0).sum(-1), (X,)),
    "topk": (lambda x: torch.cat([x.topk(3)[0], x.topk(3)[1].float()]), (X,)),
    "topk of the smallest": (lambda x: x.topk(2, 1, largest=False)[1] + x.topk(2, -2, largest=False)[0], (X,)),
    "topk beyond what is finite": (
        lambda x: torch.zeros_like(x).scatter(2, x.masked_fill(x < 1.0, float("-inf")).topk(5)[1], 1.0),
        (X,),
    ),
    "linear": (lambda x, w, b: F.linear(x, w, b), (X, floats(4, 5), floats(4))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2), (floats(4), floats(3, 5), floats(5, 4))),
    "addmm without the first": (
        lambda b, x, w: torch.addmm(b, x, w, beta=0) + torch.addmm(b, x, w, alpha=-0.5),
        (floats(4), floats(3, 5), floats(5, 4)),
    ),
    "vector times vector": (
        lambda a, b, w: a @ b + F.linear(a, w) + F.linear(a, w, b[:4]),
        (floats(5), floats(5, seed=1), floats(4, 5)),
    ),
    "einsum with letters in other orders": (
        lambda a, b: torch.einsum("qbd, kdb -> kqb", a, b),
        (floats(2, 3, 4), floats(5, 4, 3)),
    ),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b), (floats(3, 7, 2), X, floats(3, 5, 2))),
    "matrix times vector": (lambda x, v: x @ v, (X, floats(5))),
    "vector times matrix": (lambda v, x: v @ x, (floats(7), X)),
    "outer": (lambda a, b: torch.outer(a, b), (floats(3), floats(4))),
    "einsum": (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (floats(2, 3, 4, 5), floats(2, 3, 6, 5))),
    "einsum of a table": (lambda a, b: torch.einsum("i,j->ij", a, b), (floats(4), floats(3))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, q, q), (Q, K, V)),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3),
        (Q, K, V),
    ),
    "masked attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(4, 4).tril().bool(), enable_gqa=True),
        (Q, K, V),
    ),
    "causal attention of fewer queries": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :3], k, v, is_causal=True, enable_gqa=True),
        (Q, K, V),
    ),
    "causal attention of more queries": (
        lambda q, k, v: F.scaled_dot_product_attention(q, q[:, :, 1:], q[:, :, :3], is_causal=True),
        (Q, K, V),
    ),
    "biased attention": (lambda q, b: F.scaled_dot_product_attention(q, q, q, b), (Q, floats(4, 4))),
    "views": (lambda x: x.reshape(3, -1).unsqueeze(1).squeeze().unflatten(1, (5, 7)).flatten(0, 1), (X,)),
    "permutations": (lambda x: x.permute(2, 0, 1).transpose(-1, 0).swapaxes(0, 1), (X,)),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1), (X,)),
    "slices": (lambda x: x[1:, -3:, 1::2] + x[:2, :3, ::2][..., :2], (X,)),
    "select": (lambda x: x[-1] + x[:, 2:3].sum() + x.select(1, -2).sum(), (X,)),
    "slices that go beyond": (
        lambda x: x[:, -10:] + torch.cat([x[:, 9:], x[:, 5:99], x[:, -99:-2]], 1) + x.narrow(1, -7, 7),
        (X,),
    ),
    "slices with a step": (lambda x: x[:, 1:6:2] + x[:, -6:-1:2] + x[:, ::3] + x.narrow(1, 2, 3), (X,)),
    "pieces from behind": (
        lambda x: (
            torch.stack([*x.split(2, -1)[:2], *x.chunk(3, -1)[:2], *x.tensor_split(2, -1)[1:]], 1)
            + torch.stack(x.unbind(-3)[:2], 0).sum()
        ),
        (X,),
    ),
    "split and chunk": (lambda x: torch.cat([*x.split([2, 5], 1), *x.chunk(3, 2)][:2], 1), (X,)),
    "unbind and stack": (lambda x: torch.stack(x.unbind(1), -1), (X,)),
    "repeat": (lambda x: x.repeat(2, 1, 3), (X,)),
    "repeat to a higher rank": (lambda x: x.repeat(2, 1, 1, 2), (X,)),
    "repeat interleave of all": (lambda x: x.repeat_interleave(2) + x.repeat_interleave(2, -1).flatten(), (X,)),
    "turned matrices": (lambda x: x[0].t() @ x[0] + x[1].T @ x[1] + x[2].swapdims(0, -1) @ x[2], (X,)),
    "joined with nothing": (lambda x, n: torch.cat([torch.zeros(0), x[0, 0], n[0, 0]]), (X, N)),
    "repeat interleave": (lambda x: x.repeat_interleave(3, dim=1), (X,)),
    "flip": (lambda x: x.flip(0, 2), (X,)),
    "pad": (lambda x: F.pad(x, (1, 2, -1, 1), value=3.0), (X,)),
    "pad and cut": (lambda x: F.pad(x, (-1, -2, 0, 3, -1, 0)) + F.pad(x[1:, :, :2], (0, 0, 3, 0), value=None), (X,)),
    "roll by concatenation": (lambda x: torch.cat((-x[..., 2:], x[..., :2]), -1), (X,)),
    "embedding": (lambda t, n: F.embedding(n, t), (floats(5, 4), N)),
    "gather": (lambda x, n: x.gather(2, n[..., :2]), (X, N)),
    "index select": (lambda x, n: x.index_select(2, n[0, 0]), (X, N)),
    "index by one": (lambda x, n: x[:, n[0, 0]], (X, N)),
    "index by several": (lambda x, n: x[n[0] % 3, n[1]], (X, N)),
    "index by several that broadcast": (lambda x, n: x[:, n[0, :, :1], n[0, 0]], (X, N)),
    "index by three": (lambda x, n: x[n[0] % 3, n[1], n[2]], (X, N)),
    "index from the end": (lambda x, n: x[:, -1 - n[0, 0] % 3, -1 - n[0, 1] % 2], (X, N)),
    "write a slice": (lambda x, y: torch.slice_scatter(x, y[:, :2], 1, 3, 5), (X, Y)),
    "write slices at the ends": (
        lambda x, y: (
            torch.slice_scatter(x, y[:, :2], 1, -2)
            + torch.slice_scatter(x, y[:, 1:3], 1, 0, 2)
            + torch.slice_scatter(x, y, -1)
        ),
        (X, Y),
    ),
    "write numbers along other axes": (
        lambda x, n: x.scatter(0, n[:1] % 3, 2.0) + x.scatter(-1, n[..., :1], -1.0),
        (X, N),
    ),
    "write a number": (lambda x, n: x.scatter(1, n[:, :2], 9.0), (X, N)),
    "make": (lambda x: torch.zeros_like(x) + torch.ones(5) + torch.full((7, 1), 2.5) + x.new_full((1,), 3.0), (X,)),
    "make as asked": (
        lambda x: (
            torch.full_like(x, 2.5)
            + torch.zeros(7, 1)
            + torch.scalar_tensor(3.0)
            + (x * 1).fill_(2.0)
            + (x * 1).copy_(x[:1])
            + x.new_zeros(5)
            + x.new_ones(1)
            + torch.ones_like(x)
        ),
        (X,),
    ),
    "arange with fractions": (
        lambda x: x + torch.arange(0.5, 3.0, 0.5) + torch.arange(5.0) + torch.arange(9, -1, -2),
        (X,),
    ),
    "arange": (lambda x: x + torch.arange(5) + torch.arange(2, 7) + torch.arange(1, 11, 2), (X,)),
    "triangles of integers": (lambda n: n.tril(-2) + n.triu(2) + (n > 2).tril() + n.triu(), (N,)),
    "triangles": (lambda x: x.tril(1) + x.triu(-1) + x.tril() * 2, (X,)),
    "casts": (lambda x: x.bfloat16().float() + x.half().float() + x.int() + x.long() + x.bool(), (X,)),
    "complex rotation": (
        lambda x, a: torch.view_as_real(
            torch.view_as_complex(x.reshape(3, 7, 2, 2)) * torch.polar(torch.ones_like(a), a)[:, None]
        ).flatten(2),
        (floats(3, 7, 4), floats(3, 2)),
    ),
    "one hot": (lambda n: F.one_hot(n, 5), (N,)),
    "complex parts": (
        lambda x, a: (
            (torch.complex(x, a) * torch.polar(a.abs(), x)).real
            + (torch.complex(x, a) * 2.0).imag
            + (a * torch.complex(a, x)).transpose(0, 1).reshape(2, 3).imag
        ),
        (floats(2, 3), floats(2, 3, seed=1)),
    ),
    "limits by tensors": (
        lambda x, y: torch.clamp(x, y - 1, y + 1) + torch.clamp_min(x, 0.2) + torch.clamp_max(x, y),
        (X, Y),
    ),
    "powers of integers": (lambda n: n**2 + n**3 + torch.pow(n, n) + 2**n, (N,)),
    "changed in place": (lambda x: (x * 1).add_(2).mul_(3).masked_fill_(x > 0, 0.0), (X,)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_op_means_what_torch_says(case: str) -> None:
    function, tensors = CASES[case]
    want = function(*tensors)
    found = translated(function, *tensors)
    wanted = want.float().numpy() if want.dtype == torch.bfloat16 else want.numpy()
    np.testing.assert_allclose(found.astype(wanted.dtype), wanted, rtol=1e-5, atol=1e-5)
    assert found.shape == wanted.shape


def test_all_unsupported_ops_are_listed_at_once() -> None:
    with pytest.raises(FrontendError, match=r"fft_rfft|_fft_r2c") as caught:
        translated(lambda x: torch.fft.rfft(x).abs() + torch.special.i0(x[..., :3]) + torch.special.i0(x[..., 1:4]), X)
    assert "special_i0" in str(caught.value) or "i0" in str(caught.value)
    assert "(2x" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, n: torch.div(x, 0.3, rounding_mode="trunc"), "rounded towards zero"),
        (lambda x, n: n & 1, "bitwise operations on integers"),
        (lambda x, n: F.layer_norm(x, (7, 5)), "a norm over 2 axes"),
        (lambda x, n: F.rms_norm(x, (7, 5)), "a norm over 2 axes"),
        (lambda x, n: torch.linalg.vector_norm(x, 1, dim=1), "a norm of order 1"),
        (lambda x, n: F.pad(x, (1, 1), mode="reflect"), "not supported"),
        (lambda x, n: x[n[0] % 3, :, n[0] % 2], r"indices on axes \[0, 2\]"),
        (lambda x, n: torch.slice_scatter(x, x[:, :3], 1, 0, 6, 2), "every 2th element"),
        (lambda x, n: x.scatter(1, n[:2, :2], 9.0), "scattering over a part"),
        (lambda x, n: torch.einsum("abc,abc->ab", x, x).sum() + torch.einsum("abc,dbc->a", x, x), "einsum"),
        (lambda x, n: torch.complex(x, x).tanh().real, "of complex numbers"),
    ],
)
def test_what_is_not_translated_is_refused(function: Function, message: str) -> None:
    with pytest.raises(FrontendError, match=message):
        translated(function, X, N)


def test_ops_that_the_output_does_not_need_may_be_unsupported() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.special.i0(x)
        return x + 1

    np.testing.assert_allclose(translated(function, X), X + 1)


# What a mask means.


def causal(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


@pytest.mark.parametrize("window", [1, 2, 5, 31, 32, 1000, 4096, 131072])
def test_a_window_is_read_off_its_mask(window: int) -> None:
    assert meaning_of(lambda b, h, q, k: causal(b, h, q, k) & (k > q - window)) == (True, window)


@pytest.mark.parametrize("distance", [1, 4, 64, 1000])
def test_a_window_to_both_sides_is_read_off_its_mask(distance: int) -> None:
    """Tokens at most `distance` away, the farthest one included; a window counts the token itself as the first."""
    assert meaning_of(lambda b, h, q, k: (q - k).abs() <= distance) == (False, distance + 1)


def test_causal_and_full_masks_have_no_window() -> None:
    assert meaning_of(causal) == (True, 0)
    assert meaning_of(lambda b, h, q, k: torch.ones_like(q + k, dtype=torch.bool)) == (False, 0)


OTHERS: dict[str, Callable[..., torch.Tensor]] = {
    "chunks": lambda b, h, q, k: (k <= q) & (k // 8 == q // 8),
    "more behind than ahead": lambda b, h, q, k: (q - k < 5) & (k - q < 3),
    "chunks, both sides": lambda b, h, q, k: k // 8 == q // 8,
    "strictly before": lambda b, h, q, k: k < q,
    "first tokens stay": lambda b, h, q, k: (k <= q) & ((k > q - 16) | (k < 4)),
    "every other": lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
    "a prefix is seen by all": lambda b, h, q, k: (k <= q) | (k < 6),
    "depends on data": lambda b, h, q, k: torch.zeros(3)[q] > k,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_not_taken_for_causal(name: str) -> None:
    with pytest.raises(Refused):
        meaning_of(OTHERS[name])
