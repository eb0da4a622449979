"""Where a model's code could not be exported: the module whose own code it was, and what is said of it."""

from __future__ import annotations

import copy

import pytest
import sympy
import torch
from torch._dynamo.exc import UserError, UserErrorType
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from llmc.frontends.hf.refusal import Whereabouts, _always_holds, one_line

S, T = sympy.Symbol("s", integer=True, positive=True), sympy.Symbol("t", integer=True, positive=True)
VIOLATED = UserError(UserErrorType.CONSTRAINT_VIOLATION, "Constraints violated (s)! and more")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch gets of the conditions; it would refuse those of symbols that no export has made."""
    found: list[object] = []
    monkeypatch.setattr(ShapeEnv, "_maybe_guard_rel", lambda environment, condition: found.append(condition))
    return found


class Asks(torch.nn.Module):
    """Asks something of the number of tokens, as its code's branches do, and fails if it is to."""

    def __init__(self, *conditions: object, fails: bool = False) -> None:
        super().__init__()
        self.conditions, self.fails = conditions, fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for condition in self.conditions:
            ShapeEnv()._maybe_guard_rel(condition)  # type: ignore[arg-type]
        return self.gate(x)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise KeyError("no\n gate")
        return x


class Tries(torch.nn.Module):
    """Goes on where its part fails."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            self.part(x)
        except KeyError:
            ShapeEnv()._maybe_guard_rel(sympy.Eq(S % 4, 0))
        return x


class Raises(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("bad", x.shape)


def described(model: torch.nn.Module, error: BaseException | None = None) -> str:
    """What is said of a model that was run, and of an error: that of its own, or another one."""
    where = Whereabouts()
    try:
        with where.watching(model):
            model(torch.zeros(1))
    except Exception as own:
        error = error or own
    assert error is not None
    return where.describe(error)


def test_an_error_is_that_of_the_innermost_module() -> None:
    block = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(Raises()))
    said = "ValueError: ('bad', torch.Size([1]))"
    assert described(block) == f"1.0 (Raises): {said}"
    assert described(Raises()) == f"the model (Raises): {said}"
    assert described(torch.nn.Sequential(Asks(fails=True))) == "0 (Asks), gate(): KeyError: 'no\\n gate'"


def test_an_error_outside_of_the_modules_is_that_of_the_settings() -> None:
    where = Whereabouts()
    with where.watching(torch.nn.Sequential()):
        pass
    try:
        Raises()(torch.zeros(1))  # no module of the model
    except ValueError as error:
        assert where.describe(error).startswith("the settings of its config.json: ValueError: (")


def test_the_module_is_blamed_that_asked_what_does_not_hold_for_all_lengths() -> None:
    said = " computes differently for different numbers of tokens (recurrent and chunked layers do), which is not"
    always, never = S > 1, sympy.Eq(S % 8, 0)
    model = torch.nn.Sequential(Asks(always), Asks(always, never), Asks(never))
    assert described(model, VIOLATED) == f"1 (Asks){said} supported yet"
    assert described(Tries(Asks(fails=True)), VIOLATED).startswith(f"the model (Tries){said}")
    for most, told in ((704, "; with --max-context 704 it is one way"), (2, "")):
        text = f"Constraints violated (S)! Suggested fixes:\n  S = Dim('S', max={most})\n"
        error = UserError(UserErrorType.CONSTRAINT_VIOLATION, text)
        assert described(model, error) == f"1 (Asks){said} supported yet{told}"


def test_a_module_is_named_where_none_can_be_blamed() -> None:
    said = " works with the number of tokens in a way that torch.export does not follow, which is not supported yet"
    model = torch.nn.Sequential(Asks(S > 1), Asks(S > 0), Asks(S > -1), torch.nn.Identity())
    assert described(model, VIOLATED) == f"2 (Asks){said}"
    assert described(torch.nn.Identity(), VIOLATED) == f"its code{said}"


def test_only_violated_constraints_are_about_lengths() -> None:
    model = torch.nn.Sequential(Asks(sympy.Eq(S, 3)))
    for error in (UserError(UserErrorType.ANTI_PATTERN, "something\nelse"), ValueError("Constraints violated (s)!")):
        assert described(model, error) == f"the settings of its config.json: {one_line(error)}"


def test_a_choice_by_values_is_named() -> None:
    said = "chooses by the values of its tensors what it computes, which is not supported yet"
    error = GuardOnDataDependentSymNode(sympy.Eq(S, 3), "no")
    assert described(torch.nn.Identity(), error) == f"its code {said}"

    class Chooses(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    assert described(torch.nn.Sequential(Chooses())) == f"0 (Chooses) {said}"


def test_nothing_is_followed_after_the_export(asked: list[object]) -> None:
    """Whether it failed or not: no hooks stay, and torch asks as before, and as it did all the time."""
    asks = ShapeEnv._maybe_guard_rel
    for model in (torch.nn.Sequential(Asks(S > 1)), torch.nn.Sequential(Asks(S > 1, fails=True))):
        where = Whereabouts()
        try:
            with where.watching(model):
                model(torch.zeros(1))
        except KeyError:
            pass
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
        assert ShapeEnv._maybe_guard_rel is asks
        assert len(where._conditions) == 1 and where._stack == []
    assert asked == [S > 1, S > 1]


def test_what_is_asked_outside_of_all_modules_blames_none() -> None:
    where = Whereabouts()
    with where.watching(torch.nn.Identity()):
        ShapeEnv()._maybe_guard_rel(sympy.Eq(S, 3))
    assert where.describe(VIOLATED).startswith("its code works with")


def test_a_condition_is_looked_at_for_small_lengths_and_for_some_of_the_others() -> None:
    """From 2 to 65 all of them, then every 61st below 4096."""
    for length in (2, 3, 61, 64, 65, 122, 61 * 60, 61 * 67):
        assert not _always_holds(sympy.Ne(S, length))
    for length in (1, 66, 121, 4096, 61 * 68):
        assert _always_holds(sympy.Ne(S, length))
    assert (
        _always_holds(sympy.Eq(S, T))
        and _always_holds(sympy.true)
        and _always_holds(sympy.Eq(sympy.Function("f")(S), 1))
    )


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("a\n  b " + "c" * 200)) == "ValueError: a b " + "c" * 156
    assert one_line(ValueError()) == "ValueError"


def test_a_copy_of_a_part_is_followed_by_its_kind() -> None:
    """The exporter runs copies of some models, hooks and all."""
    where, model = Whereabouts(), torch.nn.Sequential(Asks(S > 1))
    with where.watching(model):
        copy.copy(model)(torch.zeros(1))
        assert where.describe(VIOLATED).startswith("0 (Asks) works with")
    assert described(model, VIOLATED).startswith("0 (Asks) works with")
