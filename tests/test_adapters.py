"""Adapters at run time (LoRA): the logits of merged weights, one adapter for each text, switched at any time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import write_adapter
from kernel_harness import CACHE
from test_company import decode, same
from tiny_models import make_tiny

from llmc import cli
from llmc.compiler import pipeline
from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import compile_model
from llmc.errors import CompileError
from llmc.runtime.errors import AdapterError, RuntimeStateError
from llmc.runtime.runtime import Runtime

COUNT, RANK = 3, 8
IDS = np.random.default_rng(0).integers(2, 300, 70).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def compiled(folder: Path, family: str = "llama", scheme: str = "none", name: str = "", **options: object) -> Path:
    model, path = folder / family, folder / f"{name or family}-{scheme}.so"
    if not model.exists():
        make_tiny(family, model)
    if not path.exists():
        given: dict[str, object] = {"adapters": COUNT, "adapter_rank": RANK, "calibrate": "none", **options}
        compile_model(
            str(model),
            path,
            CompileOptions(quantization=scheme, accuracy=False, kernel_cache=CACHE, **given),  # type: ignore[arg-type]
        )
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return compiled(folder)


@pytest.fixture
def runtime(artifact: Path) -> Runtime:
    return Runtime.load(artifact, threads=2)


def sizes_of(runtime: Runtime) -> dict[str, tuple[int, int]]:
    assert runtime.manifest.adapters is not None
    return runtime.manifest.adapters.modules


@pytest.fixture(scope="module")
def one(artifact: Path, folder: Path) -> Path:
    """Of every module."""
    return write_adapter(folder / "one", sizes_of(Runtime.load(artifact, threads=1)), seed=1)


@pytest.fixture(scope="module")
def two(artifact: Path, folder: Path) -> Path:
    """Of some modules, in bf16-like f16, with ranks and alphas of their own and rsLoRA."""
    sizes = sizes_of(Runtime.load(artifact, threads=1))
    chosen = [name for name in sizes if name.endswith(("q_proj", "v_proj", "down_proj", "up_proj"))]
    ranks = {name: 7 for name in chosen if name.endswith("q_proj")} | {"model.layers.1.mlp.up_proj": 1}
    patterns = {"q_proj": 7, "layers.1.mlp.up_proj": 1}
    return write_adapter(
        folder / "two", sizes, chosen, seed=2, dtype="float16", ranks=ranks, use_rslora=True,
        rank_pattern=patterns, alpha_pattern={"layers.0.*": 9}, target_modules=r".*\.(q_proj|v_proj|up_proj|down_proj)",
        layers_to_transform=None,
    )  # fmt: skip


def logits(runtime: Runtime, lora: str | None, cuts: tuple[int, ...] = (len(IDS),)) -> np.ndarray:
    """After each token of IDS, read in pieces that end at `cuts`."""
    with runtime.sequence(lora=lora) as sequence:
        rows, begin = [], 0
        for end in cuts:
            rows.append(runtime.step([(sequence, IDS[begin:end], "all")]))
            begin = end
        return np.concatenate(rows)


def merged_logits(model: Path, adapter: Path) -> np.ndarray:
    """The original's, with W + s B A in the place of W, by torch."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    from llmc.errors import FrontendError
    from llmc.lora import LoraSettings

    settings = LoraSettings(json.loads((adapter / "adapter_config.json").read_text()), "", FrontendError)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = dict(original.named_modules())
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")].astype(np.float32)
                delta = torch.from_numpy(settings.scale(module) * b @ a.astype(np.float32))
                weight = modules[module].weight
                weight += delta if weight.shape == delta.shape and "Conv1D" not in str(modules[module]) else delta.T
        return original(torch.from_numpy(IDS[None].astype(np.int64))).logits[0].numpy()


def near(found: np.ndarray, expected: np.ndarray, limit: float = 2e-5) -> None:
    """Relative to the largest logit: f32 sums in another order, through the layers of a small model."""
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def test_a_loaded_adapter_computes_what_merged_weights_do(runtime: Runtime, folder: Path, one: Path, two: Path) -> None:
    plain = runtime.forward(IDS)
    runtime.load_lora("one", one)
    runtime.load_lora("two", two)
    assert runtime.loras == {"one": one, "two": two}
    for name, directory in (("one", one), ("two", two)):
        expected = merged_logits(folder / "llama", directory)
        near(logits(runtime, name), expected)
        assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()
    same(logits(runtime, None), plain)


