"""run, chat: text from a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.cli.conversation import Conversation, facts, summary, talk, template_options
from llmc.cli.kinds import require
from llmc.cli.streams import read_text
from llmc.errors import LlmcError

if TYPE_CHECKING:
    from llmc.runtime.generation import Options as Sampling
    from llmc.runtime.generation import TextStream
    from llmc.runtime.runtime import Runtime


def load(
    model: str,
    quantization: str,
    threads: int | None,
    weights: Path | None,
    verify: bool | None = None,
    room: bool = False,
) -> Runtime:
    """A runtime for an artifact's file; a model's directory, file or hub name is compiled into the cache first. room:
    with room for an adapter, then."""
    from llmc.runtime.runtime import Runtime

    path = Path(model)
    if path.suffix == ".so" or (path.is_file() and not is_model(path)):
        return Runtime.load(path, threads, verify, weights=weights)
    if not path.is_dir() and not path.is_file() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        found = "neither a file nor a directory" if path.exists() else "no such file or directory"
        raise LlmcError(f"{model}: {found}; give a compiled model, a model's directory or a hub name")
    from llmc.api import cached_artifact

    options = o.compile_options(quantization=quantization, adapters=int(room))
    with output.progress() as progress:
        artifact = cached_artifact(model, None, options, progress)
    return Runtime.load(artifact, threads, verify, weights=weights)


def adapter_name(given: str | None) -> str | None:
    """What an adapter that was given as NAME=DIR is called."""
    if given is None:
        return None
    name, equals, directory = given.partition("=")
    if not equals or not name or not directory:
        raise LlmcError(f"--lora takes NAME=DIR, such as style=./my-adapter, not {given!r:.60}")
    return name


def load_adapter(runtime: Runtime, given: str | None) -> None:
    """Loads an adapter that was given as NAME=DIR."""
    name = adapter_name(given)
    if given is not None and name is not None:
        runtime.load_lora(name, given.partition("=")[2])


def is_model(path: Path) -> bool:
    """Whether a file is a model's own instead of an artifact, or of what was to be one: no library, and known to a
    frontend."""
    try:
        with path.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                return False
    except OSError:
        return False
    from llmc.frontends.gguf.source import gguf_source

    return gguf_source(path) is not None


def wait_verified(runtime: Runtime) -> None:
    """Ends the check of the weights that began beside the first steps: no command that worked used damaged ones."""
    if not runtime.verifying:
        runtime.wait_verified()
        return
    with output.progress() as progress:
        progress.start("checking the weights, once for this file")
        runtime.wait_verified()


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
    min_new_tokens: o.MinNewTokens = None,
    max_time: o.MaxTime = None,
    typical_p: o.TypicalP = None,
    no_repeat_ngram_size: o.NoRepeatNgramSize = None,
    suppress_tokens: o.SuppressTokens = None,
    lora: o.LoadLora = None,
    threads: o.Threads = None,
    quantization: o.Quantization = "int4",
    weights: o.Weights = None,
    verify: o.Verify = None,
    json: o.Json = False,
) -> None:
    """Continue a text, and say how fast that went."""
    if prompt == "-":
        prompt = read_text(Path("-"), "PROMPT")
    sampling: Sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or None, "min_new_tokens": min_new_tokens,
        "max_time": max_time, "typical_p": typical_p, "no_repeat_ngram_size": no_repeat_ngram_size,
        "suppress_tokens": suppress_tokens or None, "lora": adapter_name(lora),
    }  # fmt: skip
    runtime = load(model, quantization, threads, weights, verify, room=lora is not None)
    require(runtime.manifest, runtime.artifact.path, "run", "generate")
    load_adapter(runtime, lora)
    stream = runtime.stream(prompt, **sampling)
    if json:
        text = stream.text()
        wait_verified(runtime)
        output.print_json({"prompt": prompt, "text": text, **facts(stream)})
        return
    if sys.stdout.isatty():
        print(prompt, end="", flush=True)
    _show(stream)
    print(flush=True)
    output.line(summary(stream))
    wait_verified(runtime)


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
    min_new_tokens: o.MinNewTokens = None,
    max_time: o.MaxTime = None,
    typical_p: o.TypicalP = None,
    no_repeat_ngram_size: o.NoRepeatNgramSize = None,
    suppress_tokens: o.SuppressTokens = None,
    lora: o.LoadLora = None,
    threads: o.Threads = None,
    quantization: o.Quantization = "int4",
    weights: o.Weights = None,
    verify: o.Verify = None,
    tools: o.Tools = None,
    documents: o.Documents = None,
    template: o.TemplateName = None,
    variables: o.TemplateVariables = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the conversation as one JSON object at the end, and nothing else.")
    ] = False,
) -> None:
    """Talk with a model: /reset starts over, /exit (or Ctrl-D) ends."""
    sampling: Sampling = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or None, "min_new_tokens": min_new_tokens,
        "max_time": max_time, "typical_p": typical_p, "no_repeat_ngram_size": no_repeat_ngram_size,
        "suppress_tokens": suppress_tokens or None, "lora": adapter_name(lora),
    }  # fmt: skip
    from llmc.runtime.generation import resolve

    template_settings = template_options(tools, documents, template, variables or [])
    runtime = load(model, quantization, threads, weights, verify, room=lora is not None)
    require(runtime.manifest, runtime.artifact.path, "chat", "generate")
    load_adapter(runtime, lora)
    start = [] if system is None else [{"role": "system", "content": system}]
    # A model that cannot chat, or not with these options, says so now.
    resolve(sampling, runtime.manifest.generation, runtime.stop_ids, 0)
    runtime.chat_template.check_variables(template_settings)
    runtime.chat_template.render([*start, {"role": "user", "content": "Hello"}], **template_settings)  # type: ignore[arg-type]
    talk(Conversation(runtime, start, {**sampling, **template_settings}, quiet=json), lambda: wait_verified(runtime))


COMMANDS = (
    (
        run,
        (
            "llmc run pycoder.so 'def fibonacci(' --max-tokens 64 --temperature 0.7 --seed 1",
            "llmc run pycoder.so 'def fibonacci(' --lora style=./my-adapter",
        ),
    ),
    (
        chat,
        (
            "llmc chat assistant.so --system 'Answer in one sentence.'",
            "llmc chat assistant.so --tools weather.json --set enable_thinking=false",
        ),
    ),
)
