"""Encoders in the runtime: any batch gives what its texts give alone; texts are cut, paired and refused as said."""

from __future__ import annotations

import threading
from pathlib import Path

import fake_artifact
import fake_kinds
import numpy as np
import pytest
from fake_kinds import MAX_STEP, MAX_TOKENS, encoder_facts, reference, word_tokenizer, write_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import ContextError, RuntimeStateError, TextError
from llmc.runtime.runtime import Runtime

WORDS = ("a", "b", "c", "dog", "cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime.load(write_encoder(tmp_path_factory.mktemp("encoder") / "encoder.so"), threads=2)


def ids_of(text: str) -> list[int]:
    return [1, *(3 + WORDS.index(word) if word in WORDS else 0 for word in text.split()), 2]


sequences = st.lists(st.integers(0, 299), min_size=1, max_size=MAX_TOKENS)


@given(st.lists(sequences, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_sequence_is_on_its_own(model: Runtime, batch: list[list[int]]) -> None:
    """Rows of any mixture of lengths are those that the model's meaning gives for each sequence alone, in order."""
    found = model.embed(batch)
    assert found.shape == (len(batch), 3) and found.dtype == np.float32
    outputs = model.encode(batch)
    for ids, row, output in zip(batch, found, outputs, strict=True):
        vector, states = reference(ids)
        np.testing.assert_array_equal(row, vector)
        np.testing.assert_array_equal(output["embedding"], vector)
        np.testing.assert_array_equal(output["states"], states)


def test_many_short_texts_and_full_steps(model: Runtime) -> None:
    """More one-token texts than the scratch cache has pages; texts that fill a step exactly; texts of one token."""
    for lengths in ([1] * 200, [MAX_TOKENS] * 5, [24] * 6, [MAX_TOKENS, 8, 1, 1, 33]):
        batch = [[(7 * index + place) % 300 for place in range(length)] for index, length in enumerate(lengths)]
        expected = np.stack([reference(ids)[0] for ids in batch])
        np.testing.assert_array_equal(model.embed(batch), expected)


def test_texts_become_tokens(model: Runtime) -> None:
    texts = ["a dog", "", "b", "a cat b c nothing"]
    found = model.embed(texts)
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_array_equal(row, reference(ids_of(text))[0])
    np.testing.assert_array_equal(model.embed("a dog"), found[0])
    np.testing.assert_array_equal(model.embed([1, 3, 6, 2]), found[0])  # token ids
    np.testing.assert_array_equal(model.embed([np.array([1, 3, 6, 2]), "b"]), found[[0, 2]])
    assert model.embed([]).shape == (0, 3)
    assert model.dimension == 3
    assert model.max_tokens == MAX_TOKENS


def test_long_texts_lose_their_end_but_not_the_end_token(model: Runtime) -> None:
    words = [WORDS[index % 5] for index in range(100)]
    expected = reference([1, *(3 + index % 5 for index in range(MAX_TOKENS - 2)), 2])[0]
    np.testing.assert_array_equal(model.embed(" ".join(words)), expected)
    with pytest.raises(ContextError, match=r"text 1 has 41 token ids.*takes 40 at most"):
        model.embed([[1, 2], [1] * 41])
    # The tokenizer is as it was.
    assert len(model.tokenizer.encode(" ".join(words))) == 102


def test_long_texts_lose_their_start_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    facts = {**fake_artifact.manifest()["tokenizer"], "truncation_side": "left"}  # type: ignore[dict-item]
    runtime = Runtime.load(write_encoder(tmp_path / "left.so", tokenizer_facts=facts))
    words = [WORDS[index % 5] for index in range(101)]
    expected = reference([1, *(3 + index % 5 for index in range(101 - MAX_TOKENS + 2, 101)), 2])
    np.testing.assert_array_equal(runtime.embed(" ".join(words)), expected[0])


def test_prompts(tmp_path: Path, model: Runtime) -> None:
    np.testing.assert_array_equal(model.embed("cat", prompt_name="query"), model.embed("dog cat"))
    np.testing.assert_array_equal(model.embed(["cat"], prompt="a b "), model.embed(["a b cat"]))
    facts = encoder_facts(default_prompt="query")
    other = Runtime.load(write_encoder(tmp_path / "prompted.so", facts))
    np.testing.assert_array_equal(other.embed("cat"), model.embed("dog cat"))
    np.testing.assert_array_equal(other.embed("cat", prompt=""), model.embed("cat"))
    with pytest.raises(RuntimeStateError, match="has no prompt 'answer'; it has 'query'"):
        model.embed("cat", prompt_name="answer")
    with pytest.raises(RuntimeStateError, match="not both"):
        model.embed("cat", prompt_name="query", prompt="a")
    with pytest.raises(RuntimeStateError, match="token ids and pairs have none"):
        other.embed([[1, 2]])


def test_normalizing(tmp_path: Path, model: Runtime) -> None:
    texts = ["a", "dog cat", ""]
    raw, unit = model.embed(texts), model.embed(texts, normalize=True)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-6)
    normalized = Runtime.load(write_encoder(tmp_path / "unit.so", encoder_facts(normalized=True)))
    np.testing.assert_array_equal(normalized.embed(texts), raw)  # the model's own business
    with pytest.raises(RuntimeStateError, match="part of the model"):
        normalized.embed(texts, normalize=False)


def classifier(path: Path, **changes: object) -> Runtime:
    facts = encoder_facts(kind="classification", labels=fake_kinds.LABELS, **changes)
    return Runtime.load(write_encoder(path, facts))


def test_classes(tmp_path: Path, model: Runtime) -> None:
    one = classifier(tmp_path / "classes.so")
    texts = ["a", "b dog", ""]
    logits = model.embed(texts)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = powers / powers.sum(axis=1, keepdims=True)
    found = one.classify(texts)
    assert isinstance(found, list)
    for entry, row in zip(found, expected, strict=True):
        assert entry["label"] == fake_kinds.LABELS[row.argmax()]
        assert entry["score"] == pytest.approx(row.max(), abs=1e-6)
        assert entry["scores"] == pytest.approx(dict(zip(fake_kinds.LABELS, row.tolist(), strict=True)), abs=1e-6)
    assert one.classify("b dog") == found[1]
    several = classifier(tmp_path / "several.so", multi_label=True)
    sigmoid = 1 / (1 + np.exp(-logits[1].astype(np.float64)))
    assert list(several.classify("b dog")["scores"].values()) == pytest.approx(sigmoid.tolist(), abs=1e-6)  # type: ignore[call-overload,index]
    assert one.classify("b dog", activation="none")["score"] == logits[1].max()  # type: ignore[call-overload]
    plain = classifier(tmp_path / "plain.so", plain_scores=True)
    assert plain.classify("b dog") == one.classify("b dog", activation="none")
    with pytest.raises(RuntimeStateError, match="softmax, sigmoid or none"):
        one.classify("a", activation="relu")  # type: ignore[arg-type]


def test_padding_at_the_end_of_a_text_is_taken_away(tmp_path: Path) -> None:
    plain, padded = classifier(tmp_path / "plain.so"), classifier(tmp_path / "padded.so", padding=2)
    for ids, kept in (([3, 2, 4, 2, 2], 3), ([3, 4], 2), ([2, 2], 1)):
        assert padded.classify(ids) == plain.classify(ids[:kept])
        assert plain.classify(ids[:kept]) != plain.classify(ids) or kept == len(ids)
    pair = padded.classify(("a b", "dog"), activation="none")  # tokens 1 3 4 2 6 2, with types
    assert isinstance(pair, dict)
    assert list(pair["scores"].values()) == reference([1, 3, 4, 2, 6], [0, 0, 0, 0, 1])[0].tolist()  # type: ignore[attr-defined]


def test_pairs_have_types_of_their_own(tmp_path: Path) -> None:
    pairs = [("a b", "dog"), ("cat", "b c a")]
    ids = [[1, 3, 4, 2, 6, 2], [1, 7, 2, 4, 5, 3, 2]]
    types = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    facts = encoder_facts(kind="classification", labels=fake_kinds.LABELS)
    typed = classifier(tmp_path / "typed.so")
    untyped = Runtime.load(write_encoder(tmp_path / "untyped.so", facts, token_types=0))
    no_text = {**fake_artifact.manifest()["tokenizer"]}  # type: ignore[dict-item]
    older = Runtime.load(write_encoder(tmp_path / "older.so", {**facts, "pair_types": True}, tokenizer_facts=no_text))
    for runtime, kinds in ((typed, types), (older, types), (untyped, [None, None])):
        found = runtime.classify(pairs, activation="none")
        assert isinstance(found, list)
        for entry, own, kind in zip(found, ids, kinds, strict=True):
            assert list(entry["scores"].values()) == reference(own, kind)[0].tolist()  # type: ignore[attr-defined]
    assert typed.classify(("a b", "dog"), activation="none") == typed.classify(pairs, activation="none")[0]  # type: ignore[index]


def test_token_types_do_not_depend_on_what_the_output_is_for(tmp_path: Path, model: Runtime) -> None:
    """The outputs of a head without a known use are those of the same model with one."""
    other = Runtime.load(write_encoder(tmp_path / "other.so", no_use=True))
    for batch in ([("a b", "dog"), ("cat", "b c a")], ["a b"], [[1, 3, 2]]):
        for found, wanted in zip(other.encode(batch), model.encode(batch), strict=True):
            for name in ("embedding", "states"):
                np.testing.assert_array_equal(found[name], wanted[name])  # type: ignore[index]
    one_type = Runtime.load(write_encoder(tmp_path / "one.so", token_types=1))
    with pytest.raises(TextError, match=r"gives text 1 token type 1, and .* knows types below 1"):
        one_type.embed(["a", ("a", "b")])


def test_a_long_pair_loses_from_the_longer_text(tmp_path: Path) -> None:
    runtime = classifier(tmp_path / "long.so")
    long = " ".join(["dog"] * 100)
    ids = [1, 3, 2, *[6] * (MAX_TOKENS - 4), 2]
    types = [0, 0, 0, *[1] * (MAX_TOKENS - 3)]
    found = runtime.classify(("a", long), activation="none")
    assert isinstance(found, dict)
    assert list(found["scores"].values()) == reference(ids, types)[0].tolist()  # type: ignore[attr-defined]


def test_tags(tmp_path: Path, model: Runtime) -> None:
    facts = encoder_facts(kind="tokens", output="states", labels=fake_kinds.LABELS)
    tagger = Runtime.load(write_encoder(tmp_path / "tags.so", facts))
    (first, second) = tagger.tag(["dog  cat", "a"])
    assert [(entry["word"], entry["start"], entry["end"]) for entry in first] == [("dog", 0, 3), ("cat", 5, 8)]
    states = reference(ids_of("dog cat"))[1]
    assert [entry["label"] for entry in first] == [fake_kinds.LABELS[row.argmax()] for row in states[1:-1]]
    assert tagger.tag("a") == second
    assert len(tagger.tag([1, 3, 2])) == 3  # of token ids nothing is known
    with pytest.raises(RuntimeStateError, match=r"gives every token a label: use tag\(\), not embed\(\)"):
        tagger.embed("a")


def test_methods_that_do_not_fit_say_which_does(tmp_path: Path, model: Runtime) -> None:
    for call in (
        lambda: model.generate("a"),
        lambda: model.chat("a"),
        lambda: model.forward([1]),
        lambda: model.generate_batch(["a"]),
        lambda: model.run({}),
        lambda: model.classify("a"),
        lambda: model.tag("a"),
    ):
        with pytest.raises(RuntimeStateError, match=r"encoder\.so .*: use embed\(\), not [a-z_]+\(\)$"):
            call()
    one = classifier(tmp_path / "classes.so")
    with pytest.raises(RuntimeStateError, match=r"is a classifier: use classify\(\), not embed\(\)"):
        one.embed("a")
    plain = Runtime.load(write_encoder(tmp_path / "plain.so", encoder_facts(kind="tokens", output="states")))
    with pytest.raises(RuntimeStateError, match=r"for every token: use encode\(\), not embed\(\)"):
        plain.embed("a")
    assert plain.encode("a b")["states"].shape == (4, 3)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "texts, message",
    [
        (["a", 3.5], "text 1 must be a text"),
        ([[]], "text 0 must be a text.*at least one token id"),
        ([["a", "b", "c"]], "text 0 must be a text"),
        ([[[1, 2]]], "text 0 must be"),
        ([[1, 300]], "token id 300 of text 0 is not in the vocabulary of 300"),
        ([[-1]], "token id -1"),
        (7, "texts are a text or a list of texts"),
        (["fine", "\ud800"], "not valid Unicode"),
    ],
)
def test_wrong_texts(model: Runtime, texts: object, message: str) -> None:
    with pytest.raises(RuntimeStateError, match=message):
        model.embed(texts)  # type: ignore[arg-type]


def test_a_text_without_tokens(tmp_path: Path) -> None:
    runtime = Runtime.load(write_encoder(tmp_path / "bytes.so", tokenizer=fake_kinds.fake_artifact.byte_tokenizer()))
    with pytest.raises(TextError, match="text 1 has no tokens"):
        runtime.embed(["a", ""])


def test_one_sequence_at_a_time(tmp_path: Path) -> None:
    """A graph that could not be cut into tokens has [1, ...] where others have a row a sequence, and S for T."""
    outputs = [
        {"name": "embedding", "dtype": "float32", "shape": [1, 3]},
        {"name": "states", "dtype": "float32", "shape": ["S", 3]},
    ]
    step = {**fake_kinds.encoder_step(), "state": "none"}
    source = fake_kinds.ENCODER_STEP
    for old, new in (  # a step without a cache is told no slots and no pages
        ("float *keys = s->cache[0];", "static float keys[64 * 64];"),
        ("(s->slots[t] / PAGE) * 2 * PAGE + s->slots[t] %% PAGE", "t"),
        ("(int64_t)pages[p / PAGE] * 2 * PAGE + p %% PAGE", "(void)pages, p"),
    ):
        assert old in source
        source = source.replace(old, new)
    path = write_encoder(tmp_path / "one.so", source=source, outputs=outputs, step=step, kv={"layers": []})
    runtime = Runtime.load(path)
    batch = [[5] * length for length in (1, 7, 31, 33, 40, 1)]
    for ids, output in zip(batch, runtime.encode(batch), strict=True):
        vector, states = reference(ids)
        np.testing.assert_array_equal(output["embedding"], vector)
        np.testing.assert_array_equal(output["states"], states)
    assert runtime.embed(batch).shape == (6, 3)


def test_progress_and_order_of_thousands(model: Runtime) -> None:
    texts = [" ".join(WORDS[(index + place) % 5] for place in range(index % 45)) for index in range(1500)]
    told: list[tuple[int, int]] = []
    found = model.embed(texts, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (1500, 1500) and [done for done, _ in told] == sorted({done for done, _ in told})
    order = np.random.default_rng(0).permutation(1500)
    np.testing.assert_array_equal(model.embed([texts[index] for index in order]), found[order])


def test_threads_take_turns(model: Runtime) -> None:
    texts = [f"{word} dog" for word in WORDS] * 40
    expected = model.embed(texts)
    found: list[np.ndarray] = []
    workers = [threading.Thread(target=lambda: found.append(model.embed(texts))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for array in found:
        np.testing.assert_array_equal(array, expected)


def test_no_step_is_half_empty_without_need(model: Runtime) -> None:
    """Texts of 10 tokens: every step but the last takes as many as fit."""
    model.set_profiling(True)
    try:
        model.embed([[1] * 10] * 20)
        profiled = [step["B"] for step in model._caller.profiled]
    finally:
        model.set_profiling(False)
    assert profiled == [MAX_STEP // 10] * 5


def test_a_tokenizer_that_cuts_and_pads_by_itself(tmp_path: Path, model: Runtime) -> None:
    """What tokenizer.json says about padding and lengths is about training; only the side that is cut counts."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(word_tokenizer().decode())
    own.enable_padding(length=30)
    own.enable_truncation(5, direction="left")
    runtime = Runtime.load(write_encoder(tmp_path / "left.so", tokenizer=own.to_str().encode()))
    np.testing.assert_array_equal(runtime.embed("a dog"), model.embed("a dog"))
    words = [WORDS[index % 5] for index in range(100)]
    kept = [3 + index % 5 for index in range(100)][-(MAX_TOKENS - 2) :]
    np.testing.assert_array_equal(runtime.embed(" ".join(words)), reference([1, *kept, 2])[0])
