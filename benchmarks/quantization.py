"""What rounding costs: perplexity and bits per weight of each scheme, simulated in torch; error and time of a search.

    python benchmarks/quantization.py MODEL_DIR [--text FILE] [--windows 48] [--only TEXT]
    python benchmarks/quantization.py MODEL_DIR --artifacts [--seeds 0,1] [--bits 4.65,4.86]
    python benchmarks/quantization.py --search

The first form reads a Hugging Face directory, rounds its weights with llmc's own encodings (and the inputs of its
linear layers as llmc's kernels would), and measures perplexity over windows of 512 tokens of the text (default:
heldout.txt in the directory). Settings that name a head untie it from the embedding. The second form compiles artifacts
in int4, by texts that the model writes with several seeds, and compares them with the original in f32 on the text, on
the sources of Jinja (the one package in Python that llmc's runtime needs: nothing was chosen by it), on texts that the
model writes with another seed, and on those that weights were rounded by. The third form compares candidate sets of the
search on normal weights: error left, and time a weight.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmc
from llmc.api import make_options
from llmc.cli.reference import transformers_reference
from llmc.compiler import pipeline
from llmc.compiler.encodings import encode, stored_bytes
from llmc.compiler.encodings import search as search_module
from llmc.compiler.encodings.grouped import grouped
from llmc.compiler.encodings.levels import table_levels
from llmc.compiler.ir.llm import round_activations
from llmc.compiler.ir.types import parse_encoding
from llmc.compiler.own_text import random_texts
from llmc.compiler.progress import Silent
from llmc.compiler.scratch import scratch_folder
from llmc.runtime.perplexity import Ids, Quality, evaluate_all, windows_of
from llmc.runtime.runtime import Runtime

WINDOW = 512
OTHER_SEED = 1000  # beyond that of the text that weights are rounded by


@dataclass(frozen=True)
class Setting:
    """One row of the table. `head` empty: the embedding's own values, as in a model whose two are tied."""

    linear: str
    embedding: str
    head: str = ""
    activations: str = "f32"
    search: bool = True

    def __str__(self) -> str:
        head = f", head {self.head}" if self.head else ""
        how = "" if self.search else ", nearest"
        return f"linear {self.linear}, embedding {self.embedding}{head}, activations {self.activations}{how}"


SETTINGS = [
    Setting("f32", "f32"),
    Setting("bf16", "bf16"),
    Setting("q8g64", "q8g64"),
    Setting("q8g64", "q8g64", search=False),
    Setting("q8g64", "q8g64", activations="int8"),
    Setting("q4g64", "q8g64", search=False),
    Setting("q4g64", "q8g64"),
    Setting("q4g64", "q8g64", activations="int8"),
    Setting("q4g32", "q8g32", activations="int8"),
    Setting("q4g128", "q8g128", activations="int8"),
    Setting("q4g64a", "q8g64", activations="int8"),
    Setting("q4g64a", "q8g64", activations="int8", search=False),
    Setting("q4g128a", "q8g64", activations="int8"),
    Setting("f32", "q8g64", head="f32"),
    Setting("f32", "t6g64", head="f32"),
    Setting("f32", "t6g128", head="f32"),
    Setting("q4g64", "q8g64", head="q8g64", activations="int8"),
    Setting("t4g64", "q8g64", search=False),
    Setting("t4g64", "q8g64"),
    Setting("t4g64", "q8g64", activations="int8"),
    Setting("t4g64", "t6g64", activations="int8"),
    Setting("t4g32", "t6g32", activations="int8"),
    Setting("t4g128", "q8g128", activations="int8"),
    Setting("t6g64", "t6g64", activations="int8"),
    Setting("t4g64", "t6g64", head="q8g64", activations="int8"),
    Setting("q4g64", "q8g64", head="q4g64", activations="int8"),
    Setting("q4g64", "q4g64", head="q8g64", activations="int8"),
    Setting("q4g64", "q4g64", activations="int8"),
]


def rounded(weight: torch.Tensor, kind: str, search: bool) -> torch.Tensor:
    """The weight as an encoding or dtype keeps it, in f32."""
    if kind in ("f32", "bf16", "f16"):
        return weight.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]).float()
    return torch.from_numpy(encode(parse_encoding(kind), weight.numpy(), search=search).decode())


