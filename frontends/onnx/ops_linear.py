"""Matrix products: MatMul, Gemm, Einsum, and those of integers."""

from __future__ import annotations

from llmc.compiler.ir import elementwise as e
from llmc.compiler.ir import structural as s
from llmc.compiler.ir.dims import Dim, product
from llmc.compiler.ir.integers import RoundToIntegers
from llmc.compiler.ir.op import Value
from llmc.frontends.onnx.forms import along, broadcast, cast, iota, like, reshape, squeeze, transpose, unsqueeze
from llmc.frontends.onnx.translation import Item, Node, Translation, Unsupported, handles


def matmul(a: Value, b: Value) -> Value:
    """numpy's matmul: a vector is a row on the left, a column on the right, and its axis vanishes again."""
    left, right = a.rank == 1, b.rank == 1
    result: Value = s.Matmul(unsqueeze(a, 0) if left else a, unsqueeze(b, 1) if right else b)
    if left:
        result = squeeze(result, -2)
    return squeeze(result, -1) if right else result


@handles("MatMul")
def _matmul(t: Translation, node: Node, a: Item, b: Item) -> Value:
    return matmul(a.value, b.value)


@handles("Gemm")
def _gemm(t: Translation, node: Node, a: Item, b: Item, c: Item | None = None) -> Value:
    """alpha * a @ b + beta * c, a and b transposed first where asked for."""
    first = transpose(a.value, (1, 0)) if node.get("transA", 0) else a.value
    second = transpose(b.value, (1, 0)) if node.get("transB", 0) else b.value
    result: Value = s.Matmul(first, second)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if alpha != 1:
        result = e.Mul(result, like(alpha, result))
    if c is None or beta == 0:
        return result
    return e.Add(result, c.value if beta == 1 else e.Mul(c.value, like(beta, c.value)))


@handles("Einsum")
def _einsum(t: Translation, node: Node, *items: Item) -> Value:
    """Operands are multiplied from left to right; an axis that no later one and not the result has is summed."""
    terms, target = _parsed(node.attributes["equation"].replace(" ", ""), [item.rank for item in items])
    values = [_without_diagonals(item.value, term) for item, term in zip(items, terms, strict=True)]
    terms = ["".join(dict.fromkeys(term)) for term in terms]
    value, term = values[0], terms[0]
    for i in range(1, len(values)):
        wanted = set(target).union(*terms[i + 1 :])
        value, term = _contracted(value, term, values[i], terms[i], wanted)
    value, term = _summed(value, term, set(target))
    return transpose(value, [term.index(letter) for letter in target])


