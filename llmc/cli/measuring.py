"""bench, eval: how fast, and how good."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.kinds import require
from llmc.cli.profile_table import print_profile
from llmc.cli.roofline import check_roofline, draw_roofline
from llmc.errors import LlmcError


def bench(
    artifact: o.Artifact,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = 512,
    gen_tokens: Annotated[int, typer.Option("--gen-tokens", help="Tokens to write after each.")] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Texts at once.")] = 1,
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
    """Measure tokens per second, and how near writing comes to this machine's memory bandwidth."""
    from llmc.runtime.measure import bench as measure

    if roofline is not None:
        check_roofline(roofline)  # told before the work, not after it
    with output.progress() as progress:

        def tell(phase: str, count: int) -> None:
            if phase:
                progress.start(phase, count or None)
            else:
                progress.advance(count)

        found = measure(
            artifact, prompt_tokens, gen_tokens, batch, threads, repeats=repeats, weights=weights, tell=tell,
            profile=profile or roofline is not None,
        )  # fmt: skip
    if roofline is not None and found.profile is not None:
        draw_roofline(found.profile, roofline, artifact.name)
    if json:
        output.print_json({"artifact": str(artifact), **asdict(found)})
        return
    read, limit = found.weight_bytes_per_token, found.memory_gigabytes_per_second
    output.facts(
        {
            "prefill": f"{found.prefill_tokens_per_second:,.1f} tokens/s ({batch} x {prompt_tokens} tokens)",
            "decode": f"{found.decode_tokens_per_second:,.1f} tokens/s ({batch} x {gen_tokens} tokens)",
            "weights read": f"{output.size(read)} a step, {found.gigabytes_per_second:.2f} GB/s",
            "memory bandwidth": f"{limit:.2f} GB/s measured now with {found.threads} threads; "
            f"decode uses {found.bandwidth_percent:.1f}% of it",
            "load": f"{found.load_seconds:.3f} s",
            "peak memory": output.size(found.peak_memory_bytes),
        }
    )
    if profile and found.profile is not None:
        print_profile(found.profile)


def eval(
    artifact: o.Artifact,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="A text in UTF-8.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="DIR", help="The original model, to compare with (in f32).")
    ] = None,
    window: Annotated[
        int, typer.Option("--window", help="Tokens of a window, its first (beginning of text) included.")
    ] = 512,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Only the first so many.")] = None,
    threads: o.Threads = None,
    weights: o.Weights = None,
    json: o.Json = False,
) -> None:
    """Measure perplexity on a text; with a reference, also the divergence from it and how often both agree.

    The text's tokens are cut into windows, each with the beginning-of-text token in front. Every token of a window but
    the first is predicted from those before it in the window. A last window that is not full is left out.
    """
    from llmc.cli.reference import transformers_reference
    from llmc.runtime.perplexity import evaluate, windows_of
    from llmc.runtime.runtime import Runtime

    try:
        content = text.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise LlmcError(f"--text {text} is not UTF-8: byte {error.start}") from error
    with output.progress() as progress:
        runtime = Runtime.load(artifact, threads, weights=weights)
        require(runtime.manifest, artifact, "eval", "generate")
        cut = windows_of(runtime, content, window, windows)
        expected = None
        if reference is not None:
            progress.start("loading the reference")
            expected = transformers_reference(reference)
        progress.start("reading windows", len(cut))
        found = evaluate(runtime, cut, expected, progress.advance)
    if json:
        output.print_json({"artifact": str(artifact), "text": str(text), **asdict(found)})
        return
    rows = {
        "perplexity": f"{found.perplexity:.4f} ({found.tokens} tokens in {found.windows} windows of {found.window})"
    }
    if found.reference_perplexity is not None:
        change = 100 * (found.perplexity / found.reference_perplexity - 1)
        rows["reference perplexity"] = f"{found.reference_perplexity:.4f} ({change:+.3f}% from it)"
        rows["mean KL divergence"] = f"{found.mean_kl_divergence:.6f} nats"
        rows["top-1 agreement"] = f"{100 * (found.top1_agreement or 0):.2f}%"
    output.facts(rows)


COMMANDS = (
    (
        bench,
        (
            "llmc bench pycoder.so --prompt-tokens 512 --gen-tokens 128 --json",
            "llmc bench pycoder.so --batch 8 --profile",
        ),
    ),
    (eval, ("llmc eval pycoder.so --text examples/pycoder/heldout.txt --reference examples/pycoder --windows 48",)),
)
