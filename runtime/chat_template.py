"""A checkpoint's own chat templates: Jinja, in a sandbox, with the helpers and the rules that transformers has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from llmc.runtime.errors import RuntimeStateError, TextError
from llmc.runtime.manifest import TextFacts

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes
    from jinja2.parser import Parser

Message = Mapping[str, object]

# What `ChatTemplate.render` takes besides a template's own variables.
ARGUMENTS = ("tools", "documents", "chat_template", "continue_final_message", "add_generation_prompt")
# Names of a message's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """Messages to prompt text. A template comes with the model, so it runs without access to anything, and sees nothing
    but plain data."""

    def __init__(self, facts: TextFacts) -> None:
        if not facts.chat_template and not facts.chat_templates:
            raise TextError(
                "this model has no chat template: use generate() or stream() with a plain prompt, "
                "or compile a checkpoint that has one (a -chat or -instruct variant)"
            )
        self._templates = dict(facts.chat_templates)
        if facts.chat_template:
            self._templates["default"] = facts.chat_template
            _compiled(facts.chat_template)
        self._tokens = dict(facts.special_tokens)
        self._tokens |= {
            name: text for name, text in (("bos_token", facts.bos_token), ("eos_token", facts.eos_token)) if text
        }

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **variables: object,
    ) -> str:
        """The prompt for these messages ({"role", "content", ...}), as `apply_chat_template` of transformers gives it.

        add_generation_prompt: whether it is ready for the assistant's turn; by default it is, unless
        continue_final_message says that the last message is to be continued: its content, or the field of that name.
        tools: JSON schemas of functions; documents: {"title", "text"}; both have an effect where the template reads
        them. chat_template: the name of one of the checkpoint's templates, or a template; by default "tool_use" where
        there are tools and there is one of that name. variables: what else the template reads. Raises `TextError`.
        """
        chat = _plain_messages(messages)
        source = self._choose(chat_template, tools)
        if continue_final_message and add_generation_prompt:
            raise TextError(
                "continue_final_message continues the last message, and add_generation_prompt begins one: give one"
            )
        ending = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            ending = _open_last(chat, field, source)
        values = {
            **self._tokens,
            **{name: _plain(value) for name, value in variables.items()},
            "tools": _dictionaries("tools", tools, "JSON schemas: {'type': 'function', 'function': {...}}"),
            "documents": _dictionaries("documents", documents, "{'title': ..., 'text': ...}"),
            "messages": chat,
            "add_generation_prompt": not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
        }
        try:
            text = _compiled(source).render(values)
        except TextError:
            raise
        except Exception as error:  # a template can fail in any way that Python code can
            raise TextError(f"the model's chat template refuses these messages: {error}") from error
        return _cut(text, ending) if continue_final_message else text

    def check_variables(self, arguments: Mapping[str, object]) -> None:
        """Refuses arguments of `render` that would have no effect, as the template does not read them."""
        given = {
            name
            for name, value in arguments.items()
            if name not in ("chat_template", "continue_final_message", "add_generation_prompt")
            and not (name in ("tools", "documents") and value is None)
        }
        chosen, tools = arguments.get("chat_template"), arguments.get("tools")
        reads = self.variables(chosen if isinstance(chosen, str) else None, tools is not None)
        unread = sorted(given - reads)
        if unread:
            own = sorted(reads - {"messages", "add_generation_prompt"} - set(self._tokens))
            what = f"it reads {', '.join(own)}" if own else "it reads nothing but messages"
            raise RuntimeStateError(
                f"unknown option {', '.join(unread)}: neither an option of generation nor read by the "
                f"model's chat template ({what})"
            )

    def variables(self, chat_template: str | None = None, with_tools: bool = False) -> frozenset[str]:
        """The names that a template reads, `messages` among them."""
        return _variables(self._choose(chat_template, () if with_tools else None))

    def _choose(self, wanted: str | None, tools: object) -> str:
        """The text of the template that transformers would take."""
        if wanted is not None:
            if not isinstance(wanted, str):
                raise TextError(f"chat_template must be a name or a template, not {wanted!r:.40}")
            if wanted not in self._templates and "{" not in wanted:
                known = ", ".join(sorted(self._templates))
                raise TextError(f"the model has no chat template {wanted!r:.40}; it has {known}")
            return self._templates.get(wanted, wanted)
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise TextError(f"the model has several chat templates and no default: give chat_template, one of {known}")
        return self._templates["default"]


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """The messages as plain data of their own: without what is None, and with reasoning under the names that templates
    read (`reasoning_content`, and `thinking` where that is not there)."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise TextError(f"messages must be a list of messages, not {messages!r:.60}")
    if not messages:
        raise TextError("the conversation is empty: give at least one message")
    chat = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TextError(f'messages must be {{"role": "user", "content": "..."}} and the like, not {message!r:.60}')
        plain = {str(_plain(key)): _plain(value) for key, value in message.items() if value is not None}
        reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    return chat


def _plain(value: object) -> object:
    """A copy in JSON's types alone, so that a template can call no method of the caller's objects; a value without such
    a form becomes a placeholder with its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # of a kind with methods of its own, such as an enumeration's
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)  # pydantic
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


def _dictionaries(name: str, given: Sequence[Mapping[str, object]] | None, form: str) -> object:
    if given is None:
        return None
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise TextError(f"{name} must be a list of {form}, not {given!r:.40}")
    for item in given:
        if not isinstance(item, Mapping):
            raise TextError(f"{name} must be a list of {form}, not of {type(item).__name__}")
    return _plain(list(given))


def _open_last(chat: list[dict[str, object]], field: str, source: str) -> str:
    """Marks the end of the last message's field in place, and returns what is to be continued."""
    last = chat[-1]
    text = last.get(field)
    if text is None:
        raise TextError(f"continue_final_message: the last message has no {field!r:.40} to continue")
    fields = [name for name in _REASONING if last.get(name) == text] if field in _REASONING else [field]
    if not any(name in source for name in fields):
        raise TextError(f"continue_final_message: the model's chat template does not read {field!r:.40}")
    if isinstance(text, (list, tuple)):
        for part in reversed(text):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                ending = str(part["text"])
                part["text"] = ending + _TAG
                return ending
        raise TextError("continue_final_message: the last message has no text to continue")
    for name in fields:
        last[name] = f"{text}{_TAG}"
    return str(text)


def _cut(text: str, ending: str) -> str:
    """The prompt up to the mark. A template that trims messages loses the spaces before it too."""
    tag = _TAG.strip()
    if ending.strip() not in text or tag not in text:
        raise TextError("continue_final_message: the model's chat template changes or drops the last message")
    place = text.rindex(tag)
    return text[:place] if text[place : place + len(_TAG)] == _TAG else text[:place].rstrip()


@lru_cache(16)
def _compiled(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise TextError(f"the model's chat template cannot be read: {error}") from error


@lru_cache(16)
def _variables(source: str) -> frozenset[str]:
    from jinja2 import meta

    _compiled(source)  # which says what is wrong with it
    return frozenset(meta.find_undeclared_variables(_environment().parse(source)))


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just text, in a
        scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

        def text(self, caller: Callable[[], str]) -> str:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Takes no names that begin with `_`, which would reach into Python."""

        def __init__(*args: object, **kwargs: object) -> None:  # as jinja2's, so that `self` can be a name
            own, names = args[0], dict(*args[1:], **kwargs)
            for name in names:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(own, names)

        def __setitem__(self, name: str, value: object) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with _, such as {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Not jinja2's own filter, which escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["namespace"] = Namespace
    return environment
