"""Text: pieces join to the whole, stop strings never show, templates are the checkpoint's own and locked in."""

from __future__ import annotations

import itertools
import json
import re
import threading
from pathlib import Path

import fake_artifact
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.decoder_steps import CLEAN_UP, clean_up_steps, common, replaced, steps_of
from llmc.runtime.errors import BatchError, ContextError, LlmcError, RuntimeStateError, TextError
from llmc.runtime.manifest import TextFacts
from llmc.runtime.runtime import Runtime
from llmc.runtime.tokenizer import Detokenizer, StopMatcher, Tokenizer

TEXTS = [
    "",
    "a",
    "hello  world\n\tx",
    "naïve café",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 done",
    "mixed é日👍 a",
    "  leading",
    "trailing ",
]


def facts(**changes: object) -> TextFacts:
    values = {
        "chat_template": None,
        "bos_id": None,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "special_tokens": {},
        "add_bos": False,
        "stop_ids": (),
        "clean_up_spaces": False,
    }
    return TextFacts(**{**values, **changes})  # type: ignore[arg-type]


def sentencepiece_tokenizer() -> bytes:
    """As Llama 2's: words start with a marked space, unknown characters fall back to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = {word: index for index, word in enumerate([*words, *letters, "▁h", "el", "lo", "▁w", "or", "ld"])}
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return str(tokenizer.to_str()).encode()


TOKENIZERS = {
    "bytes": Tokenizer(fake_artifact.byte_tokenizer(), facts()),
    "sentencepiece": Tokenizer(sentencepiece_tokenizer(), facts()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.sampled_from(TEXTS) | st.text(max_size=40), st.integers(0, 10))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text(kind: str, text: str, prompt_tokens: int) -> None:
    """Whatever the characters, after any prompt: the pieces are whole characters and join to the rest of the text."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    if "�" in whole:
        return
    prompt = tokenizer.decode(ids[:prompt_tokens])
    if "�" in prompt:  # a prompt that ends within a character
        return
    detokenizer = Detokenizer(tokenizer, ids[:prompt_tokens])
    pieces = [detokenizer.add(token) for token in ids[prompt_tokens:]]
    assert not any("�" in piece for piece in pieces)
    assert prompt + "".join(pieces) + detokenizer.finish() == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.integers(0, 285), max_size=60), st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text_of_any_tokens(kind: str, ids: list[int], cut: int) -> None:
    """Also of broken characters, special tokens and ids without a token; and what is pending is what would be left."""
    tokenizer = TOKENIZERS[kind]
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer, ids[:cut])
    text = ""
    for count, token in enumerate(ids[cut:], cut + 1):
        text += detokenizer.add(token)
        so_far = tokenizer.decode(ids[:count])
        assert text + detokenizer.pending == so_far[common(before, so_far) :]
    assert text + detokenizer.finish() == whole[common(before, whole) :]


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_of_no_character_hold_nothing_up(ids: list[int]) -> None:
    """A character has four bytes at most: whatever comes, three tokens at most wait for the next."""
    detokenizer = Detokenizer(TOKENIZERS["bytes"])
    waiting = 0
    for token in ids:
        waiting = 0 if detokenizer.add(token) else waiting + 1
        assert waiting <= 3


def test_a_run_of_byte_tokens_is_known_at_its_end() -> None:
    """All of it is U+FFFD if any of it is broken, as the tokenizers library decodes: nothing of it goes out before."""
    tokenizer = TOKENIZERS["sentencepiece"]
    smile = [3 + byte for byte in "😀".encode()]
    letter = tokenizer.encode("x")[-1]
    for run, text in ((smile * 2, "😀😀"), (smile + smile[:2], "�" * 6)):
        detokenizer = Detokenizer(tokenizer, [letter])
        assert [detokenizer.add(token) for token in run] == [""] * len(run)
        assert (detokenizer.pending, detokenizer.add(letter)) == (text, text + "x")
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.add, run)) + detokenizer.finish() == tokenizer.decode(run) == text