# Merged and split projections, turned weights, activations without gates, biases and residuals behind them.
@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        "phi3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon", "gemma2", "opt", "gptj", "bloom", "qwen2")),
    ],
)
def test_other_models_too(family: str, folder: Path) -> None:
    runtime = Runtime.load(compiled(folder, family), threads=2)
    adapter = write_adapter(folder / f"{family}-adapter", sizes_of(runtime), seed=3)
    plain = runtime.forward(IDS)
    runtime.load_lora("x", adapter)
    near(logits(runtime, "x"), merged_logits(folder / family, adapter))
    same(logits(runtime, None), plain)


@pytest.fixture(scope="module", params=["none", "int4", "bf16"])
def loaded(request: pytest.FixtureRequest, folder: Path, one: Path, two: Path) -> Iterator[Runtime]:
    runtime = Runtime.load(compiled(folder, scheme=request.param), threads=2)
    runtime.load_lora("one", one)
    runtime.load_lora("two", two)
    yield runtime


def test_rows_have_the_same_bits_in_any_company(loaded: Runtime) -> None:
    names = ("one", None, "two", "one")
    alone = {name: logits(loaded, name) for name in set(names)}
    assert len({rows.tobytes() for rows in alone.values()}) == 3
    sequences = [loaded.sequence(lora=name) for name in names]
    together = loaded.step([(sequence, IDS, "all") for sequence in sequences]).reshape(len(names), len(IDS), -1)
    for rows, name in zip(together, names, strict=True):
        same(rows, alone[name])
    next_tokens = decode(loaded, sequences, [7] * len(names))
    for sequence in sequences:
        sequence.close()
    for row, name in zip(next_tokens, names, strict=True):
        with loaded.sequence(lora=name) as single:
            loaded.step([(single, IDS, "none")])
            same(decode(loaded, [single], [7]), row[None])


@pytest.mark.parametrize("cuts", [(64, 70), (3, 5, 41, 70), (2, 33, 35, 70)])
def test_a_prompt_may_be_cut_anywhere(loaded: Runtime, cuts: tuple[int, ...]) -> None:
    if loaded.row_kinds and cuts != (64, 70):
        pytest.skip("tiles end at multiples of their size where prompts are computed on tile registers")
    for name in ("one", "two", None):
        same(logits(loaded, name, cuts), logits(loaded, name))


def test_without_adapters_the_bits_are_those_of_an_artifact_without_room(loaded: Runtime, folder: Path) -> None:
    scheme = str(loaded.manifest.raw["provenance"]["options"]["quantization"])  # type: ignore[index]
    plain = Runtime.load(compiled(folder, scheme=scheme, name="plain", adapters=0), threads=2)
    assert plain.manifest.adapters is None and plain.loras == {}
    same(logits(loaded, None), plain.forward(IDS))
    tensors = (sum(t.nbytes for t in runtime.manifest.tensors) for runtime in (loaded, plain))
    assert len(set(tensors)) == 1  # one copy of the weights
    with pytest.raises(AdapterError, match="has no room for adapters: compile it with `--adapters N`"):
        plain.load_lora("one", folder / "one")


def test_prefixes_are_shared_by_texts_of_one_adapter_only(runtime: Runtime, one: Path, two: Path) -> None:
    runtime.load_lora("one", one)
    runtime.load_lora("two", two)

    def covered(lora: str | None) -> int:
        with runtime.sequence(lora=lora) as sequence:
            return sequence.adopt_prefix(IDS)

    plain = runtime.forward(IDS)
    assert [covered(name) for name in (None, "one", "two")] == [64, 0, 0]
    first = logits(runtime, "one")
    assert [covered(name) for name in (None, "one", "two")] == [64, 64, 0]
    for name, rows in (("one", first), (None, plain)):
        with runtime.sequence(lora=name) as sequence:
            assert sequence.adopt_prefix(IDS) == 64
            same(runtime.step([(sequence, IDS[64:], "all")]), rows[64:])
    runtime.load_lora("one", two)  # another adapter of that name: what was computed with the first is not its
    assert covered("one") == 0
    same(logits(runtime, "one"), logits(runtime, "two"))
    runtime.load_lora("one", one)
    assert covered("one") == 0
    same(logits(runtime, "one"), first)
    runtime.pool.check()


