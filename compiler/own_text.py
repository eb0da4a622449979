"""Texts to measure a model on: a decoder writes them itself, an encoder gets ids by rank, and a file may add to them.

A decoder's text is what the model writes id by id, in 8 bits and compiled for this machine. Where it does not run
here, or is so small that compiling takes longer than all else, the text begins as random ids, and every id is drawn
anew from what the model predicts behind the ids before it, all of them in one pass. After `ROUNDS` passes most of what
a layer sees is like what it sees of real text, and a pass costs as much as a prompt. (The same random numbers are used
in every pass: with as many passes as ids, the text is what the model writes.)

Vocabularies of encoders are mostly in the order of how often their words occur; id n is drawn in proportion to
1 / (n + 1), and the tokenizer's own ids stand around the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.ir.evaluate import Data, LoadParam, bind_symbols, evaluate_values
from llmc.compiler.ir.graph import Graph, topological
from llmc.compiler.ir.llm import Linear
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.passes.schemes import find_head
from llmc.compiler.scenario import computed, prompt_inputs
from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.frontends.lifted import Lifted

Ids = NDArray[np.int32]

SEQUENCES, LENGTH = 16, 512  # of a decoder
ROUNDS = 1  # measured: KL of the example model 10.1e-3 without, 7.5 with one, 7.4 with two
ENCODER_SEQUENCES, ENCODER_LENGTH = 512, 16
ENCODER_DAMPING = 0.1  # of moments: ids by rank are less like an encoder's texts than a decoder's own text is
FILE_TOKENS = 1 << 15  # of a file, from its beginning
CHUNK = 64  # rows of a text whose logits are there at once
MOST_LOGITS = 1 << 27  # held at once where they cannot be had by rows, 512 MiB


def random_texts(
    lifted: Lifted, vocabulary: int, seed: int, sequences: int | None = None, length: int | None = None
) -> list[Ids]:
    """Random ids: what a decoder's own text begins as, and all that an encoder gets.

    sequences, length: of a decoder, in place of `SEQUENCES` and `LENGTH`."""
    random = np.random.default_rng(seed)
    if lifted.task != "generate":
        length = max(1, min(ENCODER_LENGTH, lifted.max_context))
        before, after = _around(lifted, length)
        chances = 1 / (1 + np.arange(vocabulary))
        inner = random.choice(
            vocabulary, (ENCODER_SEQUENCES, length - len(before) - len(after)), p=chances / chances.sum()
        )
        return [np.array([*before, *ids, *after], np.int32) for ids in inner]
    length = max(1, min(length or LENGTH, lifted.max_context))
    texts = random.integers(0, vocabulary, (sequences or SEQUENCES, length)).astype(np.int32)
    bos = (lifted.text.facts or {}).get("bos_id")
    if isinstance(bos, int) and bos < vocabulary:
        texts[:, 0] = bos
    return list(texts)


def uniform_texts(lifted: Lifted, vocabulary: int, seed: int, sequences: int, length: int) -> list[Ids]:
    """An encoder's texts of ids that are all as likely: to measure on, as they are unlike those of `random_texts`."""
    length = max(1, min(length, lifted.max_context))
    before, after = _around(lifted, length)
    inner = np.random.default_rng(seed).integers(0, vocabulary, (sequences, length - len(before) - len(after)))
    return [np.array([*before, *ids, *after], np.int32) for ids in inner]


