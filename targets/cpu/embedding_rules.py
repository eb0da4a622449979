"""How tables are read: embeddings by token id, and the rows of activations that are asked for."""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.encodings.grouped import storage_bytes
from llmc.compiler.encodings.levels import table_levels
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.llm import Embed, Linear
from llmc.compiler.ir.op import Op, Value
from llmc.compiler.ir.structural import Gather
from llmc.targets.cpu.embedding import ROW_BITS, Layout, RowLayout, embedding
from llmc.targets.cpu.plain import RULES, plain_call, used_symbols
from llmc.targets.cpu.vector_isa import missing_vectors, weight_tiles
from llmc.targets.kernel import Call, Packed, Scratch
from llmc.targets.lowering import Context, Lowered


def table_layout(table: Value, context: Context) -> Layout | str:
    """How a table lies: as the head's kernels want it where the head reads it too, else row by row."""
    shared = _is_shared(table, context)
    encoding = table.tensor.encoding
    if encoding is None:
        return weight_tiles(context.machine).floats(table.dtype) if shared else table.dtype
    bits, group = int(getattr(encoding, "bits", 0)), int(getattr(encoding, "group", 0))
    symmetric, of_table = bool(getattr(encoding, "symmetric", True)), bool(getattr(encoding, "table", False))
    in_steps, per_row = bool(getattr(encoding, "in_steps", False)), bool(getattr(encoding, "per_row", False))
    if shared:
        tiles = weight_tiles(context.machine)
        return tiles.quantized(bits, group, symmetric, of_table, in_steps=in_steps, per_row=per_row)
    return RowLayout(bits, group, symmetric, table_levels(bits) if of_table else None, in_steps, per_row)


def _is_shared(table: Value, context: Context) -> bool:
    """Whether a linear op multiplies by the table."""
    return any(isinstance(user, Linear) and user.w is table for user in context.graph.users.get(table, ()))


@RULES.lower(Embed, priority=10, needs=missing_vectors)
def embed_tokens(op: Op, context: Context) -> Lowered | str:
    """A row a token, dequantized on the way."""
    assert isinstance(op, Embed)
    if op.dtype != "f32" or op.table.dtype not in ("f32", "f16", "bf16"):
        return f"rows of {op.table.dtype} to {op.dtype}"
    if op.ids.rank != 1 or not context.known(op.table):
        return "the table is not known when compiling, or ids are no vector"
    encoding = op.table.tensor.encoding
    if encoding is not None and getattr(encoding, "bits", 0) not in ROW_BITS:
        return f"no kernel reads rows in {encoding}"
    layout = table_layout(op.table, context)
    tokens, features = op.shape
    assert isinstance(features, int)
    calls: list[Call] = []
    ids: object = op.ids
    if op.ids.dtype != "i32":
        narrow = Cast(op.ids, "i32")
        ids = Scratch("ids", "i32", tokens)
        cast = plain_call(narrow, context)
        if isinstance(cast, str):
            return cast
        calls.append(Call(cast.kernel, (op.ids, ids, *used_symbols(narrow)), cast.units, cast.grain))
    if isinstance(layout, str):
        table: tuple[object, ...] = (op.table,)
    else:
        n, k = op.table.shape
        assert isinstance(n, int) and isinstance(k, int)
        table = tuple(Packed(op.table, layout, part) for part in layout.arrays(n, k))
    template, problem = embedding(layout, features)
    rows = context.choose(template, problem)
    if isinstance(rows, str):
        return rows
    made = rows.kernel(problem, context.machine)
    read = tokens * storage_bytes(replace(op.table.tensor, shape=(features,)))
    calls.append(
        Call(made, (ids, *table, "result"), tokens, rows.grain(problem), note=f"[{features}]", bytes_moved=read)
    )
    return Lowered(tuple(calls))


@RULES.lower(Gather, priority=10, needs=missing_vectors)
def gather_rows(op: Op, context: Context) -> Lowered | str:
    """Whole rows of an f32 matrix by i32 index."""
    assert isinstance(op, Gather)
    if op.x.rank != 2 or op.axis % 2 or op.indices.rank != 1:
        return "not rows of a matrix"
    if op.dtype != "f32" or op.indices.dtype != "i32":
        return f"rows of {op.dtype} by {op.indices.dtype}"
    rows, features = op.shape
    if not isinstance(features, int):
        return "the row length is not known when compiling"
    template, problem = embedding("f32", features)
    copy = context.choose(template, problem)
    if isinstance(copy, str):
        return copy
    made = copy.kernel(problem, context.machine)
    return Lowered((Call(made, (op.indices, op.x, "result"), rows, copy.grain(problem)),))