TOKEN = st.text("ab▁# '.n<", max_size=4) | st.sampled_from(
    ["<0xF0>", "<0x9F>", "<0x41>", "Ġa", "ðŁ", "ĺĢ", "##a", "a</w>"]
)
DECODERS = {
    "replace": lambda: decoders.Replace("▁", " "),
    "delete": lambda: decoders.Replace("a", ""),
    "byte fallback": decoders.ByteFallback,
    "fuse": decoders.Fuse,
    "strip": lambda: decoders.Strip(" ", 1, 0),
    "strip two": lambda: decoders.Strip("a", 2, 0),
    "strip right": lambda: decoders.Strip("b", 0, 1),
    "metaspace": decoders.Metaspace,
    "metaspace never": lambda: decoders.Metaspace(prepend_scheme="never"),
    "word piece": lambda: decoders.WordPiece("##", True),
    "suffix": lambda: decoders.BPEDecoder("</w>"),
    "byte level": decoders.ByteLevel,
    "ctc": lambda: decoders.CTC("a", "b"),
}


@given(st.lists(st.sampled_from(sorted(DECODERS)), min_size=1, max_size=4), st.lists(TOKEN, min_size=1, max_size=12))
@settings(max_examples=1000, deadline=None)
def test_steps_do_as_any_chain_of_decoders(names: list[str], tokens: list[str]) -> None:
    """One token at a time or all at once, they give what the library's decoder makes of the list."""
    if "strip right" in names:  # the library fails at texts that are shorter than what it strips
        tokens = [token + "x" for token in tokens]
        names = [name for name in names if name in ("strip right", "fuse", "replace", "byte fallback")]
    decoder = decoders.Sequence([DECODERS[name]() for name in names])
    state = json.loads(decoder.__getstate__())
    for groups in ([tokens], [[token] for token in tokens]):
        steps = steps_of(decoder, state)
        out = ""
        for group in groups:
            for step in steps:
                group = step.feed(group)
            out += "".join(group)
        rest: list[str] = []
        for step in steps:
            rest = [*step.feed(rest), *step.finish()]
        assert out + "".join(rest) == decoder.decode(tokens)


