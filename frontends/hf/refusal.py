"""Why a model's code cannot be exported, and where: in which of its modules, said in one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

_UNSUPPORTED = "which is not supported yet"
_MOST = re.compile(r"Dim\('S', max=(\d+)\)")  # how the exporter says for how many tokens at most all conditions hold
_LOOKED_AT = 4096  # numbers of tokens for which a condition is looked at: those of recurrences and chunks fail early


@dataclass(frozen=True)
class _Condition:
    """Something about sizes that a module's code asked, and that was taken for true."""

    holds: Any  # sympy's
    module: str


class Whereabouts:
    """Follows an export: which module runs, and which of them asked how many tokens there are."""

    def __init__(self) -> None:
        self._names: dict[torch.nn.Module, str] = {}
        self._stack: list[str] = []
        self._conditions: list[_Condition] = []

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Follow what runs inside."""
        self._names = {
            module: f"{path or 'the model'} ({type(module).__name__})" for path, module in model.named_modules()
        }
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        refine = ShapeEnv._maybe_guard_rel

        def note(environment: ShapeEnv, condition: Any) -> None:
            if self._stack:
                self._conditions.append(_Condition(condition, self._stack[-1]))
            refine(environment, condition)

        try:
            with mock.patch.object(ShapeEnv, "_maybe_guard_rel", note):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def _enter(self, module: torch.nn.Module, given: object) -> None:
        # Parts that the model makes anew when it is called have no name in it.
        self._stack.append(self._names.get(module, type(module).__name__))

    def _leave(self, module: torch.nn.Module, given: object, made: object) -> None:
        self._stack.pop()

    def describe(self, error: BaseException) -> str:
        """What went wrong, with the module where it did if that is known."""
        if isinstance(error, UserError) and "Constraints violated" in str(error):
            blamed = next((c.module for c in self._conditions if not _always_holds(c.holds)), "")
            if blamed:
                kind = "recurrent and chunked layers do"
                what = f"{blamed} computes differently for different numbers of tokens ({kind}), {_UNSUPPORTED}"
                most = _MOST.search(str(error))
                return f"{what}; with --max-context {most[1]} it is one way" if most and int(most[1]) > 2 else what
            where = self._conditions[-1].module if self._conditions else "its code"
            return f"{where} works with the number of tokens in a way that torch.export does not follow, {_UNSUPPORTED}"
        where = self._raised_in(error.__traceback__)
        if isinstance(error, GuardOnDataDependentSymNode):
            return f"{where or 'its code'} chooses by the values of its tensors what it computes, {_UNSUPPORTED}"
        return f"{where}: {one_line(error)}" if where else f"the settings of its config.json: {one_line(error)}"

    def _raised_in(self, traceback: TracebackType | None) -> str:
        """The innermost module of the model whose own code an exception passed through, with the function's name."""
        found = ""
        while traceback is not None:
            frame = traceback.tb_frame
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and owner in self._names:
                function = frame.f_code.co_name
                if not function.startswith(("_call_impl", "_wrapped_call_impl", "inner")):
                    found = self._names[owner] + ("" if function == "forward" else f", {function}()")
            traceback = traceback.tb_next
        return found


def _always_holds(condition: Any) -> bool:
    """Whether a condition of one size holds for all numbers of tokens that are looked at."""
    symbols = list(condition.free_symbols)
    if len(symbols) != 1:
        return True
    try:
        return all(condition.subs(symbols[0], size) for size in range(2, _LOOKED_AT) if size < 66 or size % 61 == 0)
    except TypeError:
        return True


def one_line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