def stored(kind: str, shape: torch.Size) -> int:
    """Bytes of a weight in an encoding or dtype."""
    plain = {"f32": 4, "bf16": 2, "f16": 2}.get(kind)
    return math.prod(shape) * plain if plain else stored_bytes(parse_encoding(kind), list(shape))


def rounding_hook(group: int) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    """A hook that rounds a layer's input to int8 in groups, as kernels do."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.from_numpy(round_activations(inputs[0].numpy(), "int8", group)),)

    return hook


def simulate(original: PreTrainedModel, setting: Setting) -> tuple[PreTrainedModel, float]:
    """A copy of the model with rounded weights, and its bits per weight with every parameter counted."""
    model = copy.deepcopy(original)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    table = head.weight.detach()
    size = stored(setting.embedding, embedding.weight.shape)
    embedding.weight = nn.Parameter(rounded(embedding.weight.detach(), setting.embedding, setting.search))
    if setting.head or not tied:
        kind = setting.head or setting.linear
        head.weight = nn.Parameter(rounded(table, kind, setting.search))
        size += stored(kind, table.shape)
    else:
        head.weight = embedding.weight
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linears:
        if module is not head:
            size += stored(setting.linear, module.weight.shape)
            module.weight = nn.Parameter(rounded(module.weight.detach(), setting.linear, setting.search))
        kind = (setting.head or setting.embedding) if module is head else setting.linear
        if setting.activations == "int8" and kind.startswith(("q", "t")):
            group = getattr(parse_encoding(kind), "group", 64)
            module.register_forward_pre_hook(rounding_hook(group))
    matrices = {id(embedding.weight), *(id(module.weight) for module in linears)}
    size += 4 * sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in matrices)
    return model, 8 * size / sum(parameter.numel() for parameter in model.parameters())


def windows(directory: Path, text: Path, count: int) -> Iterator[torch.Tensor]:
    """Windows of 512 token ids that start with the beginning-of-text token, where there is one."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = WINDOW - len(start)
    for index in range(min(count, len(ids) // step)):
        yield torch.tensor([start + ids[index * step : (index + 1) * step]])


@torch.no_grad()
def losses(model: PreTrainedModel, batches: list[torch.Tensor]) -> np.ndarray:
    """Mean negative log likelihood of each window."""
    found = []
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    return np.array(found)


def accuracy(options: argparse.Namespace) -> None:
    """The table of settings."""
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    batches = list(windows(options.model, options.text or options.model / "heldout.txt", options.windows))
    print(f"{len(batches)} windows of {WINDOW} tokens")
    print("bits/weight  perplexity    change  (standard error)")
    reference = None
    for setting in SETTINGS:
        if reference is not None and options.only not in str(setting):
            continue
        model, bits = simulate(original, setting)
        found = losses(model, batches)
        reference = found if reference is None else reference
        difference = found - reference
        spread = difference.std() / math.sqrt(len(difference))
        change = f"{math.expm1(difference.mean()):+9.2%}  ({spread:.2%})"
        print(f"{bits:11.2f}  {math.exp(found.mean()):10.3f} {change}  {setting}", flush=True)


def artifacts(options: argparse.Namespace) -> None:
    """The table of artifacts: seeds of the text that weights are rounded by, texts, and bits a weight."""
    reference = transformers_reference(options.model)
    print("seed   bits  perplexity  KL, 1e-3    same  text")
    for seed in options.seeds:
        with scratch_folder() as folder, ExitStack() as stack:
            runtimes = []
            for bits in options.bits:
                path = folder / f"{bits}.so"
                llmc.compile(options.model, path, "int4", bits_per_weight=bits, seed=seed, accuracy=False)
                runtimes.append(stack.enter_context(Runtime.load(path, options.threads)))
            for name, batches in texts_to_compare(options, runtimes[0], seed, folder).items():
                found = evaluate_all(runtimes, batches, reference)
                for runtime, each in zip(runtimes, found, strict=True):
                    print(f"{seed:4}  {line_of(runtime, each)}  {name}, {each.windows} windows", flush=True)


def line_of(runtime: Runtime, found: Quality) -> str:
    """What an artifact has lost on a text."""
    assert found.reference_perplexity is not None and found.mean_kl_divergence is not None
    change = found.perplexity / found.reference_perplexity - 1
    bits, kl = runtime.manifest.model.bits_per_weight, 1e3 * found.mean_kl_divergence
    return f"{bits:5.3f}  {change:+10.2%}  {kl:8.2f}  {found.top1_agreement:6.1%}"


def texts_to_compare(options: argparse.Namespace, runtime: Runtime, seed: int, folder: Path) -> dict[str, list[Ids]]:
    """Windows of what artifacts are compared on, by name."""
    held = options.text or options.model / "heldout.txt"
    sources = sorted(Path(jinja2.__file__).parent.rglob("*.py"))
    jinja = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    chosen = make_options("int4")
    lifted = pipeline.lift_model(str(options.model), chosen)
    own = {}
    for name, each in (("own, another seed", seed + OTHER_SEED), ("own, rounded by", seed)):
        begun = random_texts(lifted, pipeline.vocabulary_of(lifted), each)
        with_seed = dataclasses.replace(chosen, seed=each)
        own[name] = pipeline.written_texts(str(options.model), lifted, begun, with_seed, folder, Silent())
    return {
        held.name: windows_of(runtime, held.read_text(encoding="utf-8"), WINDOW, options.windows),
        f"jinja2 {jinja2.__version__}": windows_of(runtime, jinja, WINDOW, options.windows),
        **own,
    }


CANDIDATE_SETS: dict[str, dict[str, tuple[float, ...]]] = {
    "q4g64": {
        "1: extreme to 7": (7.0,),
        "2: and to -8": (7.0, -8.0),
        "4: as shipped": (7.0, *(-8.0 * part for part in search_module.BEYOND)),
        "8: finer": (7.0, -8.0, -8.2, -8.4, -8.6, -8.85, -7.6, -7.0),
        "17": (7.0, *np.arange(-6.6, -9.0, -0.15).round(3).tolist()),
        "200: fine": (7.0, *np.linspace(-5.5, -9.5, 200).tolist()),
    },
    "t4g64": {
        "1: extreme to 7.25": (7.25,),
        "2: and to -8.5": (7.25, -8.5),
        "5: as shipped": search_module.CANDIDATES[table_levels(4)],
        "200: fine": (*np.linspace(6.0, 8.5, 80).tolist(), *np.linspace(-7.0, -10.0, 120).tolist()),
    },
}


def search_table() -> None:
    """Squared error left (nearest: 1) and time a weight of candidate sets, 4 bits in groups of 64, one thread."""
    w = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
    for name, sets in CANDIDATE_SETS.items():
        search_sets(name, sets, w)


def search_sets(name: str, sets: dict[str, tuple[float, ...]], w: np.ndarray) -> None:
    """The lines of one encoding."""
    encoding = grouped(parse_encoding(name))

    def measure(search: bool) -> tuple[float, float]:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            encoded = encode(encoding, w, search=search, threads=1)
            best = min(best, time.perf_counter() - start)
        return float(np.square(encoded.decode() - w).sum(dtype=np.float64)), best / w.size * 1e9

    nearest, seconds = measure(False)
    print(f"{name} {'nearest':24}  error 1.000  {seconds:6.1f} ns a weight")
    shipped = dict(search_module.CANDIDATES)
    for what, candidates in sets.items():
        search_module.CANDIDATES[encoding.levels] = candidates
        error, seconds = measure(True)
        print(f"{name} {what:24}  error {error / nearest:.3f}  {seconds:6.1f} ns a weight", flush=True)
    search_module.CANDIDATES.clear()
    search_module.CANDIDATES.update(shipped)


def numbers(kind: type[int] | type[float]) -> Callable[[str], list[int] | list[float]]:
    """Reads numbers with commas between them."""
    return lambda text: [kind(each) for each in text.split(",")]  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face directory")
    parser.add_argument("--text", type=Path, help="the text to measure on (default: heldout.txt in the directory)")
    parser.add_argument("--windows", type=int, default=48, help="how many windows of 512 tokens at most")
    parser.add_argument("--only", default="", help="only settings whose description contains this")
    parser.add_argument("--artifacts", action="store_true", help="compile artifacts, and compare them on several texts")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1], help="of texts to round by (default: 0,1)")
    parser.add_argument("--bits", type=numbers(float), default=[4.65, 4.86], help="a weight (default: 4.65,4.86)")
    parser.add_argument("--search", action="store_true", help="compare candidate sets of the search instead")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.search:
        search_table()
    elif options.model is None:
        parser.error("MODEL_DIR is missing (or give --search)")
    elif options.artifacts:
        artifacts(options)
    else:
        accuracy(options)


if __name__ == "__main__":
    main()