@given(st.lists(st.text(" .'ntms,!?", max_size=6), max_size=12))
@settings(max_examples=500, deadline=None)
def test_clean_up_of_pieces_is_that_of_the_text(pieces: list[str]) -> None:
    steps = clean_up_steps()
    out = ""
    for piece in pieces:
        parts = [piece]
        for step in steps:
            parts = step.feed(parts)
        out += "".join(parts)
    rest: list[str] = []
    for step in steps:
        rest = [*step.feed(rest), *step.finish()]
    assert out + "".join(rest) == replaced("".join(pieces), CLEAN_UP)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=10),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_end_the_text_and_never_show(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text is cut into pieces, what comes out is the text before the first stop string, no more, no less;
    and what is held back is only what could still become one."""
    matcher = StopMatcher(stops)
    out = ""
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    seen = 0
    for begin, end in itertools.pairwise(borders):
        out += matcher.feed(text[begin:end])
        seen = end
        if matcher.stopped:
            break
        held = text[len(out) : end]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    out += matcher.finish()
    # The first to be complete, in the pieces as they came, wins; with ties the one that starts first.
    found = [text[:seen].find(stop) for stop in stops if stop in text[:seen]]
    assert matcher.stopped == bool(found)
    assert out == (text[: min(found)] if found else text)


@given(
    st.lists(st.sampled_from(["a", "b", "c", "ab", "<x>", "<y>"]), max_size=12),
    st.lists(st.sampled_from(["<x>", "a<x>", "<x>b", "b<y>c", "<y><x>", "x>a", "ab", "cc"]), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_special_tokens_take_part_in_the_search_unseen(tokens: list[str], stops: list[str]) -> None:
    """A text ends where a stop string is complete, special tokens read as they are written; none of them is text."""
    matcher = StopMatcher(stops)
    near = {word for word in ("<x>", "<y>") if any(word in stop or word[2:] == stop[:1] for stop in stops)}
    near |= {"<x>"} if "x>a" in stops else set()
    out, read = "", ""
    for token in tokens:
        special = token.startswith("<")
        out += matcher.skip(token) if special else matcher.feed(token)
        read += token if not special or token in near else ""
        if matcher.stopped:
            break
    out += matcher.finish()
    found = [read.find(stop) for stop in stops if stop in read]
    assert matcher.stopped == bool(found)
    shown = read[: min(found)] if found else read
    # A special token that a stop string begins within is not text in part either.
    assert out == re.sub("<x?$", "", shown.replace("<x>", "").replace("<y>", ""))


@pytest.mark.parametrize(("stop", "text"), [("</s>", "a😀"), ("😀</s>", "a"), ("</s>b", "a😀"), ("a</s>", None)])
def test_a_special_token_behind_text_that_is_not_certain(stop: str, text: str | None) -> None:
    """The text before it comes first, though it is not known yet when the token comes."""
    matcher = StopMatcher([stop])
    out = matcher.feed("a") + matcher.feed("")
    out += matcher.skip("</s>", pending="😀")
    if not matcher.stopped:
        out += matcher.feed("😀b")
    assert (matcher.stopped, out + matcher.finish()) == ((True, text) if text is not None else (False, "a😀b"))


# Generation


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_artifact.write(tmp_path_factory.mktemp("text") / "model.so")


@pytest.fixture
def runtime(path: Path) -> Runtime:
    return Runtime.load(path, threads=1)


def greedy(ids: list[int], count: int) -> list[int]:
    """What the fake model says, by its definition."""
    out = list(ids)
    for _ in range(count):
        out.append(int(fake_artifact.reference_logits(out)[-1].argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("prompt", ["x", "hello there", "naïve 日本語", "z" * 150])
def test_greedy_text_is_what_the_logits_say(runtime: Runtime, prompt: str) -> None:
    ids = runtime.tokenizer.encode(prompt)
    expected = greedy(ids, 40)
    stream = runtime.stream(prompt, max_tokens=40)
    pieces = list(stream)
    assert stream.tokens == expected
    assert stream.finish_reason == "length"
    assert stream.prompt_tokens == len(ids)
    assert "".join(pieces) == runtime.generate(prompt, max_tokens=40) == runtime.generate(ids, max_tokens=40)
    assert all(pieces)


def test_a_batch_writes_what_single_prompts_write(runtime: Runtime) -> None:
    prompts = ["a", "hello", "the quick brown fox " * 5, "hello"]
    for options in ({}, {"temperature": 1.0, "seed": 4, "top_k": 20}, {"stop": ["e", "o"]}):
        alone = []
        for index, prompt in enumerate(prompts):
            own = {**options, "seed": 4 + index} if "seed" in options else options
            alone.append(runtime.generate(prompt, max_tokens=30, **own))  # type: ignore[arg-type]
        assert runtime.generate_batch(prompts, max_tokens=30, **options) == alone  # type: ignore[arg-type]
    assert runtime.generate_batch([]) == []


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 2}])
def test_a_text_whose_logits_are_broken_ends_alone(tmp_path: Path, options: dict[str, float]) -> None:
    """NaN in one row of a step is an error of that row's text: the others of the batch and other streams go on."""
    value = 's->ids[s->rows[r]] == 7 && s->positions[s->rows[r]] > 0 ? __builtin_nanf("") : '
    source = fake_artifact.STEP.replace("] = (float)(mix(sums[s->rows", f"] = {value}(float)(mix(sums[s->rows")
    assert source != fake_artifact.STEP
    runtime = Runtime.load(fake_artifact.write(tmp_path / "broken.so", source=source), threads=2)
    good, bad = [[1, 2, 3], [7], [5] * 40], [4, 7]
    alone = [
        runtime.generate(prompt, max_tokens=12, **{**options, **({"seed": 2 + place} if options else {})})  # type: ignore[arg-type]
        for prompt, place in zip(good, (0, 2, 3), strict=True)
    ]
    going = runtime.stream(good[0], max_tokens=12, **options)  # type: ignore[arg-type]
    pieces = [next(going)]
    with pytest.raises(BatchError, match=r"prompt 1 of 4: .*not finite.*`texts`") as caught:
        runtime.generate_batch([good[0], bad, *good[1:]], max_tokens=12, **options)  # type: ignore[arg-type]
    assert caught.value.texts == (alone[0], None, *alone[1:])
    assert list(caught.value.errors) == [1]
    with pytest.raises(RuntimeStateError, match="not finite"):
        runtime.generate(bad, max_tokens=12, **options)  # type: ignore[arg-type]
    assert "".join([*pieces, *going]) == alone[0]
    with pytest.raises(BatchError, match=r"prompt 0 of 2 \(and 1 more\): .*broken$"):
        runtime.generate_batch([bad, bad], **options)  # type: ignore[arg-type]
    runtime.pool.check()
    assert runtime.pool.available == runtime.pool.capacity


def test_stops_end_the_text(runtime: Runtime) -> None:
    full = runtime.generate("hello", max_tokens=60)
    stop = full[len(full) // 2 : len(full) // 2 + 3]
    stream = runtime.stream("hello", max_tokens=60, stop=[stop, "never in there"])
    assert stream.text() == full[: full.index(stop)]
    assert stream.finish_reason == "stop"
    assert runtime.generate("hello", max_tokens=60, stop=stop) == full[: full.index(stop)]
    tokens = greedy(runtime.tokenizer.encode("hello"), 60)
    stream = runtime.stream("hello", max_tokens=60, stop_token_ids=[tokens[20]])
    stream.text()
    assert stream.tokens == tokens[: tokens.index(tokens[20]) + 1]
    assert stream.finish_reason == "stop"


def test_a_special_token_can_be_a_stop_string(tmp_path: Path, runtime: Runtime) -> None:
    """Its text is never in the text, and still the text ends there; also where it is only part of the stop string."""
    tokens = greedy(runtime.tokenizer.encode("hello"), 40)
    place = next(index for index in range(10, 40) if tokens.index(tokens[index]) == index)
    own = tokenizers.Tokenizer.from_buffer(fake_artifact.byte_tokenizer())
    word = own.id_to_token(tokens[place])
    own.add_special_tokens([word])
    loaded = Runtime.load(fake_artifact.write(tmp_path / "model.so", tokenizer=own.to_str().encode()), threads=1)
    before = loaded.tokenizer.decode(tokens[:place])
    for stop, text in ((word, before), (before[-2:] + word, before[:-2]), ("no" + word, None)):
        stream = loaded.stream("hello", max_tokens=40, stop=stop)
        whole = loaded.tokenizer.decode(tokens)
        assert stream.text() == (whole if text is None else text) == loaded.generate("hello", max_tokens=40, stop=stop)
        assert stream.tokens == (tokens if text is None else tokens[: place + 1])
        assert stream.finish_reason == ("length" if text is None else "stop")


def test_stop_ids_of_the_model_hold(tmp_path: Path, runtime: Runtime) -> None:
    tokens = greedy(runtime.tokenizer.encode("hello"), 20)
    text = {**fake_artifact.manifest()["tokenizer"], "stop_ids": [tokens[7]]}  # type: ignore[dict-item]
    stopping = Runtime.load(fake_artifact.write(tmp_path / "model.so", tokenizer_facts=text), threads=1)
    stream = stopping.stream("hello")
    stream.text()
    assert stream.tokens == tokens[: tokens.index(tokens[7]) + 1]


def test_the_end_of_the_context_ends_the_text(runtime: Runtime) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 395)
    stream = runtime.stream(prompt, max_tokens=100)
    stream.text()
    assert stream.finish_reason == "length"
    assert len(stream.tokens) == 6  # five fit, and the one after them needs no place
    stream = runtime.stream(np.resize(prompt, 400), max_tokens=100)
    stream.text()
    assert len(stream.tokens) == 1
    with pytest.raises(ContextError, match="401 tokens"):
        runtime.generate(np.resize(prompt, 401))
    assert runtime.pool.available == runtime.pool.capacity


def test_the_next_turn_reuses_the_cache(runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "tell me about the weather in the north please"}]
    first = runtime.stream_chat(messages, max_tokens=80)
    answer = first.text()
    assert first.cached_tokens == 0
    # The prompt's full pages are found; the answer's, as far as its text encodes to the same tokens.
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "and in the south"}]
    second = runtime.stream_chat(messages, max_tokens=5)
    reply = second.text()
    assert second.cached_tokens >= first.prompt_tokens // 32 * 32 > 0
    runtime.pool.drop_kept()
    fresh = runtime.stream_chat(messages, max_tokens=5)
    assert (fresh.text(), fresh.cached_tokens) == (reply, 0)


