"""Compiles hard models and compares them: at 300 tokens at once, in pieces through the cache, and token by token."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from hard_models.building import onnx_model
from hard_models.drawing import TORCH, Spec, draw, style_of
from hard_models.parts import ARRAYS, DECODER, DIM, PLACES, VOCABULARY
from llmc.compiler import pipeline
from llmc.compiler.ir.graph import Graph
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.errors import LlmcError
from llmc.runtime.runtime import Runtime

TOKENS, CONTEXT = 300, 512
# Of the greatest number in the result: 400 times the rounding of f32; right models were within 3e-6. `settled` asks for
# models whose unusual parts make 20 times as much, and whose embeddings a fifth of it when they change by 5e-7.
TOLERANCE = 5e-5
_TRIES, _NEXT = 12, 1_000_003
_LENGTHS = (1, 7, 33, 129, TOKENS)  # of encoders and of arrays

PAGED, WHOLE_SEQUENCE, ENCODER, RUN = "paged", "whole sequence", "encoder", "arrays"
NO_DECODER = "taken for an encoder"  # a decoder whose mask nobody understood: its logits are right, but it cannot go on
_CAUGHT = "the first layer as recognised"
REFUSED, BOUNDED = "refused", "bounded"
WRONG, CRASH = "WRONG", "CRASH"


class Reference(Protocol):
    """What a model is according to those who know."""

    def __call__(self, ids: np.ndarray) -> np.ndarray | None:
        """Of ids i64[S] the result f32[S, N]; None where the model refuses them."""


@dataclass(frozen=True)
class Verdict:
    """What became of a model. fused: whether every attention of it was recognised. error: of the greatest result."""

    spec: Spec
    how: str
    fused: bool = False
    error: float = 0.0
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether llmc was silently wrong, or broke."""
        return self.how in (WRONG, CRASH)

    @property
    def whole(self) -> bool:
        """Whether the model was recognised whole: every attention, and of decoders the cache."""
        return self.fused and self.how in (PAGED, ENCODER, RUN)

    def __str__(self) -> str:
        fused = "" if self.fused or self.how in (REFUSED, CRASH) else ", attention not fused"
        return f"{self.how}{fused}, error {self.error:.1e}: {self.spec}" + (f": {self.detail}" if self.detail else "")


class OnnxReference:
    """onnxruntime without its optimizations."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, ids: np.ndarray) -> np.ndarray | None:
        rows = {"input_ids": ids, "position_ids": np.arange(len(ids)), "attention_mask": np.ones_like(ids)}
        return self.arrays({name: rows[name][None].astype(np.int64) for name in self.names})

    def arrays(self, given: dict[str, np.ndarray]) -> np.ndarray | None:
        """The first result, without its batch; None where onnxruntime refuses."""
        try:
            found = self.session.run(None, given)[0]
        except Exception:  # onnxruntime's errors have no common base
            return None
        assert isinstance(found, np.ndarray)
        return found[0]


def inputs_of(spec: Spec, tokens: int = TOKENS) -> np.ndarray | dict[str, np.ndarray]:
    """What a model is tried on: ids, or arrays q, k, v."""
    rng = np.random.default_rng(spec.drawn_as)
    if spec.kind != ARRAYS:
        return rng.integers(0, VOCABULARY, TOKENS)[:tokens]
    shape = (1, spec.heads, TOKENS, DIM)
    return {
        name: (rng.standard_normal(shape) * scale).astype(np.float32)[:, :, :tokens]
        for name, scale in zip("qkv", (spec.sharpness, 1.0, 1.0), strict=True)
    }


def _result(spec: Spec, model: onnx.ModelProto, given: np.ndarray | dict[str, np.ndarray]) -> np.ndarray | None:
    reference = OnnxReference(model)
    return reference.arrays(given) if isinstance(given, dict) else reference(given)


def _nudged(spec: Spec, model: onnx.ModelProto) -> np.ndarray | None:
    """The result of a model whose embeddings, or inputs, are a little different."""
    rng = np.random.default_rng(spec.drawn_as)
    given = inputs_of(spec)
    nudge = lambda x: (x * (1 + 5e-7 * rng.standard_normal(x.shape))).astype(np.float32)  # noqa: E731
    if isinstance(given, dict):
        return _result(spec, model, {name: nudge(array) for name, array in given.items()})
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    table = next(tensor for tensor in changed.graph.initializer if tensor.name == "embedding")
    table.CopyFrom(numpy_helper.from_array(nudge(numpy_helper.to_array(table)), "embedding"))
    return _result(spec, changed, given)


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """The greatest difference, of the greatest expected number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))


