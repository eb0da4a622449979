"""The KV cache: whatever is shared, copied, rolled back or evicted, a sequence sees its own tokens and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from llmc.runtime.errors import CacheFullError, ContextError, RuntimeStateError
from llmc.runtime.host import Host
from llmc.runtime.kv_cache import CacheBuffers
from llmc.runtime.manifest import LayerCache
from llmc.runtime.runtime import Runtime
from llmc.runtime.sequence import Sequence

PAGE_BYTES = 32 * 4 * 4 * 2  # 32 tokens, two keys and two values in f32, two layers
IDS = np.random.default_rng(11).integers(0, fake_artifact.VOCAB, 400).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("kv") / "model.so")


@pytest.fixture
def runtime(path: Path) -> Runtime:
    return Runtime.load(path, threads=2, kv_memory=40 * PAGE_BYTES)


def last(ids: list[int]) -> np.ndarray:
    return fake_artifact.reference_logits(ids)[-1]


@pytest.mark.parametrize("sizes", [[1], [7], [31], [32], [33], [129], [1, 1, 31], [16, 17, 18], [47, 1, 50], [48, 200]])
def test_any_split_of_a_prompt_gives_the_same_logits(runtime: Runtime, sizes: list[int]) -> None:
    ids = IDS[: sum(sizes)]
    expected = fake_artifact.reference_logits(ids)
    with runtime.sequence() as sequence:
        start = 0
        for size in sizes:
            logits = runtime.step([(sequence, ids[start : start + size], "all")])
            assert (logits == expected[start : start + size]).all()
            start += size
        assert sequence.tokens.tolist() == ids
        assert sequence.page_count == -(-len(ids) // 32)
    assert (runtime.forward(ids) == expected).all()


def test_a_batch_gives_what_its_sequences_give_alone(runtime: Runtime) -> None:
    """Prompts and single tokens mixed, over several steps, with any rows asked for."""
    sequences = [runtime.sequence() for _ in range(7)]
    texts: list[list[int]] = [[] for _ in sequences]
    random = np.random.default_rng(5)
    for _ in range(6):
        requests = []
        expected = []
        for sequence, text in zip(sequences, texts, strict=True):
            ids = random.integers(0, fake_artifact.VOCAB, int(random.choice([1, 1, 1, 5, 33]))).tolist()
            rows = str(random.choice(["all", "last", "none"]))
            text += ids
            requests.append((sequence, ids, rows))
            if rows != "none":
                reference = fake_artifact.reference_logits(text)
                expected.append(reference[-len(ids) :] if rows == "all" else reference[-1:])
        logits = runtime.step(requests)  # type: ignore[arg-type]
        assert (logits == np.concatenate(expected)).all()
        runtime.pool.check()


def test_rows_of_a_step_are_validated_before_anything_changes(runtime: Runtime) -> None:
    with runtime.sequence() as sequence, runtime.sequence() as other:
        sequence.append([1, 2, 3])
        before = runtime.pool.available
        for bad in ([], [300], [-1], [1.5], [[1]], ["a"]):
            with pytest.raises(RuntimeStateError):
                runtime.step([(other, [5], "all"), (sequence, bad, "all")])  # type: ignore[list-item]
        with pytest.raises(RuntimeStateError, match="only once"):
            runtime.step([(sequence, [4], "last"), (sequence, [5], "last")])
        with pytest.raises(RuntimeStateError, match="at least one"):
            runtime.step([])
        assert (len(sequence), len(other), runtime.pool.available) == (3, 0, before)
        assert (sequence.append([4]) == last([1, 2, 3, 4])).all()


def test_a_fork_shares_pages_until_it_differs(runtime: Runtime) -> None:
    sequence = runtime.sequence()
    sequence.append(IDS[:70])
    before = runtime.pool.available
    forks = [sequence.fork() for _ in range(5)]
    assert runtime.pool.available == before
    for index, fork in enumerate(forks):
        assert (fork.append([index]) == last([*IDS[:70], index])).all()
    assert runtime.pool.available == before - 5  # the page that was half full, once each
    assert (sequence.append([9, 9]) == last([*IDS[:70], 9, 9])).all()
    for fork in forks:
        fork.close()
    assert (sequence.append([8]) == last([*IDS[:70], 9, 9, 8])).all()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (lambda one: (one, [5], "some"), "one of all, last, none, not 'some'"),
        (lambda one: (one, [5], True), "one of all, last, none, not True"),
        (lambda one: (one, [5], None), "one of all, last, none, not None"),
        (lambda one: (one, [5]), "requests of \\(sequence, ids, rows\\)"),
        (lambda one: one, "requests of \\(sequence, ids, rows\\)"),
        (lambda one: (None, [5], "all"), "sequences that sequence\\(\\) made, not None"),
        (lambda one: (one, [[5], [5, 6]], "all"), "a list of integers"),
        (lambda one: (one, {5}, "all"), "a list of integers, not .5.$"),
    ],
)
def test_requests_of_a_step_that_cannot_be_are_named(
    runtime: Runtime, request_: Callable[[Sequence], object], said: str
) -> None:
    with runtime.sequence() as sequence:
        with pytest.raises(RuntimeStateError, match=said):
            runtime.step([request_(sequence)])  # type: ignore[list-item]
        assert len(sequence) == 0


def test_requests_that_are_no_list(runtime: Runtime) -> None:
    with pytest.raises(RuntimeStateError, match="at least one"):
        runtime.step(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1.5, None, "1", True])
def test_numbers_of_tokens_are_integers(runtime: Runtime, count: object) -> None:
    with pytest.raises(RuntimeStateError, match="expected is"):
        runtime.sequence(count)  # type: ignore[arg-type]
    with runtime.sequence(np.int64(3)) as sequence:  # type: ignore[arg-type]
        sequence.append(IDS[:9])
        with pytest.raises(RuntimeStateError, match="rollback"):
            sequence.rollback(count)  # type: ignore[arg-type]
        sequence.rollback(np.int64(2))  # type: ignore[arg-type]
        assert len(sequence) == 7


def test_a_prefix_is_of_ids_of_the_vocabulary(runtime: Runtime) -> None:
    """What is no id does not become one by losing its upper bits or its fraction."""
    with runtime.sequence() as first:
        first.append(IDS[:100])
    with runtime.sequence() as second:
        for wrong in (np.array(IDS[:100]) + 2**32, np.array(IDS[:100]) + 0.5):
            with pytest.raises(RuntimeStateError, match="token id"):
                second.adopt_prefix(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_rollback_forgets(runtime: Runtime, length: int, count: int) -> None:
    with runtime.sequence() as sequence:
        sequence.append(IDS[:length])
        if count > length:
            with pytest.raises(RuntimeStateError, match="rollback"):
                sequence.rollback(count)
            return
        sequence.rollback(count)
        kept = IDS[: length - count]
        assert sequence.tokens.tolist() == kept
        assert sequence.page_count == -(-len(kept) // 32)
        assert (sequence.append([250, 251]) == last([*kept, 250, 251])).all()
        # What was written over must not be found as a prefix.
        with runtime.sequence() as other:
            other.adopt_prefix(IDS)
            assert (other.append(IDS[len(other) : 110]) == last(IDS[:110])).all()


def test_the_next_turn_finds_the_pages_of_the_last(runtime: Runtime) -> None:
    with runtime.sequence() as first:
        first.append(IDS[:100])
    with runtime.sequence() as second:
        assert second.adopt_prefix(IDS[:200]) == 96
        assert (second.append(IDS[96:200]) == last(IDS[:200])).all()
        with runtime.sequence() as third:  # while it is in use, too
            assert third.adopt_prefix(IDS[:200]) == 192
            assert third.pages[:6].tolist() == second.pages[:6].tolist()
    with runtime.sequence() as same:
        assert same.adopt_prefix(IDS[:96]) == 64  # one token at least is left to run
        with pytest.raises(RuntimeStateError, match="empty"):
            same.adopt_prefix(IDS)
    with runtime.sequence() as other:
        assert other.adopt_prefix([IDS[0] + 1, *IDS[1:200]]) == 0


def test_a_prefix_is_found_by_all_that_comes_before_it(runtime: Runtime) -> None:
    """The same page of tokens after another beginning is another page."""
    same = [7] * 32
    with runtime.sequence() as one, runtime.sequence() as two:
        one.append([*IDS[:32], *same])
        two.append([*IDS[32:64], *same])
    with runtime.sequence() as third:
        assert third.adopt_prefix([*IDS[32:64], *same, 1]) == 64
        assert (third.append([1]) == last([*IDS[32:64], *same, 1])).all()


def test_a_page_after_changed_tokens_is_not_a_child_of_the_old_ones(runtime: Runtime) -> None:
    with runtime.sequence() as first:
        first.append(IDS[:64])
        second = first.fork()
        second.rollback(10)
        second.append([1] * 10 + IDS[64:96])
        with runtime.sequence() as third:
            assert third.adopt_prefix(IDS[:97]) == 64
            assert (third.append(IDS[64:97]) == last(IDS[:97])).all()
        with runtime.sequence() as fourth:
            changed = [*IDS[:54], *[1] * 10, *IDS[64:97]]
            assert fourth.adopt_prefix(changed) == 96
            assert (fourth.append(changed[96:]) == last(changed)).all()


def test_a_full_cache_is_a_clear_error_and_loses_nothing(path: Path) -> None:
    runtime = Runtime.load(path, threads=1, kv_memory=4 * PAGE_BYTES)
    sequence = runtime.sequence()
    sequence.append(IDS[:60])
    with pytest.raises(CacheFullError, match="kv_memory"):
        sequence.append(IDS[60:160])
    with runtime.sequence() as other, pytest.raises(CacheFullError):
        runtime.step([(other, IDS[:30], "last"), (sequence, IDS[60:130], "last")])
    assert len(sequence) == 60
    assert runtime.pool.available == 2
    runtime.pool.check()
    assert (sequence.append(IDS[60:128]) == last(IDS[:128])).all()
    with pytest.raises(RuntimeStateError, match="holds no page"):
        Runtime.load(path, threads=1, kv_memory=5)


def test_the_oldest_kept_pages_go_first(path: Path) -> None:
    runtime = Runtime.load(path, threads=1, kv_memory=4 * PAGE_BYTES)
    for text in (IDS[:64], IDS[100:164], IDS[200:232]):
        with runtime.sequence() as sequence:
            sequence.append(text)
    assert runtime.pool.kept == 4
    with runtime.sequence() as sequence:
        assert sequence.adopt_prefix(IDS[:64]) == 32  # its second page made room: the tail before the head
    with runtime.sequence() as sequence:
        assert sequence.adopt_prefix(IDS[100:200]) == 64
    with runtime.sequence() as sequence:
        sequence.append([1] * 128)
    assert runtime.pool.kept == 4
    with runtime.sequence() as sequence:
        assert sequence.adopt_prefix(IDS[100:200]) == 0
    runtime.pool.drop_kept()
    runtime.pool.check()
    assert runtime.pool.kept == 0


def test_the_context_is_a_limit(runtime: Runtime) -> None:
    with runtime.sequence() as sequence:
        sequence.append(IDS[:399])
        with pytest.raises(ContextError, match="--max-context"):
            sequence.append([1, 2])
        assert (sequence.append([1]) == last([*IDS[:399], 1])).all()
        with pytest.raises(ContextError):
            sequence.append([1])


def test_a_dropped_sequence_gives_its_pages_back(runtime: Runtime) -> None:
    runtime.sequence().append(IDS[:100])
    with runtime.sequence() as sequence:
        assert sequence.adopt_prefix(IDS) == 96
        assert runtime.pool.available == runtime.pool.capacity - 3
    assert runtime.pool.available == runtime.pool.capacity
    runtime.pool.check()


def test_closed_and_foreign_sequences_are_refused(runtime: Runtime, path: Path) -> None:
    sequence = runtime.sequence()
    sequence.append([1])
    sequence.close()
    sequence.close()
    for use in (lambda: sequence.append([1]), sequence.fork, lambda: sequence.rollback(0)):
        with pytest.raises(RuntimeStateError, match="closed"):
            use()
    with pytest.raises(RuntimeStateError, match="another runtime"):
        Runtime.load(path, threads=1).step([(runtime.sequence(), [1], "last")])


def test_a_failing_step_leaves_sequences_as_they_were(tmp_path: Path) -> None:
    source = fake_artifact.STEP.replace("if (s->sizes", "if (s->ids[0] == 13) return 3;\n    if (s->sizes", 1)
    runtime = Runtime.load(fake_artifact.write(tmp_path / "model.so", source=source), threads=1)
    with runtime.sequence() as sequence:
        sequence.append(IDS[:40])
        before = runtime.pool.available
        with pytest.raises(RuntimeStateError, match="code 3"):
            sequence.append([13, *IDS[:60]])
        assert (len(sequence), runtime.pool.available) == (40, before)
        assert (sequence.append([14]) == last([*IDS[:40], 14])).all()


def test_without_a_cache_every_step_sees_the_whole_sequence(tmp_path: Path) -> None:
    facts = fake_artifact.manifest()
    step = {**facts["step"], "state": "none"}  # type: ignore[dict-item]
    path = fake_artifact.write(tmp_path / "model.so", source=fake_artifact.STATELESS_STEP, step=step, kv={"layers": []})
    runtime = Runtime.load(path, threads=1)
    assert (runtime.forward(IDS[:48]) == fake_artifact.reference_logits(IDS[:48])).all()
    with runtime.sequence() as sequence:
        assert (sequence.append(IDS[:5]) == last(IDS[:5])).all()
        fork = sequence.fork()
        assert (sequence.append([3]) == last([*IDS[:5], 3])).all()
        sequence.rollback(2)
        assert (sequence.append([4]) == last([*IDS[:4], 4])).all()
        logits = runtime.step([(fork, [8, 9], "all"), (sequence, [1], "last")])
        assert (logits[:2] == fake_artifact.reference_logits([*IDS[:5], 8, 9])[-2:]).all()
        assert (logits[2] == last([*IDS[:4], 4, 1])).all()
    with pytest.raises(ContextError):
        runtime.forward(IDS[:49])
    assert runtime.generate([1, 2, 3], max_tokens=4) == runtime.generate_batch([[1, 2, 3]], max_tokens=4)[0]


def test_buffers_are_laid_out_as_kernels_expect() -> None:
    layers = (LayerCache(2, 3, 5, "float16", None), LayerCache(1, 4, 4, "float32", 64))
    buffers = CacheBuffers(Host(1), layers, 6, 32)
    assert [array.shape for array in buffers.arrays] == [(6, 2, 3, 32), (6, 2, 32, 5), (6, 1, 4, 32), (6, 1, 32, 4)]
    assert [str(array.dtype) for array in buffers.arrays] == ["float16", "float16", "float32", "float32"]
    assert all(array.__array_interface__["data"][0] % 4096 == 0 for array in buffers.arrays)
    for array in buffers.arrays:
        array[2] = 7
    buffers.copy(2, 5)
    assert all((array[5] == 7).all() and (array[4] == 0).all() for array in buffers.arrays)


class PoolMachine(RuleBasedStateMachine):
    """Any history of sequences: the logits are always those of the sequence's own tokens, and no page is lost."""

    sequences = Bundle("sequences")
    path: Path

    def __init__(self) -> None:
        super().__init__()
        self.runtime = Runtime.load(self.path, threads=1, kv_memory=8 * PAGE_BYTES)
        self.open: list[Sequence] = []

    def step(self, sequence: Sequence, ids: list[int]) -> None:
        before = sequence.tokens.tolist()
        try:
            logits = sequence.append(ids)
        except CacheFullError:
            assert sequence.tokens.tolist() == before
            return
        assert (logits == last([*before, *ids])).all()

    @rule(
        target=sequences,
        start=st.integers(0, 2),
        length=st.integers(1, 100),
        tail=st.lists(st.integers(0, 3), max_size=2),
    )
    def new(self, start: int, length: int, tail: list[int]) -> Sequence:
        sequence = self.runtime.sequence()
        self.open.append(sequence)
        prompt = [*IDS[start : start + length], *tail]
        adopted = sequence.adopt_prefix(prompt)
        assert sequence.tokens.tolist() == prompt[:adopted]
        self.step(sequence, prompt[adopted:])
        return sequence

    @rule(sequence=sequences, start=st.integers(0, 3), length=st.integers(1, 40))
    def append(self, sequence: Sequence, start: int, length: int) -> None:
        self.step(sequence, IDS[start : start + length])

    @rule(sequence=sequences, share=st.floats(0, 1))
    def rollback(self, sequence: Sequence, share: float) -> None:
        sequence.rollback(int(share * len(sequence)))

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        fork = sequence.fork()
        self.open.append(fork)
        return fork

    @rule(target=sequences, sequence=consumes(sequences))
    def close(self, sequence: Sequence) -> object:
        sequence.close()
        self.open.remove(sequence)
        return multiple()

    @invariant()
    def no_page_is_lost(self) -> None:
        pool = self.runtime.pool
        pool.check()
        held: dict[int, int] = {}
        for sequence in self.open:
            assert sequence.page_count == -(-len(sequence) // 32)
            for page in sequence.pages.tolist():
                held[page] = held.get(page, 0) + 1
        assert held == pool.users


def test_any_history_of_sequences(path: Path) -> None:
    PoolMachine.path = path
    case = PoolMachine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
    case("runTest").runTest()


def test_a_child_of_an_evicted_page_is_not_found(path: Path) -> None:
    """The first page makes room while its child is in use, and is computed again: the child's parent is another one."""
    runtime = Runtime.load(path, threads=1, kv_memory=4 * PAGE_BYTES)
    with runtime.sequence() as first:
        first.append(IDS[:64])
        with runtime.sequence() as other:
            other.adopt_prefix(IDS[:64])
            other.append(IDS[32:40])  # its own second page
    with runtime.sequence() as filler:
        filler.append([1] * 128)  # evicts all
        assert filler.pages.tolist() and runtime.pool.kept == 0
    with runtime.sequence() as again:
        assert again.adopt_prefix(IDS[:100]) == 0
        again.append(IDS[:32])
        with runtime.sequence() as child:
            assert child.adopt_prefix(IDS[:100]) == 32
            assert (child.append(IDS[32:100]) == last(IDS[:100])).all()
    runtime.pool.check()