def _around(lifted: Lifted, length: int) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text; none where they leave no room for one."""
    tokenizer = lifted.text.tokenizer()
    ids = [] if tokenizer is None else tokenizer.encode("").ids
    return (ids[:1], ids[1:]) if len(ids) < length else ([], [])


def texts_of_file(path: Path, lifted: Lifted, vocabulary: int) -> list[Ids]:
    """A file's texts as the model would get them, `FILE_TOKENS` in all: for a decoder one text in windows, for an
    encoder a text a line. A name that ends in .jsonl has objects with a "text" a line. CompileError where there is no
    text.
    """
    tokenizer = lifted.text.tokenizer()
    if tokenizer is None:
        raise CompileError(f"--calibrate {path}: the model has no tokenizer; give --tokenizer DIR")
    length = max(2, min(LENGTH, lifted.max_context))
    lines = _lines(path)
    if lifted.task == "generate":
        bos = (lifted.text.facts or {}).get("bos_id")
        start = [bos] if isinstance(bos, int) else []
        ids = tokenizer.encode("\n".join(lines), add_special_tokens=False).ids[:FILE_TOKENS]
        step = length - len(start)
        found = [[*start, *ids[at : at + step]] for at in range(0, len(ids), step)]
    else:
        tokenizer.enable_truncation(length)
        found, left = [], FILE_TOKENS
        for line in lines:
            found.append(tokenizer.encode(line).ids[:left])
            left -= len(found[-1])
            if left <= 0:
                break
    texts = [np.array(ids, np.int32) for ids in found if ids and max(ids) < vocabulary]
    if not texts:
        raise CompileError(f"--calibrate {path}: there is no text in it that this model could read")
    return texts


def _lines(path: Path) -> list[str]:
    """A file's lines that are not empty, or the texts of its objects."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix != ".jsonl":
            return lines
        texts = [json.loads(line)["text"] for line in lines]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        return texts
    except OSError as error:
        raise CompileError(f"--calibrate {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        kind = 'lines of JSON objects with a "text"' if path.suffix == ".jsonl" else "text in UTF-8"
        raise CompileError(f"--calibrate {path} is no file of {kind}") from error


def chances_of(texts: Sequence[Ids], seed: int) -> list[NDArray[np.float64]]:
    """The random numbers, 0 to 1, by which the ids of each text are drawn."""
    return [np.random.default_rng((seed, number)).random(len(text)) for number, text in enumerate(texts)]


def own_texts(
    graph: Graph,
    load: LoadParam,
    texts: Sequence[Ids],
    vocabulary: int,
    seed: int,
    pool: Executor | None = None,
    tell: Callable[[], None] = lambda: None,
) -> list[Ids]:
    """Texts that a decoder predicts, from random ones. graph: with `logits` for every row of a step; pool: of threads
    for texts; tell: called after each text of each round, `ROUNDS` times a text."""
    chances = chances_of(texts, seed)
    texts, head = list(texts), _Head.of(graph, load)
    # Without a head of its own, all logits of the texts are there at once.
    most = max(len(text) for text in texts)
    at_once = len(texts) if isinstance(head.start, Linear) else max(1, MOST_LOGITS // (vocabulary * most))
    for _ in range(ROUNDS):
        for first in range(0, len(texts), at_once):
            some = slice(first, first + at_once)
            runs = [prompt_inputs(graph, text) for text in texts[some]]
            (states,) = [data for value, data in computed(graph, [head.x], runs, load, {}, pool) if value is head.x]

            def redrawn(text: Ids, state: Data, chance: NDArray[np.float64]) -> Ids:
                drawn = [
                    draw(logits[:, :vocabulary], chance[begin + 1 : begin + 1 + len(logits)])
                    for begin, logits in head.predictions(text, state)
                ]
                return np.concatenate([text[:1], *drawn])

            for number, text in enumerate(
                (map if pool is None else pool.map)(redrawn, texts[some], states, chances[some]), first
            ):
                texts[number] = text
                tell()
    return texts


@dataclass(frozen=True)
class _Head:
    """What is behind a graph's last hidden states: logits of some rows at a time, as those of all take much memory.

    start: the head, or the logits where none was found. known: its weight.
    """

    graph: Graph
    start: Value
    known: Mapping[Value, Data]
    load: LoadParam

    @classmethod
    def of(cls, graph: Graph, load: LoadParam) -> _Head:
        head, logits = find_head(graph), graph.output("logits")
        if head is None:
            return cls(graph, logits, {}, load)
        inputs = {value for value in topological([logits], [head.x, head.w]) if isinstance(value, Input)}
        if inputs:  # something of each token joins behind the head
            return cls(graph, logits, {}, load)
        return cls(graph, head, {head.w: evaluate_values([head.w], {}, load, {})["0"]}, load)

    @property
    def x(self) -> Value:
        """What has to be computed for all rows: the head's input, or the logits."""
        return self.start.x if isinstance(self.start, Linear) else self.start

    def predictions(self, text: Ids, state: Data) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, logits [n, vocabulary]) of a text's rows, without the last one."""
        assert isinstance(state, np.ndarray)
        rows = len(text) - 1
        if not isinstance(self.start, Linear):
            yield 0, state.reshape(len(text), -1)[:rows]
            return
        logits = self.graph.output("logits")
        for begin in range(0, rows, CHUNK):
            count = min(CHUNK, rows - begin)
            binding = bind_symbols(self.graph, prompt_inputs(self.graph, text[:count]))
            known = {**self.known, self.x: state[..., begin : begin + count, :]}
            found = evaluate_values([logits], known, self.load, binding)["0"]
            assert isinstance(found, np.ndarray)
            yield begin, found.reshape(count, -1)


def draw(logits: NDArray[np.float32], chances: NDArray[np.float64]) -> Ids:
    """One id for each row of logits [n, vocabulary], by numbers from 0 to 1."""
    drawn = np.empty(len(logits), np.int32)
    for row, chance in enumerate(chances):
        sums = np.cumsum(np.exp(logits[row].astype(np.float64) - float(logits[row].max())))
        drawn[row] = min(int(np.searchsorted(sums, chance * sums[-1], side="right")), logits.shape[1] - 1)
    return drawn
