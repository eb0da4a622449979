"""Chats: prompts are those of transformers' apply_chat_template, whatever is said; a talk survives its failures."""

from __future__ import annotations

import enum
import io
import json
from collections import UserDict
from functools import cache
from pathlib import Path
from typing import Any

import fake_artifact
import numpy as np
import pytest
import tokenizers
import transformers

from llmc import cli
from llmc.runtime.chat_template import ChatTemplate
from llmc.runtime.errors import ContextError, RuntimeStateError, TextError
from llmc.runtime.manifest import TextFacts
from llmc.runtime.runtime import Runtime

# As checkpoints of these kinds have them, in short: what they share is what templates do with messages.
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- tool.function | tojson }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}{{- tool_call.function|tojson }}{%- endfor %}{{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles are supported!") }}{%- endif %}
{%- endfor %}"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<U>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is none %}{{ 'CALL' }}"
    "{%- for tool in message['tool_calls'] %}{{ tool['function']['name'] }}{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<A>' + content + eos_token}}{%- endif %}"
    "{%- endfor -%}{% if add_generation_prompt %}{{'<A><think>\\n'}}{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<' + p.type + '>' }}{% endfor %}{% endif %}{% endfor %}"
)
SPANS = (
    "{% set x = '' %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = m.content %}"
    "{{ x }}{{ loop.index }}{% endgeneration %}{% endif %}{{ x }}{{ m.thinking }}|{{ m.name }}{% endfor %}"
)
DATA = (
    "{{ messages | tojson }}{{ tools | tojson }}{{ documents | tojson }}{{ extra }}{{ bos_token is defined }}"
    "{{ pad_token }}{{ dict(a=1) }}{{ namespace(a=2).a }}{% for m in messages %}{{ m.get('content') }}{% endfor %}"
)
TEMPLATES = {
    "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "chatml": CHATML, "deepseek": DEEPSEEK, "parts": PARTS,
    "spans": SPANS, "data": DATA,
}  # fmt: skip

USER = {"role": "user", "content": "What is 2 + 2? <b>é</b> 日"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 2, "b": [2, None]}}}


class Role(str, enum.Enum):
    """A role as some clients have it."""

    USER = "user"


CONVERSATIONS: dict[str, list[Any]] = {
    "one": [USER],
    "turns": [{"role": "system", "content": " Be brief. "}, USER, {"role": "assistant", "content": "4 "}, USER],
    "no content": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ],
    "without": [
        USER,
        {"role": "assistant", "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "4"},
        USER,
    ],
    "no calls": [USER, {"role": "assistant", "content": "4", "tool_calls": None, "function_call": None}, USER],
    "two calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning": "2 and 2"}],
    "thinking": [USER, {"role": "assistant", "content": "4", "thinking": "2 and 2", "reasoning": None}],
    "reasoning_content": [USER, {"role": "assistant", "content": "4", "reasoning_content": "x", "reasoning": "y"}],
    "think": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": np.zeros(3)}]}],
    "kinds": [UserDict({"role": Role.USER, "content": "x", "n": np.float64(0.5), "b": np.bool_(False), "o": object})],
    "unknown role": [{"role": "critic", "content": "no"}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [TOOL, TOOL], "add_generation_prompt": True},
    "no tools": {"tools": []},
    "variables": {
        "enable_thinking": False, "date_string": "1 May", "tools_in_user_message": False, "extra": {"a": (1, "é")},
        "documents": [{"title": "t", "text": "x"}], "tools": [TOOL], "add_generation_prompt": True,
    },
    "continue": {"continue_final_message": True},
}  # fmt: skip


def facts(template: str | None, templates: dict[str, str] | None = None, bos: str = "<s>") -> TextFacts:
    return TextFacts(
        chat_template=template, bos_id=None, bos_token=bos, eos_token="</s>", special_tokens={"pad_token": "<unk>"},
        add_bos=False, stop_ids=(), clean_up_spaces=False, chat_templates=templates or {},
    )  # fmt: skip


@cache
def theirs(bos: str | None = "<s>") -> Any:
    backend = tokenizers.Tokenizer.from_buffer(fake_artifact.byte_tokenizer())
    tokens = {"eos_token": "</s>", "pad_token": "<unk>"} | ({} if bos is None else {"bos_token": bos})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def rendered(template: Any, messages: list[Any], bos: str | None = "<s>", **arguments: Any) -> str | None:
    """What transformers renders; None where it fails."""
    tokenizer = theirs(bos)
    tokenizer.chat_template = template
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
    except Exception:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_those_of_transformers(name: str, conversation: str) -> None:
    """And what it cannot render is refused."""
    messages, template = CONVERSATIONS[conversation], TEMPLATES[name]
    before = repr(messages)
    for arguments in ARGUMENTS.values():
        for bos in ("<s>", ""):
            expected = rendered(template, messages, bos or None, **arguments)
            own = ChatTemplate(facts(template, bos=bos))
            given = {"add_generation_prompt": False} | arguments
            if expected is None:
                with pytest.raises(TextError):
                    own.render(messages, **given)
            else:
                assert own.render(messages, **given) == expected
    assert repr(messages) == before


