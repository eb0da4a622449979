"""The same answer in any company: a row's bits depend on its own sequence alone.

Not on the neighbours in its step, the number of threads, how its prompt was cut into steps, or what of it the cache
held already. On machines without tile registers a token has the same bits in a prompt and decoded by itself, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from kernel_harness import CACHE
from tiny_encoders import make_encoder, write_encoder_tokenizer
from tiny_models import make_tiny

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.runtime.runtime import Runtime
from llmc.runtime.sequence import Sequence

PYCODER = Path(__file__).parents[1] / "examples" / "pycoder"
SLOW = pytest.mark.slow  # what differs from the others in its kernels alone, whose bits test_x86_company.py has
SCHEMES = ("int4", "none", *(pytest.param(scheme, marks=SLOW) for scheme in ("int8", "bf16", "f16")))
BORDER = 64  # prompts are cut at multiples of this
PROMPT, DECODED = 620, 6  # attention takes a context in parts of 512 tokens: the rows cross from one into the next
NEIGHBOUR = 1500


def ids_of(seed: int, count: int, vocabulary: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, vocabulary, count).astype(np.int32)


@dataclass(frozen=True)
class Company:
    """One artifact with one thread and with two, and what its rows are when they are alone: float32 [tokens, vocab]."""

    one: Runtime
    two: Runtime
    tokens: np.ndarray  # a prompt and the tokens that are decoded behind it
    prompt: int
    alone: np.ndarray

    @property
    def decoded(self) -> np.ndarray:
        return self.tokens[self.prompt :]


def in_company(artifact: Path, prompt: int = PROMPT, vocabulary: int = 300) -> Company:
    one, two = (Runtime.load(artifact, threads=threads) for threads in (1, 2))
    tokens = ids_of(0, prompt + DECODED, vocabulary)
    with one.sequence() as sequence:
        rows = [one.step([(sequence, tokens[:prompt], "all")])]
        rows += [decode(one, [sequence], [token]) for token in tokens[prompt:]]
    return Company(one, two, tokens, prompt, np.concatenate(rows))


def decode(runtime: Runtime, sequences: list[Sequence], tokens: list[int] | np.ndarray) -> np.ndarray:
    """One token more of each sequence: logits [sequences, vocab]."""
    with runtime.lock:
        places = runtime.decode(sequences, [int(token) for token in tokens])
        return np.concatenate([runtime.fetch_logits(place) for place in places])


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit."""
    assert found.shape == expected.shape
    differ = int((found.view(np.int32) != expected.view(np.int32)).any(axis=-1).sum())
    assert not differ, f"{differ} of {len(found)} rows differ, by {np.abs(found - expected).max()} at most"


@cache
def compiled(family: str, scheme: str, **changes: int) -> Company:
    folder = CACHE.parent / "llmc-test-company"
    name = "-".join([family, scheme, *(f"{key}{value}" for key, value in changes.items())])
    sizes = {"n_positions" if family == "gpt2" else "max_position_embeddings": 2048, **changes}
    directory = make_tiny(family, folder / name, **sizes)
    options = CompileOptions(quantization=scheme, max_step=256, max_context=2048, kernel_cache=CACHE)
    compile_model(str(directory), folder / f"{name}.so", options)
    return in_company(folder / f"{name}.so")


@pytest.fixture(scope="module", params=SCHEMES)
def company(request: pytest.FixtureRequest) -> Company:
    return compiled("llama", request.param)


# Other heads, windows, softcaps, biases and norms; one key head for each query head, windows that end within a page.
@pytest.fixture(
    scope="module",
    params=["gemma2", "bloom", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "qwen3", "mistral_odd"))],
)
def other(request: pytest.FixtureRequest) -> Company:
    return compiled(request.param, "none")


def test_a_token_is_the_same_in_a_prompt_and_by_itself(company: Company) -> None:
    runtime, tokens = company.two, company.tokens
    same(runtime.forward(tokens), company.alone)
    begin = company.prompt - 120
    with runtime.sequence() as sequence:
        runtime.step([(sequence, tokens[:begin], "none")])
        rows = [decode(runtime, [sequence], [token]) for token in tokens[begin:]]
    same(np.concatenate(rows), company.alone[begin:])


def test_other_models_too(other: Company) -> None:
    check_pieces(other, (64, 7))
    check_batch(other, 5)
    same(other.two.forward(other.tokens), other.alone)


def check_pieces(company: Company, pieces: tuple[int, ...]) -> None:
    """A prompt in steps of so many tokens, in turn; two threads."""
    runtime, tokens = company.two, company.tokens[: company.prompt]
    with runtime.sequence() as sequence:
        rows, begin, turn = [], 0, 0
        while begin < len(tokens):
            part = tokens[begin : begin + pieces[turn % len(pieces)]]
            rows.append(runtime.step([(sequence, part, "all")]))
            begin, turn = begin + len(part), turn + 1
        same(np.concatenate(rows), company.alone[: company.prompt])
        runtime.pool.drop_kept()


@pytest.mark.parametrize("pieces", [(64,), (128,), (192, 64), (1, 63), (17, 100, 3)])
def test_any_pieces_of_a_prompt(company: Company, pieces: tuple[int, ...]) -> None:
    check_pieces(company, pieces)


