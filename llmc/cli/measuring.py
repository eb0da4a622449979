"""bench, eval: how fast, and how good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.kinds import require
from llmc.cli.profile_table import MEASURED_LOW, print_profile
from llmc.cli.roofline import check_roofline, draw_roofline
from llmc.cli.streams import read_text
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.measure import Bench
    from llmc.runtime.measure_steps import ArrayBench, EncoderBench


def bench(
    artifact: o.Artifact,
    prompt_tokens: Annotated[
        int | None,
        typer.Option("--prompt-tokens", help="Tokens of each prompt [512]; of an encoder's longest text [128]."),
    ] = None,
    gen_tokens: Annotated[int | None, typer.Option("--gen-tokens", help="Tokens to write after each [128].")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Texts at once [1; for an encoder 64].")] = None,
    dims: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=N", help="A size of a model of arrays [the most]; several times."),
    ] = None,
    threads: o.Threads = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs; medians are reported.")] = 3,
    weights: o.Weights = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also time every kernel, beside this machine's limits.")
    ] = False,
    roofline: Annotated[
        Path | None,
        typer.Option("--roofline", metavar="FILE", help="Draw the kernels below those limits: a .png, .svg or .pdf."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure tokens per second, and how near writing comes to this machine's memory bandwidth.

    Loading is timed until the first step could run; what is left of it, checking and copying weights, is waited for
    before the rest is. Of an encoder: texts per second, whose lengths are spread from 16 tokens to --prompt-tokens. Of
    a model of arrays: the time of a call on random inputs.
    """
    from llmc.runtime.measure import bench as measure
    from llmc.runtime.measure_steps import bench_arrays, bench_encoder

    if roofline is not None:
        check_roofline(roofline)  # an error comes before the work, not after it
    task = _task(artifact)
    _check_options(task, artifact, prompt_tokens, gen_tokens, batch, dims)
    found: Bench | EncoderBench | ArrayBench
    with output.progress() as progress:

        def tell(phase: str, count: int) -> None:
            if phase:
                progress.start(phase, count or None)
            else:
                progress.advance(count)

        common: _Common = {
            "threads": threads, "repeats": repeats, "weights": weights, "tell": tell,
            "profile": profile or roofline is not None,
        }  # fmt: skip
        if task == "run":
            found = bench_arrays(artifact, _sizes(dims or []), **common)
        elif task == "encode":
            longest = prompt_tokens or 128
            found = bench_encoder(artifact, min(16, longest), longest, batch or 64, **common)
        else:
            found = measure(
                artifact, prompt_tokens or 512, 128 if gen_tokens is None else gen_tokens, batch or 1, **common
            )
    if roofline is not None and found.profile is not None:
        draw_roofline(found.profile, roofline, artifact.name)
    if json:
        output.print_json({"artifact": str(artifact), **asdict(found)})
        return
    output.facts(_facts(found))
    if profile and found.profile is not None:
        print_profile(found.profile)


class _Common(TypedDict):
    threads: int | None
    repeats: int
    weights: Path | None
    tell: Callable[[str, int], None]
    profile: bool


def _task(artifact: Path) -> str:
    from llmc.runtime.artifact import Artifact

    opened = Artifact.open(artifact)
    opened.close()
    return opened.manifest.task


def _check_options(
    task: str,
    artifact: Path,
    prompt_tokens: int | None,
    gen_tokens: int | None,
    batch: int | None,
    dims: list[str] | None,
) -> None:
    """Refuses options that mean nothing for this kind of artifact."""
    given = {"--prompt-tokens": prompt_tokens, "--gen-tokens": gen_tokens, "--batch": batch, "--dim": dims}
    known = {"generate": ("--prompt-tokens", "--gen-tokens", "--batch"), "encode": ("--prompt-tokens", "--batch")}
    allowed = known.get(task, ("--dim",))
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise LlmcError(f"{name} means nothing for {artifact}: it takes {', '.join(allowed)}")
    for name in ("--prompt-tokens", "--batch"):
        value = given[name]
        if isinstance(value, int) and value < 1:
            raise LlmcError(f"{name} must be 1 or more, not {value}")


