"""run, chat: text from a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.kinds import require
from llmc.cli.streams import read_text
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.generation import Options as Sampling
    from llmc.runtime.generation import TextStream
    from llmc.runtime.runtime import Runtime


def load(model: str, quantization: str, threads: int | None, weights: Path | None) -> Runtime:
    """A runtime for an artifact's file; a model's directory or hub name is compiled into the cache first."""
    from llmc.runtime.runtime import Runtime

    path = Path(model)
    if path.is_file() or path.suffix == ".so":
        return Runtime.load(path, threads, weights=weights)
    if not path.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise LlmcError(f"{model}: no such file or directory; give a compiled model, a model's directory or a hub name")
    from llmc.api import cached_artifact

    options = o.compile_options(quantization=quantization)
    with output.progress() as progress:
        artifact = cached_artifact(model, None, options, progress)
    return Runtime.load(artifact, threads, weights=weights)


def run(
    model: o.ModelOrArtifact,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    threads: o.Threads = None,
    quantization: o.Quantization = "int4",
    weights: o.Weights = None,
    json: o.Json = False,
) -> None:
    """Continue a text, and say how fast that went."""
    if prompt == "-":
        prompt = read_text(Path("-"), "PROMPT")
    sampling: Sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop,
    }  # fmt: skip
    runtime = load(model, quantization, threads, weights)
    require(runtime.manifest, runtime.artifact.path, "run", "generate")
    stream = runtime.stream(prompt, **sampling)
    if json:
        text = stream.text()
        output.print_json({"prompt": prompt, "text": text, **_facts(stream)})
        return
    if sys.stdout.isatty():
        print(prompt, end="", flush=True)
    _show(stream)
    print(flush=True)
    output.line(_summary(stream))


def _show(stream: TextStream) -> str:
    """Prints pieces as they come; Ctrl-C ends the text. Returns what was printed."""
    text = ""
    try:
        for piece in stream:
            text += piece
            print(piece, end="", flush=True)
    finally:
        stream.close()
    return text


def _facts(stream: TextStream) -> dict[str, object]:
    count = len(stream.tokens)
    # The first token comes out of the prompt's own step.
    seconds = stream.decode_seconds
    fresh = stream.prompt_tokens - stream.cached_tokens
    return {
        "finish_reason": stream.finish_reason,
        "prompt_tokens": stream.prompt_tokens,
        "generated_tokens": count,
        "prefill_tokens_per_second": fresh / stream.prefill_seconds if stream.prefill_seconds else None,
        "decode_tokens_per_second": (count - 1) / seconds if seconds > 0 and count > 1 else None,
    }


def _summary(stream: TextStream) -> str:
    facts = _facts(stream)
    rates = [
        f"{facts[key]:.1f} tokens/s {what}"
        for key, what in (("decode_tokens_per_second", "writing"), ("prefill_tokens_per_second", "reading"))
        if facts[key] is not None
    ]
    return f"{facts['generated_tokens']} tokens after a prompt of {facts['prompt_tokens']}: {', '.join(rates)}"


def chat(
    model: o.ModelOrArtifact,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    threads: o.Threads = None,
    quantization: o.Quantization = "int4",
    weights: o.Weights = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the conversation as one JSON object at the end, and nothing else.")
    ] = False,
) -> None:
    """Talk with a model: /reset starts over, /exit (or Ctrl-D) ends."""
    sampling: Sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop,
    }  # fmt: skip
    runtime = load(model, quantization, threads, weights)
    require(runtime.manifest, runtime.artifact.path, "chat", "generate")
    start = [] if system is None else [{"role": "system", "content": system}]
    runtime.chat_template.render([*start, {"role": "user", "content": "Hello"}])  # a model that cannot chat says so now
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (makes input() edit its line)

        output.line("/reset starts over, /exit ends; Ctrl-C stops an answer")
    messages = list(start)
    while True:
        try:
            query = input("> " if interactive and not json else "").strip()
        except EOFError:
            break
        if query == "/exit":
            break
        if query == "/reset":
            messages = list(start)
            continue
        if query.startswith("/"):
            output.line(f"unknown command {query.split()[0]}; there are /reset and /exit")
            continue
        if query:
            messages.append({"role": "user", "content": query})
            messages.append({"role": "assistant", "content": _answer(runtime, messages, sampling, json)})
    if json:
        output.print_json({"messages": messages})
    elif interactive:
        print()


def _answer(runtime: Runtime, messages: list[dict[str, str]], sampling: Sampling, quiet: bool) -> str:
    """One answer, printed as it comes; Ctrl-C cuts it short and keeps what there is."""
    stream = runtime.stream_chat(messages, **sampling)
    if quiet:
        return stream.text()
    text = ""
    try:
        for piece in stream:
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    print(flush=True)
    if stream.tokens:
        output.line(_summary(stream))
    return text


COMMANDS = (
    (run, ("llmc run pycoder.so 'def fibonacci(' --max-tokens 64 --temperature 0.7 --seed 1",)),
    (chat, ("llmc chat assistant.so --system 'Answer in one sentence.'",)),
)