def test_response_is_chat_with_a_history(runtime: Runtime) -> None:
    history = [("hi", "hello"), ("how", "fine")]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "bye"},
    ]
    expected = runtime.chat(messages, max_tokens=9)
    assert runtime.response("bye", history, max_tokens=9) == expected
    assert runtime.response("bye", messages[:-1], max_tokens=9) == expected
    assert "".join(runtime.stream_response("bye", history, max_tokens=9)) == expected
    assert runtime.response("bye", max_tokens=9) == runtime.chat("bye", max_tokens=9)


def test_a_stream_that_is_left_early_gives_its_pages_back(runtime: Runtime) -> None:
    for leave in ("close", "drop", "finish"):
        stream = runtime.stream("hello there " * 6, max_tokens=50)
        next(stream)
        assert runtime.pool.available < runtime.pool.capacity
        if leave == "close":
            stream.close()
            with pytest.raises(StopIteration):
                next(stream)
        elif leave == "finish":
            stream.text()
        del stream
        assert runtime.pool.available == runtime.pool.capacity
    runtime.pool.check()


def test_streams_of_several_threads_do_not_mix(runtime: Runtime) -> None:
    prompts = [f"prompt number {index} " * 4 for index in range(4)]
    expected = [runtime.generate(prompt, max_tokens=40) for prompt in prompts]
    got: dict[int, str] = {}

    def work(index: int) -> None:
        got[index] = runtime.generate(prompts[index], max_tokens=40)

    writers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [got[index] for index in range(4)] == expected