def test_forks_keep_their_adapter(runtime: Runtime, one: Path) -> None:
    runtime.load_lora("one", one)
    expected = logits(runtime, "one")
    with runtime.sequence(lora="one") as sequence:
        runtime.step([(sequence, IDS[:40], "none")])
        with sequence.fork() as other:
            sequence.rollback(7)
            same(runtime.step([(other, IDS[40:], "all")]), expected[40:])
            same(runtime.step([(sequence, IDS[33:40], "all")]), expected[33:40])


def test_texts_are_written_with_their_adapters(runtime: Runtime, one: Path, two: Path) -> None:
    runtime.load_lora("one", one)
    runtime.load_lora("two", two)
    names = ["one", None, "two"]
    alone = [runtime.generate(IDS, max_tokens=12, lora=name) for name in names]
    assert len(set(alone)) == 3
    assert runtime.generate_batch([IDS] * 3, max_tokens=12, lora=names) == alone
    assert runtime.generate_batch([IDS] * 2, max_tokens=12, lora="two") == [alone[2]] * 2
    assert runtime.stream(IDS, max_tokens=12, lora="one").text() == alone[0]
    assert runtime.chat("hello", max_tokens=5, lora="one") == runtime.chat_batch(["hello"], max_tokens=5, lora="one")[0]
    for wrong in (["one"], ["one", "two", 3], 7):
        with pytest.raises(RuntimeStateError, match="lora is a name"):
            runtime.generate_batch([IDS] * 3, max_tokens=2, lora=wrong)  # type: ignore[arg-type]
    with pytest.raises(RuntimeStateError, match="lora is the name of one adapter"):
        runtime.generate(IDS, max_tokens=2, lora=["one"])
    with pytest.raises(AdapterError, match="no adapter 'three' is loaded"):
        runtime.generate(IDS, max_tokens=2, lora="three")


def test_adapters_come_and_go(runtime: Runtime, one: Path, two: Path) -> None:
    expected = {}
    for name, directory in (("a", one), ("b", two), ("c", one)):
        runtime.load_lora(name, directory)
        expected[name] = logits(runtime, name)
    with pytest.raises(AdapterError, match=r"all 3 adapters that there is room for are loaded \(a, b, c\): unload one"):
        runtime.load_lora("d", two)
    sequence = runtime.sequence(lora="b")
    sequence.append(IDS[:3])
    for change in (lambda: runtime.unload_lora("b"), lambda: runtime.load_lora("b", one)):
        with pytest.raises(
            AdapterError, match="adapter 'b' is in use by 1 text or sequence: finish or close them first"
        ):
            change()
    assert list(runtime.loras) == ["a", "b", "c"]
    same(logits(runtime, "b"), expected["b"])
    del sequence  # a sequence that was dropped uses nothing
    runtime.unload_lora("b")
    assert list(runtime.loras) == ["a", "c"]
    with pytest.raises(AdapterError, match=r"no adapter 'b' is loaded \(loaded: a, c\)"):
        runtime.sequence(lora="b")
    with pytest.raises(AdapterError, match="no adapter 'b' is loaded"):
        runtime.unload_lora("b")
    runtime.load_lora("d", two)
    same(logits(runtime, "d"), expected["b"])
    same(logits(runtime, "a"), expected["a"])
    for wrong in ("", 3, "x" * 257):
        with pytest.raises(AdapterError, match="an adapter's name is a text"):
            runtime.load_lora(wrong, one)  # type: ignore[arg-type]


def test_a_smaller_adapter_leaves_nothing_of_the_one_before(
    runtime: Runtime, one: Path, two: Path, tmp_path: Path
) -> None:
    """Ranks and modules that the new one does not have were another's."""
    small = write_adapter(tmp_path / "small", sizes_of(runtime), ["model.layers.0.self_attn.k_proj"], rank=1, seed=5)
    fresh = Runtime.load(runtime.artifact.path, threads=2)
    fresh.load_lora("x", small)
    for before in (one, two):
        runtime.load_lora("x", before)
        runtime.load_lora("x", small)
        same(logits(runtime, "x"), logits(fresh, "x"))