def objection(spec: Spec) -> str:
    """Why a model would be no test: it is chaotic, not finite, or its unusual parts do not show. Empty: it is one."""
    model = onnx_model(spec)
    given = inputs_of(spec)
    expected = _result(spec, model, given)
    if expected is None:
        return "" if spec.parts[PLACES].name == "places out of range" else "onnxruntime refuses it"
    if not np.isfinite(expected).all():
        return "not finite"
    nudged = _nudged(spec, model)
    if nudged is None or gap(nudged, expected) > TOLERANCE / 5:
        return "chaotic"
    for slot in spec.unusual:
        if not spec.parts[slot].shows:
            continue
        plain = _result(spec, onnx_model(spec.without(slot)), given)
        if plain is not None and gap(plain, expected) < 20 * TOLERANCE:
            return f"its {slot} does not show"
    return ""


def settled(seed: int) -> Spec:
    """The first model of a seed that is a test: drawn again, a few times, until nothing speaks against it."""
    for attempt in range(_TRIES):
        spec = draw(seed + attempt * _NEXT, style_of(seed))
        why = objection(spec)
        if not why:
            return replace(spec, seed=seed)
    raise AssertionError(f"seed {seed}: {_TRIES} models, none of them a test: {why}: {spec}")


@dataclass
class _Compiled:
    """A compile as the observers saw it."""

    graph: Graph | None = None
    reasons: tuple[str, ...] = ()

    def attentions(self) -> int:
        assert self.graph is not None
        return sum("attention" in op.name for op in self.graph.ops)

    def watch(self, _pass: object, _before: Graph, after: Graph, report: Any) -> None:
        self.graph = after
        self.reasons += tuple(f"{report.name}: {why}" for _, why in report.refusals)

    def watching(self) -> AbstractContextManager[object]:
        """Inside, the passes of a compile are seen."""
        run = pipeline.run_lifted
        return mock.patch.object(
            pipeline,
            "run_lifted",
            lambda lifted, options, observers=(), progress=None: run(
                lifted, options, [*observers, self.watch], progress
            ),
        )


def judge(spec: Spec, cache: Path, folder: Path | None = None) -> Verdict:
    """Compile a settled model and compare it. cache: of kernels. folder: where its files stay; default: nowhere."""
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as name:  # type: ignore[attr-defined]
        try:
            return _judge(spec, Path(name), cache)
        except LlmcError as error:
            # A wrong pass that the compiler itself catches does no harm, and is wrong all the same.
            caught = WRONG if _CAUGHT in str(error) else REFUSED
            how = caught if "\n" not in str(error).strip() else CRASH
            return Verdict(spec, how, detail=f"{type(error).__name__}: {error}")
        except Exception as error:
            return Verdict(spec, CRASH, detail=f"{type(error).__name__}: {str(error)[:300]}")


def _source(spec: Spec, folder: Path) -> tuple[Path, Any, AbstractContextManager[object]]:
    """(what to compile, the reference, what must hold while it is compiled)."""
    if spec.style == TORCH:
        from hard_models.torch_models import known, write

        return *write(spec, folder / "model"), known()
    model = onnx_model(spec)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, OnnxReference(model), nullcontext()


def _judge(spec: Spec, folder: Path, cache: Path) -> Verdict:
    path, reference, held = _source(spec, folder)
    seen = _Compiled()
    options = CompileOptions(
        quantization="none", kernel_cache=cache, jobs=1,
        max_context=None if spec.kind == ARRAYS else CONTEXT, max_dims=(("n", 320),) if spec.kind == ARRAYS else (),
    )  # fmt: skip
    with held, seen.watching():
        compile_model(str(path), folder / "model.so", options)
    runtime = Runtime.load(folder / "model.so", threads=2)
    how = {"generate": PAGED if runtime.paged else WHOLE_SEQUENCE, "encode": ENCODER, "run": RUN}[runtime.task]
    if spec.kind == DECODER and how == ENCODER:
        how = NO_DECODER
    compare = {"generate": _in_pieces, "encode": _as_encoder, "run": _as_arrays}[runtime.task]
    verdict = Verdict(spec, how, fused=seen.attentions() == spec.layers, detail="; ".join(dict.fromkeys(seen.reasons)))
    return compare(runtime, reference, verdict)


def _first_difference(verdict: Verdict, where: str, found: np.ndarray, expected: np.ndarray) -> Verdict:
    """The verdict after one more comparison of f32[S, N]."""
    error = gap(found, expected)
    if error <= TOLERANCE:
        return replace(verdict, error=max(error, verdict.error))
    if found.shape != expected.shape:
        return replace(verdict, how=WRONG, error=error, detail=f"{where}: {found.shape}, not {expected.shape}")
    rows = np.abs(found - expected).reshape(len(found), -1).max(-1)
    rows = np.flatnonzero(~(rows <= TOLERANCE * np.abs(expected).max()))
    detail = f"{where}: {len(rows)} of {len(found)} rows, the first is {rows[0] if len(rows) else 0}; was {verdict.how}"
    return replace(verdict, how=WRONG, error=error, detail=f"{detail}; {verdict.detail}")


