"""Checks of bodies of nodes as a whole: one producer a name, an order of use, no function that calls itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from llmc.errors import FrontendError
from llmc.frontends.onnx.translation import Body, Node, bodies, free_names


def read_by(node: Node) -> Iterator[str]:
    """The names that a node reads, those inside its branches included."""
    yield from (name for name in node.inputs if name)
    for body in bodies(node):
        yield from free_names(body)


def in_order(nodes: Sequence[Node], given: AbstractSet[str], around: AbstractSet[str], what: str) -> list[Node]:
    """The nodes so that each stands behind those that it reads from; as they are where that holds already.

    given: inputs and initializers of the body; around: what branches may read from outside. FrontendError for a name
    with two producers or none, and for a cycle.
    """
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.outputs:
            if name and (name in producer or name in given):
                raise FrontendError(f"{what} computes {name!r:.100} twice: {node.where} is the second")
            if name:
                producer[name] = index
    waiting: list[int] = []
    users: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        sources = set()
        for name in read_by(node):
            if name in producer:
                sources.add(producer[name])
            elif name not in given and name not in around:
                raise FrontendError(f"{node.where} of {what} reads {name!r:.100}, which nothing computes")
        waiting.append(len(sources))
        for source in sources:
            users.setdefault(source, []).append(index)
    if all(source < user for source, found in users.items() for user in found):
        return list(nodes)
    ready = [index for index in range(len(nodes) - 1, -1, -1) if waiting[index] == 0]
    order: list[Node] = []
    while ready:
        index = ready.pop()
        order.append(nodes[index])
        for user in users.get(index, ()):
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    if len(order) < len(nodes):
        stuck = next(node for node, count in zip(nodes, waiting, strict=True) if count)
        raise FrontendError(f"{what} has a cycle: {stuck.where} waits for itself")
    return order


def require_bounded(main: Body, functions: Mapping[tuple[str, str], Body], most: int) -> None:
    """FrontendError where a function calls itself, or where calls written out would be more than `most` nodes."""
    totals: dict[tuple[str, str], int] = {}
    open_calls: set[tuple[str, str]] = set()

    def total(body: Body) -> int:
        count = 0
        for node in body.nodes:
            count += 1 + sum(total(inner) for inner in bodies(node))
            key = (node.domain, node.op)
            if key in functions:
                count += of_function(key)
            if count > most:
                raise FrontendError(f"the model has more than {most} nodes when its functions are written out")
        return count

    def of_function(key: tuple[str, str]) -> int:
        if key in open_calls:
            raise FrontendError(f"the model's function {'.'.join(key)!r:.100} calls itself")
        if key not in totals:
            if len(open_calls) >= 64:
                raise FrontendError("the model's functions call each other more than 64 deep")
            open_calls.add(key)
            totals[key] = total(functions[key])
            open_calls.discard(key)
        return totals[key]

    total(main)