def test_named_templates_are_chosen_as_in_transformers() -> None:
    named = {"default": "d{{ messages|length }}", "tool_use": "t{{ tools|length }}", "rag": "r{{ documents|length }}"}
    own = ChatTemplate(facts(named["default"], {name: text for name, text in named.items() if name != "default"}))
    for arguments in (
        {}, {"tools": [TOOL]}, {"tools": []}, {"chat_template": "rag", "documents": [{}, {}]},
        {"tools": [TOOL], "chat_template": "default"}, {"chat_template": "x{{ messages|length }}"},
    ):  # fmt: skip
        assert own.render([USER], **arguments) == rendered(named, [USER], **arguments)  # type: ignore[arg-type]
    with pytest.raises(TextError, match="no chat template 'tools'; it has default, rag, tool_use"):
        own.render([USER], chat_template="tools")
    with pytest.raises(TextError, match="several chat templates and no default: give chat_template, one of rag"):
        ChatTemplate(facts(None, {"rag": "r"})).render([USER])


@pytest.mark.parametrize(
    ("content", "template"),
    [
        ("The answer ", "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"),
        ("The answer ", "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"),
        ("The answer", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"),
        ("The answer", "{{ messages | length }}"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b "}, {"type": "image"}], PARTS),
        ([{"type": "image"}], PARTS),
        (None, CHATML),
    ],
)
def test_a_message_is_continued_as_in_transformers(content: object, template: str) -> None:
    messages = [USER, {"role": "assistant", "content": content, "thinking": "hm"}]
    own = ChatTemplate(facts(template))
    for field in (True, "content", "thinking"):
        expected = rendered(template, messages, continue_final_message=field)
        if expected is None:
            with pytest.raises(TextError):
                own.render(messages, continue_final_message=field)  # type: ignore[arg-type]
        else:
            assert own.render(messages, continue_final_message=field) == expected  # type: ignore[arg-type]
    with pytest.raises(TextError, match="give one"):
        own.render([USER], add_generation_prompt=True, continue_final_message=True)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing said": ([], {}, "the conversation is empty"),
    "text": ("hello", {}, "messages must be a list"),
    "no role": ([{"content": "x"}], {}, "messages must be"),
    "role None": ([{"role": None, "content": "x"}], {}, "messages must be"),
    "a function": ([USER], {"tools": [len]}, "tools must be a list of JSON schemas"),
    "one tool": ([USER], {"tools": TOOL}, "tools must be a list"),
    "documents of text": ([USER], {"documents": ["x"]}, "documents must be a list"),
    "a template that is a number": ([USER], {"chat_template": 3}, "chat_template must be"),
    "reaches into Python": ([USER], {"chat_template": "{% set x = namespace(_a=1) %}"}, "begins with _"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_rendered_is_named(name: str) -> None:
    messages, arguments, said = BAD[name]
    with pytest.raises(TextError, match=said):
        ChatTemplate(facts(CHATML)).render(messages, **arguments)


# Through the runtime


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    text = dict(fake_artifact.manifest()["tokenizer"])  # type: ignore[call-overload]
    text |= {"chat_template": QWEN3, "chat_templates": {"tool_use": "T{{ tools|length }}{{ messages[0].content }}"}}
    return Runtime.load(
        fake_artifact.write(tmp_path_factory.mktemp("chat") / "chat.so", tokenizer_facts=text), threads=1
    )


def test_tools_and_variables_reach_the_template(runtime: Runtime) -> None:
    plain = runtime.chat("hello", max_tokens=5)
    assert plain == runtime.generate(runtime.chat_template.render([{"role": "user", "content": "hello"}]), max_tokens=5)
    assert runtime.chat("hello", max_tokens=5, tools=[TOOL]) == runtime.generate("T1hello", max_tokens=5)
    quiet = runtime.chat_template.render([{"role": "user", "content": "hello"}], enable_thinking=False)
    expected = runtime.generate(quiet, max_tokens=5)
    options: dict[str, Any] = {"max_tokens": 5, "enable_thinking": False}
    assert expected != plain
    assert runtime.chat("hello", **options) == runtime.response("hello", **options) == expected
    assert "".join(runtime.stream_response("hello", **options)) == expected
    assert runtime.chat_batch(["hello", [{"role": "user", "content": "hello"}]], **options) == [expected] * 2
    assert runtime.chat_batch([]) == []
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    assert runtime.chat(messages, max_tokens=5, continue_final_message=True) == runtime.generate(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nwell", max_tokens=5
    )


def test_what_neither_the_text_nor_the_template_reads_is_refused(runtime: Runtime) -> None:
    with pytest.raises(RuntimeStateError, match=r"unknown option enable_thinkin: .* enable_thinking, "):
        runtime.chat("hello", enable_thinkin=False)
    with pytest.raises(RuntimeStateError, match="unknown option documents"):
        runtime.chat("hello", documents=[{"text": "x"}])
    with pytest.raises(RuntimeStateError, match="unknown option enable_thinking"):
        runtime.chat("hello", enable_thinking=True, chat_template="tool_use")
    for messages in (None, 5, []):
        with pytest.raises(TextError):
            runtime.chat(messages)  # type: ignore[arg-type]


# On the command line


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat with room for 60 tokens, of which each character is one at most."""
    text = dict(fake_artifact.manifest()["tokenizer"])  # type: ignore[call-overload]
    text["chat_template"] = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if terse %}#{% endif %}{{ tools | length if tools }}"
    )
    return fake_artifact.write(
        tmp_path_factory.mktemp("talk") / "chat.so",
        tokenizer_facts=text,
        max_context=60,
        generation={"max_new_tokens": 4},
    )


def talk(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: bytes, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
    status = cli.run(["chat", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err


LONG = b"x" * 70


def test_a_line_that_fails_does_not_end_the_talk(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beyond the context, not UTF-8: said, left out, and the next line is answered."""
    status, out, err = talk(
        monkeypatch, capfd, b"one\n" + LONG + b"\ntw\xffo\nthree\n", artifact, "--json", "--stop", "never"
    )
    assert status == 0
    found = json.loads(out)
    assert [message["content"] for message in found["messages"] if message["role"] == "user"] == ["one", "three"]
    assert len(found["errors"]) == 2
    assert "context of 60" in found["errors"][0] and "/reset starts over" in found["errors"][0]
    assert "not valid Unicode" in found["errors"][1] and "/reset" not in found["errors"][1]
    assert [line for line in err.splitlines() if "left out" in line] == [f"llmc: {text}" for text in found["errors"]]


def test_a_full_context_is_said_and_reset_helps(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, err = talk(monkeypatch, capfd, LONG[:58] + b"\nagain\n/reset\nagain\n", artifact, "-n", "9")
    assert status == 0
    assert "the context of 60 tokens is full, and the answer is cut; /reset starts over" in err
    assert err.count("this message is left out; /reset starts over") == 1
    assert err.count("tokens after a prompt of") == 2
    with pytest.raises(ContextError):
        Runtime.load(artifact, threads=1).chat("x" * 70)


def test_ctrl_c_at_the_prompt_keeps_what_was_said(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one"])

    def read(_prompt: str = "") -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    status = cli.run(["chat", str(artifact), "--json"])
    out, _ = capfd.readouterr()
    assert status == 130
    assert [message["role"] for message in json.loads(out)["messages"]] == ["user", "assistant"]


def test_templates_options_on_the_command_line(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    runtime = Runtime.load(artifact, threads=1)
    for arguments, suffix in (
        ((), ""),
        (("--set", "terse=true"), "#"),
        (("--set", "terse=false"), ""),
        (("--set", "terse=yes indeed", "--tools", tmp_path / "tools.json"), "#1"),
    ):
        _, out, _ = talk(monkeypatch, capfd, b"hello\n", artifact, "--json", *arguments)
        assert json.loads(out)["messages"][1]["content"] == runtime.generate("hello" + suffix, max_tokens=4)


BAD_LINES = {
    "unread": (("--set", "trese=true"), "unknown option trese"),
    "no value": (("--set", "terse"), "NAME=VALUE"),
    "an option": (("--set", "temperature=1"), "no variable"),
    "tools missing": (("--tools", "/no/such.json"), "/no/such.json cannot be read"),
    "no template": (("--template", "rag"), "no chat template 'rag'"),
    "sampling": (("--top-p", "7"), "top_p must be"),
    "documents unread": (("--documents", "TOOLS"), "unknown option documents"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_options_that_cannot_be_are_said_at_the_start(
    name: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    arguments, said = BAD_LINES[name]
    filled = [str(tmp_path / "tools.json") if item == "TOOLS" else item for item in arguments]
    status, out, err = talk(monkeypatch, capfd, b"hello\n", artifact, *filled)
    assert (status, out, len(err.splitlines())) == (1, "", 1)
    assert said in err