def test_closing_a_layer_gives_everything_back(artifact: Path, one: Path) -> None:
    runtime = Runtime.load(artifact, threads=1)
    runtime.load_lora("one", one)
    runtime.close()
    with pytest.raises(RuntimeStateError):
        runtime.generate(IDS, max_tokens=1, lora="one")


def test_inputs_that_were_evened_meet_an_adapter_that_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Powers of two that went from a norm to the layers behind it go to their adapters, too (compiler/smoothing.py).

    It is done for int8; here what it makes is computed in f32, so that nothing else differs."""
    even = pipeline.evened
    monkeypatch.setattr(
        pipeline, "evened", lambda lifted, options, told: even(lifted, replace(options, quantization="int8"), told)
    )
    from safetensors.numpy import load_file, save_file

    model = make_tiny("llama", folder / "uneven")
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if "input_layernorm" in name:
            tensors[name][[5, 40]] *= 64
            for layer in ("q_proj", "k_proj", "v_proj"):
                tensors[name.replace("input_layernorm", f"self_attn.{layer}")][:, [5, 40]] /= 64
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    runtime = Runtime.load(compiled(folder, "uneven"), threads=2)
    facts = runtime.manifest.adapters
    assert facts is not None
    powers = {table.parts[0].module.rpartition(".")[2]: table.powers for table in facts.tables}
    assert set(powers["q_proj"]) > {0} and not powers["down_proj"]
    chosen = [name for name in sizes_of(runtime) if name.endswith(("q_proj", "v_proj"))]
    adapter = write_adapter(folder / "uneven-adapter", sizes_of(runtime), chosen, seed=6, lora_alpha=1)
    runtime.load_lora("x", adapter)
    expected, plain = merged_logits(model, adapter), runtime.forward(IDS)
    near(logits(runtime, "x"), expected, 1e-4)  # scores of attention are 64 times as large here
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()


def test_the_command_line(artifact: Path, one: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*words: object) -> tuple[int, str, str]:
        status = cli.run([str(word) for word in words])
        out, error = capfd.readouterr()
        return status, out, error

    runtime = Runtime.load(artifact, threads=2)
    runtime.load_lora("x", one)
    command = ("run", artifact, "def f", "--max-tokens", 6, "--threads", 2, "--json")
    for lora, options in (("x", ("--lora", f"x={one}")), (None, ())):
        status, out, _ = said(*command, *options)
        assert status == 0 and json.loads(out)["text"] == runtime.generate("def f", max_tokens=6, lora=lora)
    for given in ("x", "=dir", "x="):
        status, _, error = said(*command, "--lora", given)
        assert status == 1 and "--lora takes NAME=DIR, such as style=./my-adapter" in error
    status, _, error = said(*command, "--lora", f"x={folder / 'nothing'}")
    assert status == 1 and "is no directory: give the one that PEFT has written" in error
    status, out, _ = said("inspect", artifact)
    assert status == 0 and f"room for {COUNT} at a time, of rank {RANK} at most, beside 15 modules" in out
    status, out, _ = said("explain", artifact)
    assert status == 0 and "adapt-linears" in out and "low_rank_inner" in out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"adapters": -1}, "--adapters is at least 0, not -1"),
        ({"adapters": 2000}, "--adapters is at most 1024"),
        ({"adapter_rank": 0}, "--adapter-rank is at least 1"),
        ({"adapters": True}, "--adapters is a whole number"),
    ],
)
def test_options_out_of_range(options: dict[str, int], why: str) -> None:
    with pytest.raises(CompileError, match=why):
        CompileOptions(**options)  # type: ignore[arg-type]


def test_options_of_an_artifact_without_room_do_not_name_it() -> None:
    assert not {"adapters", "adapter_rank"} & set(CompileOptions(adapter_rank=7).as_json())
    assert CompileOptions(adapters=2, adapter_rank=7).as_json()["adapter_rank"] == 7