def test_beside_a_long_neighbour(company: Company) -> None:
    """In its steps there is a text of 1,500 tokens: first its prompt, in chunks, then its decoding."""
    for runtime in (company.one, company.two):
        with runtime.sequence() as sequence, runtime.sequence() as other:
            runtime.step([(sequence, company.tokens[: company.prompt], "none")])
            neighbour = ids_of(1, NEIGHBOUR)
            rows, chunk = [], NEIGHBOUR // (len(company.decoded) - 2)
            for number, token in enumerate(company.decoded):
                part = neighbour[number * chunk : (number + 1) * chunk]
                beside = (other, part if len(part) else neighbour[:1], "last")
                rows.append(runtime.step([(sequence, [token], "last"), beside])[:1])
            assert other.length >= NEIGHBOUR
            same(np.concatenate(rows), company.alone[company.prompt :])
        runtime.pool.drop_kept()


def test_a_prompt_beside_a_long_neighbour(company: Company) -> None:
    for runtime in (company.one, company.two):
        with runtime.sequence() as sequence, runtime.sequence() as other:
            runtime.step([(other, ids_of(1, NEIGHBOUR), "none")])
            rows = [
                runtime.step([(other, [5], "last"), (sequence, part, "all")])[1:]
                for part in np.split(company.tokens[: company.prompt], (64, 192, 448))
            ]
            same(np.concatenate(rows), company.alone[: company.prompt])
        runtime.pool.drop_kept()


def check_batch(company: Company, size: int) -> None:
    """Texts of other lengths beside it, all decoded together."""
    for runtime in (company.one, company.two):
        sequences = [runtime.sequence() for _ in range(size)]
        mine = size // 2
        prompts = [ids_of(10 + index, 1 + 37 * index % 400) for index in range(size)]
        prompts[mine] = company.tokens[: company.prompt]
        first = runtime.step([(one, ids, "last") for one, ids in zip(sequences, prompts, strict=True)])
        rows = [first[mine : mine + 1]]
        for token in company.decoded:
            tokens = [int(token) if index == mine else 7 + index for index in range(size)]
            rows.append(decode(runtime, sequences, tokens)[mine : mine + 1])
        same(np.concatenate(rows), company.alone[company.prompt - 1 :])
        for one in sequences:
            one.close()
        runtime.pool.drop_kept()


@pytest.mark.parametrize("size", [2, 5, 9, 17, 33])
def test_batches(company: Company, size: int) -> None:
    check_batch(company, size)


@pytest.mark.parametrize(("held", "left"), [(32, 1), (70, 3), (300, 40), (PROMPT, 12), (544, 1)])
def test_after_a_prefix_is_found(company: Company, held: int, left: int) -> None:
    """Another text began with the first `held` tokens: their pages are taken over, and `left` tokens more are read."""
    for runtime in (company.one, company.two):
        runtime.pool.drop_kept()
        with runtime.sequence() as before:
            runtime.step([(before, np.concatenate([company.tokens[:held], ids_of(2, 40)]), "none")])
        with runtime.sequence() as sequence:
            found = held // runtime.page * runtime.page
            prompt = company.tokens[: found + left]
            assert sequence.adopt_prefix(prompt) == found
            same(runtime.step([(sequence, prompt[found:], "all")]), company.alone[found : len(prompt)])
            behind = company.tokens[len(prompt) :][:2]
            rows = [decode(runtime, [sequence], [token]) for token in behind]
            same(np.concatenate(rows), company.alone[len(prompt) :][:2])
        runtime.pool.drop_kept()


def test_rows_that_check_a_guess(company: Company) -> None:
    """Tokens that were guessed, in one step: as if decoded one after the other."""
    runtime = company.two
    for begin in (company.prompt, company.prompt - 3):
        with runtime.sequence() as sequence:
            runtime.step([(sequence, company.tokens[:begin], "none")])
            same(runtime.step([(sequence, company.tokens[begin:], "all")]), company.alone[begin:])
            sequence.rollback(DECODED - 2)
            row = decode(runtime, [sequence], company.tokens[len(company.tokens) - DECODED + 2 :][:1])
            same(row, company.alone[len(company.tokens) - DECODED + 2 :][:1])
        runtime.pool.drop_kept()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4", "none"])
def test_a_trained_model(scheme: str, tmp_path: Path) -> None:
    options = CompileOptions(quantization=scheme, max_step=256, kernel_cache=CACHE)
    compile_model(str(PYCODER), tmp_path / "model.so", options)
    trained = in_company(tmp_path / "model.so", prompt=300)
    same(trained.two.forward(trained.tokens), trained.alone)
    check_pieces(trained, (64,))
    check_pieces(trained, (1, 63, 17))
    for size in (2, 9, 17):
        check_batch(trained, size)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("bert", "int8"),
        ("modernbert", "none"),
        *(pytest.param(*case, marks=SLOW) for case in (("bert", "none"), ("modernbert", "int8"))),
    ],
)
def test_texts_of_an_encoder(family: str, scheme: str, tmp_path: Path) -> None:
    """Each text alone, with one thread, as in a batch with others, with two."""
    directory = make_encoder(family, tmp_path / family, max_position_embeddings=640)
    write_encoder_tokenizer(directory, family, 640)
    options = CompileOptions(quantization=scheme, kernel_cache=CACHE)
    compile_model(str(directory), tmp_path / "model.so", options)
    one, two = (Runtime.load(tmp_path / "model.so", threads=threads) for threads in (1, 2))
    texts = [ids_of(seed, length).tolist() for seed, length in enumerate((3, 70, 1, 33, 600, 129, 64, 17, 5))]
    together = two.encode(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = one.encode([text])
        for name, rows in alone.items():
            same(np.atleast_2d(found[name]), np.atleast_2d(rows))
