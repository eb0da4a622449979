"""A checkpoint's own chat template: Jinja, in a sandbox, with the helpers that transformers gives its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from llmc.runtime.errors import TextError
from llmc.runtime.manifest import TextFacts

if TYPE_CHECKING:
    import jinja2
    from jinja2 import nodes
    from jinja2.parser import Parser

Message = Mapping[str, object]


class ChatTemplate:
    """Messages to prompt text. The template comes with the model, so it runs without access to anything."""

    def __init__(self, facts: TextFacts) -> None:
        if not facts.chat_template:
            raise TextError(
                "this model has no chat template: use generate() or stream() with a plain prompt, "
                "or compile a checkpoint that has one (a -chat or -instruct variant)"
            )
        import jinja2

        self._facts = facts
        try:
            self._template = _environment().from_string(facts.chat_template)
        except jinja2.TemplateError as error:
            raise TextError(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object) -> str:
        """The prompt for these messages ({"role", "content"}), ready for the assistant's turn."""
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TextError(
                    f'messages must be {{"role": "user", "content": "..."}} and the like, not {message!r:.60}'
                )
        tokens = {"bos_token": self._facts.bos_token, "eos_token": self._facts.eos_token}
        values = {
            **self._facts.special_tokens,
            **tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except Exception as error:  # a template can fail in any way that Python code can
            raise TextError(f"the model's chat template refuses these messages: {error}") from error


def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
    return environment