def test_defaults_come_from_the_checkpoint(tmp_path: Path, runtime: Runtime) -> None:
    warm = fake_artifact.write(tmp_path / "model.so", generation={"temperature": 1e4, "top_p": 1.0})
    loaded = Runtime.load(warm, threads=1)
    assert loaded.generate("hello", seed=1) != loaded.generate("hello", seed=2)
    assert loaded.generate("hello", temperature=0.0) == runtime.generate("hello")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": True}, "top_k"),
        ({"heat": 1}, "unknown option heat"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_options_are_refused_at_once(runtime: Runtime, options: dict[str, object], message: str) -> None:
    for call in (runtime.stream, runtime.stream_chat):
        with pytest.raises(RuntimeStateError, match=message):
            call("hello", **options)  # type: ignore[operator]


@pytest.mark.parametrize("prompt", ["", [], [300], [-1], [0.5], None, 5, 2.5, {"a": 1}, [None], [[1]], b"x", object()])
def test_bad_prompts_are_refused_at_once(runtime: Runtime, prompt: object) -> None:
    with pytest.raises(RuntimeStateError):
        runtime.stream(prompt)  # type: ignore[arg-type]
    with pytest.raises(RuntimeStateError):
        runtime.generate_batch([prompt])  # type: ignore[list-item]


@pytest.mark.parametrize("prompts", ["hello", None, 5])
def test_prompts_of_a_batch_are_a_list(runtime: Runtime, prompts: object) -> None:
    with pytest.raises(RuntimeStateError, match="prompts must be a list"):
        runtime.generate_batch(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threads": 1.5}, "threads must be an integer from 1 to 1024, not 1.5"),
        ({"threads": "2"}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"threads": 0}, "threads must be"),
        ({"threads": 10**6}, "threads must be"),
        ({"kv_memory": 0.5}, "kv_memory must be"),
        ({"kv_memory": "1G"}, "kv_memory must be"),
        ({"weights": 5}, "weights must be a file's path"),
        ({"path": None}, "path must be a file's path"),
    ],
)
def test_odd_arguments_of_load_are_named(path: Path, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(LlmcError, match=said):
        Runtime.load(**({"path": path} | arguments))  # type: ignore[arg-type]


def test_without_a_tokenizer_ids_still_run(tmp_path: Path) -> None:
    runtime = Runtime.load(fake_artifact.write(tmp_path / "model.so", tokenizer_facts=None), threads=1)
    assert (runtime.forward([1, 2]) == fake_artifact.reference_logits([1, 2])).all()
    for use in (lambda: runtime.generate("x"), lambda: runtime.chat("x")):
        with pytest.raises(TextError, match="no tokenizer"):
            use()


def test_a_tokenizer_that_cannot_be_read_is_a_clear_error(tmp_path: Path) -> None:
    runtime = Runtime.load(fake_artifact.write(tmp_path / "model.so", tokenizer=b"{}"), threads=1)
    with pytest.raises(TextError, match="tokenizer cannot be read"):
        runtime.generate("x")


# Tokenizer and template


def test_bos_is_added_once() -> None:
    data = sentencepiece_tokenizer()
    plain, with_bos = Tokenizer(data, facts(bos_id=1)), Tokenizer(data, facts(bos_id=1, add_bos=True))
    ids = plain.encode("hello")
    assert with_bos.encode("hello") == [1, *ids]
    assert with_bos.encode("hello", add_special=False) == ids
    assert with_bos.encode("<s>hello")[:2] == [1, plain.encode("<s>hello")[1]]
    assert plain.decode([1, *ids, 2]) == "hello"


TEMPLATES = {
    "plain": "{% for m in messages %}{{ bos_token }}[{{ m['role'] }}] {{ m.content }}{{ eos_token }}\n{% endfor %}",
    "prompt": "{%- for m in messages -%}{{ m.content | trim }}{%- endfor %}{% if add_generation_prompt %}A:{% endif %}",
    "json": "{{ messages | tojson(indent=2) }} {{ {'é': '<b>'} | tojson }} {{ tools is none }}",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\ny{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y')[:2] }}{{ pad_token }}{{ unknown_name }}",
}
MESSAGES = [{"role": "system", "content": "be <b>ief</b> "}, {"role": "user", "content": "é 日"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_buffer(sentencepiece_tokenizer())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    theirs.chat_template = TEMPLATES[name]
    ours = ChatTemplate(facts(chat_template=TEMPLATES[name], special_tokens={"pad_token": "<unk>"}))
    for prompt in (True, False):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(MESSAGES, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages.no.such.thing }}",
    ],
)
def test_a_template_can_do_no_harm_and_its_failure_is_an_error(template: str) -> None:
    with pytest.raises(TextError, match="refuses these messages"):
        ChatTemplate(facts(chat_template=template)).render(MESSAGES)


def test_what_a_template_raises_reaches_the_user() -> None:
    with pytest.raises(LlmcError, match="roles must alternate"):
        ChatTemplate(facts(chat_template="{{ raise_exception('roles must alternate') }}")).render(MESSAGES)
    with pytest.raises(TextError, match="no chat template"):
        ChatTemplate(facts())
    with pytest.raises(TextError, match="cannot be read"):
        ChatTemplate(facts(chat_template="{% if %}"))
