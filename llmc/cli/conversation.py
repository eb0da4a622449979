"""A conversation on the terminal, and the line of facts after each answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmc.cli import output
from llmc.errors import ArtifactError, LlmcError

if TYPE_CHECKING:
    from llmc.runtime.generation import TextStream
    from llmc.runtime.runtime import Runtime

_INTERRUPTED = 130
_MOST_JSON_BYTES = 64 << 20


def template_options(
    tools: Path | None, documents: Path | None, template: str | None, variables: list[str]
) -> dict[str, object]:
    """What `Runtime.chat` takes for a chat template, from the command line's files and NAME=VALUE pairs."""
    from llmc.runtime.chat_template import ARGUMENTS
    from llmc.runtime.generation import Options

    settings: dict[str, object] = {}
    for name, path in (("tools", tools), ("documents", documents)):
        if path is not None:
            settings[name] = _json_list(path, name)
    if template is not None:
        settings["chat_template"] = template
    for pair in variables:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise LlmcError(f"--set takes NAME=VALUE, such as enable_thinking=false, not {pair!r:.60}")
        if name in Options.__annotations__ or name in (*ARGUMENTS, "messages"):
            raise LlmcError(
                f"--set {name}: {name} is no variable of a template's own; `llmc chat --help` has the options"
            )
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    return settings


def _json_list(path: Path, what: str) -> list[object]:
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise LlmcError(f"{path} has more than {_MOST_JSON_BYTES} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmcError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LlmcError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, list):
        raise LlmcError(f"{path}: {what} must be a list of objects, not {type(found).__name__}")
    return found


class Conversation:
    """What was said, and how the next answer comes. What failed is in `errors` and not among the messages, so that the
    talk can go on."""

    def __init__(
        self, runtime: Runtime, start: list[dict[str, str]], options: Mapping[str, object], quiet: bool
    ) -> None:
        self.messages = list(start)
        self.errors: list[str] = []
        self.quiet = quiet
        self._runtime = runtime
        self._start = start
        self._options = options

    def reset(self) -> None:
        """Starts over, with the system message."""
        self.messages = list(self._start)

    def ask(self, query: str) -> None:
        """One turn: the answer is printed as it comes, and Ctrl-C cuts it short."""
        from llmc.runtime.errors import ContextError

        messages = [*self.messages, {"role": "user", "content": query}]
        try:
            answer = self._answer(messages)
        except ArtifactError:
            raise  # no answer before it is to be relied on
        except LlmcError as error:
            advice = "; /reset starts over" if isinstance(error, ContextError) else ""
            self._tell(f"{' '.join(str(error).split())}: this message is left out{advice}")
        else:
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]]) -> str:
        stream = self._runtime.stream_chat(messages, **self._options)
        text = ""
        try:
            for piece in stream:
                text += piece
                if not self.quiet:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        finally:
            if text and not self.quiet:
                print(flush=True)
        if stream.tokens and not self.quiet:
            output.line(summary(stream))
        if stream.finish_reason == "length" and stream.prompt_tokens + len(stream.tokens) > self._runtime.max_context:
            self._tell(
                f"the context of {self._runtime.max_context} tokens is full, and the answer is cut; /reset starts over"
            )
        return text

    def _tell(self, what: str) -> None:
        self.errors.append(what)
        output.line(what)


def talk(conversation: Conversation, end: Callable[[], None]) -> None:
    """Asks line by line until /exit or the end of the input. Nothing that goes wrong with a line ends the talk, unless
    the model itself is damaged. end: called behind the last line, unless Ctrl-C was."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are found when the line is read
    if interactive:
        import readline  # noqa: F401  (makes input() edit its line)

        output.line("/reset starts over, /exit ends; Ctrl-C stops an answer")
    interrupted = False
    while sys.stdin is not None:
        try:
            query = input("> " if interactive and not conversation.quiet else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            interrupted = True
            break
        if query == "/exit":
            break
        if query == "/reset":
            conversation.reset()
        elif query.startswith("/"):
            output.line(f"unknown command {query.split()[0]}; there are /reset and /exit")
        elif query:
            conversation.ask(query)
    if not interrupted:
        end()
    if conversation.quiet:
        errors = {"errors": conversation.errors} if conversation.errors else {}
        output.print_json({"messages": conversation.messages, **errors})
    elif interactive:
        print()
    if interrupted:
        raise typer.Exit(_INTERRUPTED)


def facts(stream: TextStream) -> dict[str, object]:
    """How a text ended, and how fast it came."""
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


def summary(stream: TextStream) -> str:
    """`facts` for people."""
    found = facts(stream)
    rates = [
        f"{found[key]:.1f} tokens/s {what}"
        for key, what in (("decode_tokens_per_second", "writing"), ("prefill_tokens_per_second", "reading"))
        if found[key] is not None
    ]
    return f"{found['generated_tokens']} tokens after a prompt of {found['prompt_tokens']}: {', '.join(rates)}"