def _sizes(texts: list[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, size = text.rpartition("=")
        if not name or not size.isdecimal():
            raise LlmcError(f"--dim is NAME=N, such as batch=1, not {text!r}")
        sizes[name] = int(size)
    return sizes


def _facts(found: Bench | EncoderBench | ArrayBench) -> dict[str, str]:
    """What was measured, for people."""
    from llmc.runtime.measure import Bench
    from llmc.runtime.measure_steps import EncoderBench

    rows: dict[str, str]
    if isinstance(found, Bench):
        rows = {
            "prefill": f"{found.prefill_tokens_per_second:,.1f} tokens/s "
            f"({found.batch} x {found.prompt_tokens} tokens)",
            "decode": f"{found.decode_tokens_per_second:,.1f} tokens/s ({found.batch} x {found.gen_tokens} tokens)",
            "weights read": f"{found.weight_bytes_per_token / 1e6:,.1f} MB a step, "
            f"{found.gigabytes_per_second:.2f} GB/s",
            "memory bandwidth": f"{found.memory_gigabytes_per_second:.2f} GB/s measured now with "
            f"{output.count(found.threads, 'thread')}; {_share(found)}",
        }
    elif isinstance(found, EncoderBench):
        rows = {
            "texts": f"{found.texts_per_second:,.1f} a second ({found.texts} of {found.least_tokens} to "
            f"{found.most_tokens} tokens)",
            "tokens": f"{found.tokens_per_second:,.1f} a second ({found.threads} threads)",
        }
    else:
        sizes = ", ".join(f"{name}={size}" for name, size in found.sizes.items())
        rows = {
            "call": f"{1e3 * found.seconds:,.3f} ms, at best {1e3 * found.least_seconds:,.3f} ms ({found.calls} calls, "
            f"{found.threads} threads)",
            **({"sizes": sizes} if sizes else {}),
        }
    return {**rows, "load": f"{found.load_seconds:.3f} s", "peak memory": output.size(found.peak_memory_bytes)}


def _share(found: Bench) -> str:
    """How much of the memory bandwidth decoding uses, where that means something."""
    percent = found.bandwidth_percent
    if percent is None:
        return "the weights are in cache, so that memory is no limit"
    return f"decode uses {percent:.1f}% of it" if percent <= 100 else f"decode reads faster: {MEASURED_LOW}"


def eval(
    artifacts: Annotated[list[Path], typer.Argument(metavar="SO...", help="A compiled model; several with --compare.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="A text in UTF-8; default: what --reference writes."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Rank artifacts of one model: the smallest divergence or perplexity first."),
    ] = False,
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="DIR", help="The original model, to compare with (in f32).")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens of a window, its first (beginning of text) included.")
    ] = 512,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Only the first so many; of what --reference writes [4].")
    ] = None,
    threads: o.Threads = None,
    weights: o.Weights = None,
    verify: o.Verify = None,
    json: o.Json = False,
) -> None:
    """Measure perplexity on a text; with a reference, also the divergence from it and how often both agree.

    The text's tokens are cut into windows, each with the beginning-of-text token in front. Every token of a window but
    the first is predicted from those before it in the window. A last window that is not full is left out.
    """
    from llmc.cli.comparing import cut_text, print_ranking, ranked
    from llmc.cli.reference import transformers_reference
    from llmc.runtime.perplexity import check_comparable, evaluate_all
    from llmc.runtime.runtime import Runtime

    if compare != (len(artifacts) > 1):
        raise LlmcError("several artifacts are ranked with --compare, which needs two or more of them")
    if text is None and reference is None:
        raise LlmcError("give a text to predict (--text FILE), or the original model that writes one (--reference DIR)")
    content = None if text is None else read_text(text, "--text")
    with output.progress() as progress:
        runtimes = []
        for artifact in artifacts:
            runtimes.append(Runtime.load(artifact, threads, verify, weights=weights))
            require(runtimes[-1].manifest, artifact, "eval", "generate")
        check_comparable(runtimes)
        expected = None
        if reference is not None:
            progress.start("loading the reference")
            expected = transformers_reference(reference)
        cut = cut_text(runtimes, content, expected, window, windows, progress)
        progress.start("reading windows", len(cut))
        found = evaluate_all(runtimes, cut, expected, progress.advance)
        for runtime in runtimes:
            runtime.wait_verified()
    if compare:
        print_ranking(ranked(artifacts, runtimes, found), None if text is None else str(text), json)
        return
    (quality,) = found
    if json:
        given = None if text is None else str(text)
        output.print_json({"artifact": str(artifacts[0]), "text": given, **asdict(quality)})
        return
    rows = {
        "perplexity": f"{quality.perplexity:.4f} ({quality.tokens} tokens in {quality.windows} windows of "
        f"{quality.window})"
    }
    if quality.reference_perplexity is not None:
        change = 100 * (quality.perplexity / quality.reference_perplexity - 1)
        rows["reference perplexity"] = f"{quality.reference_perplexity:.4f} ({change:+.3f}% from it)"
        rows["mean KL divergence"] = f"{quality.mean_kl_divergence:.6f} nats"
        rows["top-1 agreement"] = f"{100 * (quality.top1_agreement or 0):.2f}%"
    output.facts(rows)


COMMANDS = (
    (
        bench,
        (
            "llmc bench pycoder.so --prompt-tokens 512 --gen-tokens 128 --json",
            "llmc bench pycoder.so --batch 8 --profile",
            "llmc bench minilm.so --prompt-tokens 256 --batch 64",
            "llmc bench model.so --dim batch=1 --dim length=128",
        ),
    ),
    (
        eval,
        (
            "llmc eval pycoder.so --text examples/pycoder/heldout.txt --reference examples/pycoder --windows 48",
            "llmc eval --compare int4.so int8.so --text examples/pycoder/heldout.txt --reference examples/pycoder",
        ),
    ),
)
