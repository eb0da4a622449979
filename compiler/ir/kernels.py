"""k-level: a graph whose run-time ops are calls of chosen kernels on planned buffers."""

from __future__ import annotations

from llmc.compiler.ir.dims import Dim
from llmc.compiler.ir.op import Op, Tokens, Value
from llmc.compiler.ir.shapes import require
from llmc.compiler.ir.types import KV, Tensor, Type, parse_encoding

# One call: kernel's symbol, its parameters for people, work units, grain, guards "SYMBOL in [low, high]".
KernelCall = tuple[str, str, int | Dim, int, tuple[str, ...]]


class RunKernels(Op, name="k.run"):
    """Kernel calls, in order, that compute one value of the graph from others.

    of: the op that was lowered. rule: the lowering rule. calls: see `KernelCall`; each runs where its guards hold.
    buffer: where the result lies: `arena+OFFSET`, `logits`, `output`, or `cache` for a cache that is updated in place.
    A tensor's type is stated; a cache's is that of its predecessor, the first operand.
    """

    tokens = Tokens.MIXES

    args: tuple[Value, ...]
    of: str
    rule: str
    calls: tuple[KernelCall, ...]
    buffer: str
    shape_to: tuple[int | Dim, ...] = ()
    dtype_name: str = ""
    encoding_name: str = ""

    def infer(self) -> Type:
        if self.buffer == "cache":
            require(bool(self.args) and isinstance(self.args[0].type, KV), "a cache update starts from a cache")
            return self.args[0].type
        require(self.buffer.partition("+")[0] in ("arena", "scratch", "logits", "output"), "unknown buffer")
        encoding = parse_encoding(self.encoding_name) if self.encoding_name else None
        return Tensor(self.shape_to, self.dtype_name, encoding)
