"""The session layer of an artifact's code (csrc/layer.h), through ctypes: sequences, their pages, and the steps and
choices that C makes for them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.device import Code
from llmc.runtime.errors import ArtifactError, CacheFullError, ContextError, LlmcError, RuntimeStateError, StepError
from llmc.runtime.library import Choice, Step
from llmc.runtime.manifest import Manifest
from llmc.runtime.memory import address

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p
_STATES = {"paged": 0, "none": 1, "ragged": 2, "run": 3}  # LLMC_PAGED, ... of llmc.h
# LLMC_ERROR_* of llmc.h that Python has errors of its own for.
_FILE, _FULL, _CONTEXT, _STEP = 2, 5, 6, 10
_ERRORS: dict[int, type[LlmcError]] = {_FILE: ArtifactError, _CONTEXT: ContextError, _STEP: StepError}
# LLMC_TEXT_* of layer.h: how a text ended, if it did.
GOES_ON, STOPPED, FULL, NOT_FINITE, NO_CHOICE = range(5)

_Run = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _I64)
_Choose = ctypes.CFUNCTYPE(_I64, ctypes.POINTER(Choice), _I64)
_CopyPage = ctypes.CFUNCTYPE(ctypes.c_int, _I64, _I64)
_Fetch = ctypes.CFUNCTYPE(_POINTER, _POINTER)
_NO_RUN = _Run()
_REFUSED = -2  # LLMC_NO_CHOICE of choose.h


class Hooks(ctypes.Structure):
    """`LlmcHooks` of layer.h."""

    _fields_ = (("run", _Run), ("choose", _Choose), ("copy_page", _CopyPage), ("fetch", _Fetch))


class Tables(ctypes.Structure):
    """`LlmcTables` of places.h."""

    _fields_ = tuple(
        (name, _POINTER)
        for name in (
            "ids", "positions", "slots", "lengths", "rows", "tiles", "starts", "token_types", "block_table",
            "adapters",
        )
    )  # fmt: skip


class LayerOptions(ctypes.Structure):
    """`LlmcLayer` of layer.h."""

    _fields_ = (
        ("bytes", _I64),
        ("step", _POINTER),
        ("tables", Tables),
        ("logits", _POINTER),
        ("hooks", Hooks),
        ("threads", _I64),
        ("state", _I64),
        ("vocabulary", _I64),
        ("max_context", _I64),
        ("max_step", _I64),
        ("page", _I64),
    )


class Pages(ctypes.Structure):
    """`LlmcPages` of pages.h."""

    _fields_ = (
        ("capacity", _I64),
        ("tokens_per_page", _I64),
        ("fresh", _I64),
        ("free_count", _I64),
        ("kept_count", _I64),
        ("free", _POINTER),
        ("users", _POINTER),
        ("serials", _POINTER),
        ("parents", _POINTER),
        ("tokens", _POINTER),
        ("siblings", _POINTER),
        ("buckets", _POINTER),
        ("older", _POINTER),
        ("newer", _POINTER),
        ("oldest", ctypes.c_int32),
        ("newest", ctypes.c_int32),
        ("last_serial", _I64),
        ("bucket_mask", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("memory", _POINTER),
        ("memory_bytes", _I64),
    )


class SequenceView(ctypes.Structure):
    """`LlmcSequenceView` of layer.h."""

    _fields_ = (
        ("length", _I64),
        ("page_count", _I64),
        ("regime", _I64),
        ("expected", _I64),
        ("reading", _I64),
        ("tokens", _POINTER),
        ("page_ids", _POINTER),
        ("adapter", _I64),
    )


class Request(ctypes.Structure):
    """`LlmcRequest` of layer.h."""

    _fields_ = (("sequence", _POINTER), ("ids", _POINTER), ("count", _I64), ("first_row", _I64))


class Text(ctypes.Structure):
    """`LlmcText` of layer.h."""

    _fields_ = (
        ("sequence", _POINTER),
        ("choice", _POINTER),
        ("uniforms", _POINTER),
        ("seen", _POINTER),
        ("known", _POINTER),
        ("stops", _POINTER),
        ("stop_count", _I64),
        ("tokens", _POINTER),
        ("count", _I64),
        ("most", _I64),
        ("end", _I64),
    )


class Writing(ctypes.Structure):
    """`LlmcWriting` of layer.h."""

    _fields_ = (
        ("texts", _POINTER),
        ("number", _I64),
        ("deadline", _I64),
        ("times", _POINTER),
        ("rounds", _I64),
    )


_INT, _OUT = ctypes.c_int, ctypes.POINTER(_POINTER)
_FUNCTIONS: dict[str, tuple[object, ...]] = {  # the result, then the arguments
    "layer_open": (_INT, ctypes.POINTER(LayerOptions), _OUT),
    "layer_pages": (_POINTER, _POINTER),
    "layer_drop_kept": (None, _POINTER),
    "close": (None, _POINTER),
    "error": (ctypes.c_char_p,),
    "sequence": (_INT, _POINTER, _I64, _OUT),
    "fork": (_INT, _POINTER, _OUT),
    "end": (None, _POINTER),
    "rollback": (_INT, _POINTER, _I64),
    "adapt": (_INT, _POINTER, _I64),
    "adapter_begin": (_INT, _POINTER, _I64),
    "adapter_end": (None, _POINTER, _I64),
    "adapter_users": (_I64, _POINTER, _I64),
    "adopt": (_INT, _POINTER, _POINTER, _I64, ctypes.POINTER(_I64)),
    "feed_begin": (_INT, _POINTER, ctypes.POINTER(Request), _I64),
    "feed_step": (_INT, _POINTER, _POINTER, ctypes.POINTER(_I64)),
    "feed_left": (_I64, _POINTER),
    "feed_end": (None, _POINTER),
    "write": (_INT, _POINTER, ctypes.POINTER(Writing)),
    "encode_fitting": (_I64, _POINTER, _POINTER, _I64),
    "encode_step": (_INT, _POINTER, _POINTER, _POINTER, _POINTER, _I64),
}


def _functions(code: Code) -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {}
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(code.handle, f"llmc_{name}")
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def _close(models: list[int], close: Callable[[int], int], _kept: tuple[object, ...]) -> None:
    """Ends a layer that is gone. Others of a circle of garbage may still ask for it: they find it closed."""
    close(models.pop())


class Layer:
    """One artifact's sequences and steps, in memory of its caller: a filled `Step`, whose sizes it sets, and its int32
    tables by their names, as this process sees them. Whatever a step has is known by numbers of places (`Device`).

    One thread at a time. Raises what a step raises, `CacheFullError` and `ContextError`; each says that nothing changed
    but what was committed before.
    """

    def __init__(
        self,
        code: Code,
        manifest: Manifest,
        step: Step,
        tables: Mapping[str, NDArray[np.int32]],
        threads: int,
    ) -> None:
        facts = manifest.step
        self._options = LayerOptions(
            bytes=ctypes.sizeof(LayerOptions), step=ctypes.addressof(step),
            tables=Tables(**{name: address(table) for name, table in tables.items()}),
            threads=threads, state=_STATES[facts.state],
            vocabulary=facts.vocab_size, max_context=manifest.max_context, max_step=facts.max_step, page=facts.page,
        )  # fmt: skip
        self._call = functions = _functions(code)
        self._errors: list[BaseException] = []  # of hooks: C goes on with a code
        self._rows = _I64()
        self._requests: object = None
        self._feeding = False
        model = _POINTER()
        self._check(functions["layer_open"](ctypes.byref(self._options), ctypes.byref(model)))
        assert model.value is not None
        self._models = [model.value]  # empty once it is closed
        kept = (code, self._options, step, dict(tables))
        weakref.finalize(self, _close, self._models, functions["close"], kept).atexit = False

    def _check(self, code: int) -> None:
        """Raises the error of a call's code, if it is one."""
        found = self.error_of(code)
        if found is not None:
            raise found

    def error_of(self, code: int) -> BaseException | None:
        """The error that a call's code means; None: it is none."""
        error = self._errors.pop() if self._errors else None
        if error is not None or not code:
            return error
        if code == _FULL:
            return CacheFullError(
                f"the KV cache is full: all {self.pages.capacity} pages are in use. Close sequences, or load with a "
                "larger kv_memory"
            )
        text = ctypes.string_at(self._call["error"]()).decode()
        return _ERRORS.get(code, RuntimeStateError)(text)

    @property
    def is_open(self) -> bool:
        return bool(self._models)

    def _ready(self) -> int:
        """The model, in the middle of no feed."""
        if not self._models:
            raise RuntimeStateError("this model is closed")
        if self._feeding:  # an interrupt came before its end
            self._call["feed_end"](self._models[0])
            self._feeding = False
        return self._models[0]

    def hook(self, run: Callable[[], None] | None) -> None:
        """From now on, this runs the step, and raises where it fails; None: the artifact itself does."""

        def call(_step: int, _threads: int) -> int:
            assert run is not None
            try:
                run()
            except BaseException as error:
                self._errors[:] = [error]
                return -1
            return 0

        self._options.hooks.run = _NO_RUN if run is None else _Run(call)

    def drive(
        self,
        choose: Callable[[Choice], int],
        copy_page: Callable[[int, int], None],
        fetch: Callable[[int], NDArray[np.float32]],
    ) -> None:
        """For memory that is not this process's: what chooses a token, copies a page of the cache, and brings a row of
        logits here by its number. None of them may refer to this layer."""
        errors = self._errors
        rows: list[NDArray[np.float32]] = []  # what was fetched last

        def call_choose(choice: ctypes._Pointer[Choice], _threads: int) -> int:
            try:
                return choose(choice.contents)
            except RuntimeStateError:
                return _REFUSED
            except BaseException as error:
                errors[:] = [error]
                return _REFUSED

        def call_copy(source: int, target: int) -> int:
            try:
                copy_page(source, target)
            except BaseException as error:
                errors[:] = [error]
                return -1
            return 0

        def call_fetch(number: int) -> int | None:
            try:
                rows[:] = [np.ascontiguousarray(fetch(number))]
            except BaseException as error:
                errors[:] = [error]
                return None
            return address(rows[0])

        hooks = self._options.hooks
        hooks.choose, hooks.copy_page, hooks.fetch = _Choose(call_choose), _CopyPage(call_copy), _Fetch(call_fetch)

    def write_logits_to(self, number: int) -> None:
        """From now on, rows of logits go to the place of this number, float32 [rows of any step, vocab], 64-byte
        aligned, unless `step` is given another place."""
        self._options.logits = number

    # Pages and sequences: numbers are where those of C lie

    @property
    def pages(self) -> Pages:
        """What C knows of the pages; not to be changed."""
        return Pages.from_address(self._call["layer_pages"](self._ready()))

    def drop_kept(self) -> None:
        """Frees all pages that are only kept."""
        self._call["layer_drop_kept"](self._ready())

    def sequence(self, expected: int) -> int:
        made = _POINTER()
        self._check(self._call["sequence"](self._ready(), expected, ctypes.byref(made)))
        return made.value or 0

    def fork(self, sequence: int) -> int:
        made = _POINTER()
        self._ready()
        self._check(self._call["fork"](sequence, ctypes.byref(made)))
        return made.value or 0

    def end(self, sequence: int) -> None:
        """Gives back a sequence, if the model has not ended before it."""
        if self.is_open:
            self._ready()
            self._call["end"](sequence)

    def rollback(self, sequence: int, count: int) -> None:
        self._ready()
        self._check(self._call["rollback"](sequence, count))

    def adopt(self, sequence: int, ids: NDArray[np.int32]) -> int:
        """How many of the first tokens the sequence has by now, int32 [n] that lie one after the other."""
        covered = _I64()
        self._ready()
        self._check(self._call["adopt"](sequence, address(ids), len(ids), ctypes.byref(covered)))
        return covered.value

    # Adapters, by their numbers

    def adapt(self, sequence: int, number: int) -> None:
        """From now on an empty sequence is computed with this adapter; 0: with none."""
        self._ready()
        self._check(self._call["adapt"](sequence, number))

    def adapter_users(self, number: int) -> int:
        """How many sequences have an adapter."""
        return self._call["adapter_users"](self._ready(), number)

    def adapter_begin(self, number: int) -> None:
        """Makes it one that no sequence can have, until `adapter_end`, so that its tables may change."""
        self._check(self._call["adapter_begin"](self._ready(), number))

    def adapter_end(self, number: int) -> None:
        """It is what its tables hold now: no prefix in the cache was computed with it."""
        self._call["adapter_end"](self._ready(), number)

    # Steps

    def begin(self, requests: Sequence[tuple[int, NDArray[np.int32], int]]) -> None:
        """Makes room for (sequence, ids that lie one after the other, first of them whose logits are wanted), until
        `finish`."""
        model = self._ready()
        made = (Request * len(requests))()
        for place, (sequence, ids, first_row) in zip(made, requests, strict=True):
            place.sequence, place.ids, place.count, place.first_row = sequence, address(ids), len(ids), first_row
        self._requests, self._feeding = made, True
        code = self._call["feed_begin"](model, made, len(made))
        self._feeding = not code
        self._check(code)

    def step(self, logits: int | None = None) -> int:
        """Runs the next step; returns how many rows of logits it wrote, to the place of this number or to the layer's
        own."""
        self._check(self._call["feed_step"](self._models[0], logits, ctypes.byref(self._rows)))
        return self._rows.value

    @property
    def left(self) -> int:
        """Requests that are not done."""
        return self._call["feed_left"](self._models[0])

    def finish(self) -> None:
        """Gives up what has not run."""
        if self._feeding:
            self._call["feed_end"](self._models[0])
            self._feeding = False

    def write(self, writing: Writing) -> BaseException | None:
        """Writes texts, and returns the error that ended it, if one did: what was written before it counts."""
        return self.error_of(self._call["write"](self._ready(), ctypes.byref(writing)))

    def fitting(self, counts: NDArray[np.int64]) -> int:
        """How many texts of so many tokens, int64 [n], go into one step: at least one."""
        return self._call["encode_fitting"](self._ready(), address(counts), len(counts))

    def encode(self, ids: NDArray[np.int32], types: NDArray[np.int32] | None, counts: NDArray[np.int64]) -> None:
        """One step over whole texts, one after the other: int32 [tokens], [tokens] and int64 [texts]."""
        types_place = None if types is None else address(types)
        self._check(self._call["encode_step"](self._ready(), address(ids), types_place, address(counts), len(counts)))
