"""torch.export of a model on the meta device, as a function of one sequence's ids, positions and token types."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.export._trace
from torch.overrides import TorchFunctionMode
from transformers import masking_utils


@dataclass(frozen=True)
class Call:
    """How a model is called. arguments: those of its forward that get `ids`, `positions` or `token_types`, all [1, S].

    first: the position that the model counts from. one_type: every token has type 0, said once for all of them. fixed:
    other arguments. outputs: the results to keep, by the model's own names; None for every tensor.
    """

    arguments: Mapping[str, str]
    first: int = 0
    one_type: bool = False
    fixed: Mapping[str, object] | None = None
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Exported:
    """longest: the most tokens that the trace holds for. inputs: names of its placeholders. outputs: of its results."""

    program: torch.export.ExportedProgram
    longest: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Function(torch.nn.Module):
    """A model as a function of tensors [1, S]; it notes in `names` what the model returns."""

    def __init__(self, model: torch.nn.Module, call: Call, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.names = names

    def forward(self, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        call = self.call
        arguments = {name: given[ours] for name, ours in call.arguments.items()}
        if call.first and "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"] + call.first
        if call.one_type:
            arguments["token_type_ids"] = torch.zeros_like(given["ids"][:, :1])
        returned = self.model(return_dict=True, **arguments, **(call.fixed or {}))
        found = {name: value for name, value in returned.items() if isinstance(value, torch.Tensor)}
        kept = {name: found[name] for name in call.outputs or found if name in found}
        self.names[:] = kept
        return tuple(kept.values())


class _TracedNumbers(TorchFunctionMode):
    """Tensors that the model makes from Python numbers lose them on the meta device; `torch.full` keeps them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor):
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


def export(model: torch.nn.Module, call: Call, longest: int) -> Exported:
    """Trace `model` (on the meta device) for 2..longest tokens of one sequence, in one piece from its first position.

    The trace may hold for one token less, where a model with a table of exactly `longest` positions treats a full table
    differently.
    """
    try:
        return _export(model, call, longest)
    except torch._dynamo.exc.UserError as error:
        if f"!= {longest}" not in str(error):
            raise
        return _export(model, call, longest - 1)


def _export(model: torch.nn.Module, call: Call, longest: int) -> Exported:
    size = min(7, longest)
    examples = {
        "ids": torch.zeros(1, size, dtype=torch.long, device="meta"),
        "positions": torch.arange(size, device="meta")[None],
        "token_types": torch.zeros(1, size, dtype=torch.long, device="meta"),
    }
    given = {name: examples[name] for name in examples if name in call.arguments.values()}
    tokens = torch.export.Dim("S", min=2, max=longest)
    # Positions that restart would mean several sequences packed into one row; ours hold one.
    one_sequence = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    # Stack traces take a third of the time, and are not used.
    untraced = mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True)
    # A trace that fails would be printed whole; `refusal` says where it failed.
    unprinted = mock.patch.object(torch.export._trace, "print", lambda *given, **options: None)
    names: list[str] = []
    with quietly(), torch.no_grad(), one_sequence, untraced, unprinted, _TracedNumbers():
        program = torch.export.export(
            _Function(model, call, names).eval(),
            (given,),
            dynamic_shapes={"given": {name: {1: tokens} for name in given}},
            strict=False,
        )
    return Exported(program, longest, tuple(given), tuple(names))


class _Lookups(TorchFunctionMode):
    """Notes each table lookup whose indices have values: (rows of the table, indices)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, torch.Tensor]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is not torch.nn.functional.embedding:
            return function(*args, **(kwargs or {}))
        indices, table = args[:2]
        if indices.device.type == "cpu":
            self.found.append((table.shape[0], indices))
        return torch.zeros(*indices.shape, table.shape[1])


def first_position(model: torch.nn.Module, takes_types: bool) -> tuple[int, int | None]:
    """(position that the model itself gives a first token, most tokens that its table of positions has room for).

    Models of RoBERTa's kind count the tokens that are not padding from behind the padding's own id. This is seen by
    calling the model (on the meta device) with real ids, up to where it needs its weights: a table is then looked up at
    c, c + 1, ... (0, None) for a model that does nothing of that kind. takes_types: whether its forward takes
    token_type_ids.
    """
    with _restored(model):
        return _first_position(model, takes_types)


@contextlib.contextmanager
def _restored(model: torch.nn.Module) -> Iterator[None]:
    """What a model changes about itself when it is called, as some do for short texts, is as before afterwards."""
    kept = ("_modules", "_buffers", "_parameters")
    states = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in kept}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, state, parts in states:
            vars(module).clear()
            vars(module).update(state)
            for name, part in parts.items():
                vars(module)[name].clear()
                vars(module)[name].update(part)


def _first_position(model: torch.nn.Module, takes_types: bool) -> tuple[int, int | None]:
    counted: list[tuple[int, int | None]] = []
    for ids in torch.tensor([[[11, 7, 13, 5, 17]], [[12, 8, 14, 6, 18]]]):  # the padding's id is in one of them at most
        with quietly(), torch.no_grad(), _Lookups() as lookups, contextlib.suppress(Exception):
            model(input_ids=ids, **({"token_type_ids": torch.zeros_like(ids)} if takes_types else {}))
        for rows, indices in lookups.found:
            first = int(indices.flatten()[0]) if indices.numel() else 0
            if first > 0 and torch.equal(indices - first, torch.arange(ids.shape[1])[None]):
                counted.append((first, rows - first))
    return max(counted, default=(0, None))  # a row that begins with padding is counted from that