def _parsed(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The operands' axes and the result's as letters; an ellipsis becomes upper-case Greek ones."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise Unsupported(f"{equation!r} has {len(terms)} terms for {len(ranks)} operands")
    widest = 0
    for term, rank in zip(terms, ranks, strict=True):
        named = len(term.replace("...", ""))
        if named > rank or ("..." not in term and named != rank):
            raise Unsupported(f"the term {term!r} of {equation!r} does not fit an operand of rank {rank}")
        if "..." in term:
            widest = max(widest, rank - named)
    hidden = "".join(chr(0x391 + i) for i in range(widest))
    full = [
        term.replace("...", hidden[widest - (rank - len(term.replace("...", ""))) :])
        for term, rank in zip(terms, ranks, strict=True)
    ]
    if not arrow:
        letters = sorted({letter for term in terms for letter in term.replace("...", "")})
        right = "..." + "".join(letter for letter in letters if "".join(terms).count(letter) == 1)
    return full, right.replace("...", hidden)


def _without_diagonals(value: Value, term: str) -> Value:
    """The value with a letter that stands twice standing once: the elements where both axes agree."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            first, second = term.index(letter), term.rindex(letter)
            size = value.shape[first]
            if value.shape[second] != size:
                raise Unsupported(f"the axes {letter!r} have sizes {size} and {value.shape[second]}")
            rows = reshape(iota(size), [size if i == first else 1 for i in range(value.rank)])
            index = broadcast(rows, [1 if i == second else dim for i, dim in enumerate(value.shape)])
            value = squeeze(s.GatherElements(value, index, second), second)
            term = term[:second] + term[second + 1 :]
    return value


def _summed(value: Value, term: str, wanted: set[str]) -> tuple[Value, str]:
    """The sum over axes that neither the result nor another operand has."""
    gone = tuple(i for i, letter in enumerate(term) if letter not in wanted)
    if not gone:
        return value, term
    return s.Sum(value, gone, keep=False), "".join(letter for letter in term if letter in wanted)


def _contracted(a: Value, left: str, b: Value, right: str, wanted: set[str]) -> tuple[Value, str]:
    """Two operands multiplied as one batch of matrices: [both, left only, inner] times [both, inner, right only]."""
    a, left = _summed(a, left, wanted | set(right))
    b, right = _summed(b, right, wanted | set(left))
    both = [x for x in left if x in right and x in wanted]
    inner = [x for x in left if x in right and x not in wanted]
    rows, columns = [x for x in left if x not in right], [x for x in right if x not in left]
    sizes: dict[str, int | Dim] = {}
    for letter, dim in (*zip(left, a.shape, strict=True), *zip(right, b.shape, strict=True)):
        # An axis of size 1 is repeated, as an ellipsis allows.
        if sizes.setdefault(letter, dim) == 1:
            sizes[letter] = dim
    result = "".join((*both, *rows, *columns))
    if not inner:
        whole = [
            reshape(
                transpose(value, [term.index(x) for x in result if x in term]),
                [value.shape[term.index(x)] if x in term else 1 for x in result],
            )
            for value, term in ((a, left), (b, right))
        ]
        return broadcast(e.Mul(*whole), [sizes[x] for x in result]), result

    def matrices(value: Value, term: str, order: list[str], two: tuple[list[str], list[str]]) -> Value:
        filled = broadcast(value, [sizes[x] for x in term])
        turned = transpose(filled, [term.index(x) for x in order])
        return reshape(turned, [*(sizes[x] for x in both), *(product(tuple(sizes[x] for x in part)) for part in two)])

    first = matrices(a, left, [*both, *rows, *inner], (rows, inner))
    second = matrices(b, right, [*both, *inner, *columns], (inner, columns))
    return reshape(s.Matmul(first, second), [sizes[x] for x in result]), result


def without_zero(value: Value, zero: Item | None, axis: int | None = None) -> Value:
    """Integers less their zero point, in i32. axis: the one that has a zero point an index, where there are several."""
    wide = cast(value, "i32")
    if zero is None:
        return wide
    point = cast(zero.value, "i32")
    if point.shape == (1,):
        point = reshape(point, ())
    if point.rank == 1 and axis is not None:
        point = along(point, axis, value.rank)
    return e.Sub(wide, point)


def requantized(total: Value, scale: Value, new_scale: Value, new_zero: Value) -> Value:
    """What sums of integers stand for (total * scale) as integers again, of the zero point's dtype."""
    meant = e.Mul(cast(total, "f32"), cast(scale, "f32"))
    return RoundToIntegers(meant, reshape(cast(new_scale, "f32"), ()), reshape(new_zero, ()), new_zero.dtype)


@handles("MatMulInteger")
def _matmul_integer(
    t: Translation, node: Node, a: Item, b: Item, a_zero: Item | None = None, b_zero: Item | None = None
) -> Value:
    # Several zero points are one a row of the left, one a column of the right.
    return matmul(without_zero(a.value, a_zero, -2), without_zero(b.value, b_zero, -1))


@handles("QLinearMatMul")
def _qlinear_matmul(
    t: Translation, node: Node, a: Item, a_scale: Item, a_zero: Item, b: Item, b_scale: Item, b_zero: Item,
    y_scale: Item, y_zero: Item,
) -> Value:  # fmt: skip
    total = matmul(without_zero(a.value, a_zero, -2), without_zero(b.value, b_zero, -1))
    scales = []
    for item, axis in ((a_scale, -2), (b_scale, -1)):
        scale = cast(item.value, "f32")
        if scale.shape == (1,):
            scale = reshape(scale, ())
        scales.append(along(scale, axis, total.rank) if scale.rank == 1 else scale)
    return requantized(total, e.Mul(*scales), y_scale.value, y_zero.value)