def pieces(seed: int) -> list[int]:
    """Sizes that add up to TOKENS: awkward ones, and three single tokens at the end."""
    r = random.Random(seed)
    sizes: list[int] = []
    while sum(sizes) < TOKENS - 3:
        sizes.append(min(r.choice((1, 2, 7, 31, 32, 33, 64, 100, 129)), TOKENS - 3 - sum(sizes)))
    return [*sizes, 1, 1, 1]


def _in_pieces(runtime: Runtime, reference: Reference, verdict: Verdict) -> Verdict:
    """A decoder: all tokens at once, then in pieces. Each piece is right where the reference, given the tokens up to
    its end, has the same rows."""
    ids = inputs_of(verdict.spec)
    assert isinstance(ids, np.ndarray)
    expected = reference(ids)
    if expected is None:
        return _beyond(verdict, lambda: runtime.forward(ids))
    verdict = _first_difference(verdict, "all at once", runtime.forward(ids), expected)
    end = 0
    with runtime.sequence() as sequence:
        for size in pieces(verdict.spec.seed):
            if verdict.bad:
                return verdict
            begin, end = end, end + size
            found = runtime.step([(sequence, ids[begin:end], "all")])
            expected = reference(ids[:end])
            assert expected is not None
            verdict = _first_difference(verdict, f"tokens {begin} to {end}", found, expected[begin:end])
    return verdict


def _beyond(verdict: Verdict, call: Callable[[], object]) -> Verdict:
    """Where the reference refuses (an index outside of its table), llmc refuses or stays within its own memory."""
    try:
        call()
    except LlmcError as error:
        return replace(verdict, how=REFUSED, detail=str(error))
    return replace(verdict, how=BOUNDED)


def _as_encoder(runtime: Runtime, reference: Reference, verdict: Verdict) -> Verdict:
    """An encoder: texts of several lengths in one batch."""
    ids = inputs_of(verdict.spec)
    assert isinstance(ids, np.ndarray)
    texts = [ids[:length] for length in _LENGTHS]
    if reference(ids) is None:
        return _beyond(verdict, lambda: runtime.encode([text.tolist() for text in texts]))
    found = runtime.encode([text.tolist() for text in texts])
    for text, outputs in zip(texts, found, strict=True):
        expected = reference(text)
        if expected is None or verdict.bad:
            continue
        assert isinstance(outputs, dict)
        rows = next((v for v in outputs.values() if np.asarray(v).shape == expected.shape), None)
        if rows is None:
            shapes = {name: np.asarray(v).shape for name, v in outputs.items()}
            return replace(verdict, how=WRONG, detail=f"no output of shape {expected.shape}: {shapes}")
        verdict = _first_difference(verdict, f"{len(text)} tokens", np.asarray(rows), expected)
    return verdict


def _as_arrays(runtime: Runtime, reference: OnnxReference, verdict: Verdict) -> Verdict:
    """A graph of arrays, at several sizes."""
    for length in _LENGTHS:
        given = inputs_of(verdict.spec, length)
        assert isinstance(given, dict)
        expected = reference.arrays(given)
        if expected is None or verdict.bad:
            continue
        found = np.asarray(next(iter(runtime.run(given).values())))[0]
        verdict = _first_difference(verdict, f"{length} rows", found.swapaxes(0, 1), expected.swapaxes(0, 1))
    return verdict


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many models were taken in which way, and of each unusual part how many were recognised whole."""
    total = len(verdicts)
    counts = Counter(verdict.how for verdict in verdicts)
    whole = sum(verdict.whole for verdict in verdicts)
    lines = [f"{total} hard models: " + ", ".join(f"{count} {how}" for how, count in counts.most_common())]
    lines.append(f"recognised whole (attention fused, cache paged): {whole} of {total}, {whole / max(total, 1):.0%}")
    by_part: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        for slot in verdict.spec.unusual:
            by_part.setdefault(f"{slot}: {verdict.spec.parts[slot].name}", []).append(verdict)
    for name, found in sorted(by_part.items()):
        ways = Counter(verdict.how for verdict in found)
        recognised = sum(verdict.whole for verdict in found)
        counted = ", ".join(f"{count} {how}" for how, count in ways.most_common())
        lines.append(f"  {name:40} {recognised:3} of {len(found):3} whole; {counted}")
    return "\n".join(lines)
