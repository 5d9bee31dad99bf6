"""Chat templates against `transformers` over shapes as they are found in the wild, and what callers are told when they err."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from quire.errors import InvalidRequest
from quire.text import Tokenizer
from quire.text.chat import normalise, render

CHATML = """\
{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}{{- " [INST] " + message["content"] + " [/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] + eos_token}}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported, got " + message.role) }}{%- endif %}
{%- endfor %}"""

QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are helpful.' }}{%- endif %}
    {{- "\n\n# Tools\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ["user", "developer"] or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ message.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

MACROS = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}{{ content }}{%- else -%}
        {%- for item in content -%}{%- if item.type == 'text' -%}[{{ item.text }}]{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'skip' -%}{%- continue -%}{%- endif -%}
    {%- if message.role == 'assistant' -%}
        <a>{% generation %}{{ text_of(message.content) }}</a>{% endgeneration %}
    {%- else -%}<{{ message.role[0] | upper }}>{{ text_of(message.content) }}</>{%- endif -%}
{%- endfor -%}
{%- if documents %}{{ documents | map(attribute='title') | join(', ') }}{% endif -%}
{%- if add_generation_prompt %}<a>{% endif -%}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN_TOOLS, "macros": MACROS}
SHORT = [{"role": "user", "content": " Hi, <b>you</b> & 'me' 😀\n"}]
LONG = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "<think>hm</think>\n\n4", "reasoning_content": "hm"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It is  ", "name": "quire", "refusal": None, "annotations": []},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"x": "<é>"}}}}}]
CALLS = [
    {"role": "user", "content": "add 1 and 2"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


@pytest.fixture(scope="module")
def pair(tokenizers: dict[str, Tokenizer], folders: dict[str, Any]) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return tokenizers["sentencepiece"], AutoTokenizer.from_pretrained(folders["sentencepiece"])


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [SHORT, LONG[:2], LONG, CALLS], ids=["short", "system", "long", "calls"])
def test_renders_as_transformers(name: str, prompt: bool, messages: list[dict[str, Any]], pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for tools in (None, TOOLS):
        common: dict[str, Any] = {"chat_template": TEMPLATES[name], "tools": tools}
        reason = None
        try:
            expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **common)
        except Exception as error:
            reason = str(error)
        if reason is not None:
            with pytest.raises(InvalidRequest, match=re.escape(reason)):
                render(ours, messages, add_generation_prompt=prompt, **common)
            continue
        assert render(ours, messages, add_generation_prompt=prompt, **common) == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, **common)
        assert ours.apply_chat_template(messages, add_generation_prompt=prompt, **common) == ids


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("final", ["It is", "It is  ", "  It\nis ", "", "[/INST] </s>"])
def test_continues_the_final_message_as_transformers(name: str, final: str, pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    messages = [*LONG[:-1], {"role": "assistant", "content": final}]
    common: dict[str, Any] = {"continue_final_message": True, "chat_template": TEMPLATES[name]}
    expected = theirs.apply_chat_template(messages, tokenize=False, **common)
    assert render(ours, messages, add_generation_prompt=False, **common) == expected
    assert messages[-1]["content"] == final


def test_continues_text_parts(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]
    messages = [*SHORT, {"role": "assistant", "content": parts}]
    common: dict[str, Any] = {"continue_final_message": True, "chat_template": MACROS}
    expected = theirs.apply_chat_template(messages, tokenize=False, **common)
    assert render(ours, messages, add_generation_prompt=False, **common) == expected


def test_what_cannot_be_continued(pair: tuple[Tokenizer, Any]) -> None:
    ours = pair[0]
    common: dict[str, Any] = {"continue_final_message": True, "chat_template": CHATML}
    with pytest.raises(InvalidRequest, match="cannot both be true"):
        render(ours, SHORT, **common)
    for final in ({"role": "assistant"}, {"role": "assistant", "content": []}):
        with pytest.raises(InvalidRequest, match="continue_final_message"):
            render(ours, [*SHORT, final], add_generation_prompt=False, **common | {"chat_template": MACROS})
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content | upper }}"):
        with pytest.raises(InvalidRequest, match="does not render the last message as it is"):
            render(ours, LONG, add_generation_prompt=False, continue_final_message=True, chat_template=template)


def test_text_parts_are_joined_unless_the_template_walks_over_them(pair: tuple[Tokenizer, Any]) -> None:
    ours = pair[0]
    parts = [{"type": "text", "text": "one", "cache_control": {}}, "two", {"type": "input_text", "text": "three"}]
    messages = [{"role": "user", "content": parts}]
    assert "user\none\ntwo\nthree<|im_end|>" in render(ours, messages, chat_template=CHATML)
    assert render(ours, messages, chat_template=MACROS) == "<U>[one][two][three]</><a>"


def test_tool_call_arguments_may_be_json_text(pair: tuple[Tokenizer, Any]) -> None:
    ours = pair[0]
    echoed = json.loads(json.dumps(CALLS))
    function = echoed[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert render(ours, echoed, chat_template=QWEN_TOOLS) == render(ours, CALLS, chat_template=QWEN_TOOLS)
    for arguments, read in (("", {}), ("{broken", "{broken"), ("[1]", "[1]")):
        function["arguments"] = arguments
        assert normalise(echoed)[1]["tool_calls"][0]["function"]["arguments"] == read


@pytest.mark.parametrize(
    ("messages", "parameter"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        ([1], "messages[0]"),
        ([*SHORT, {"content": "x"}], "messages[1].role"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages[0].extra"),
    ],
)
def test_wrong_messages_name_the_field(messages: Any, parameter: str, pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(pair[0], messages, chat_template=CHATML)
    assert caught.value.parameter == parameter


def test_messages_nested_without_end_are_refused(pair: tuple[Tokenizer, Any]) -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(InvalidRequest, match="messages is nested deeper than 64 levels"):
        render(pair[0], [{"role": "user", "content": "x", "extra": nested}], chat_template=CHATML)


def test_unknown_keys_in_messages_are_passed_over(pair: tuple[Tokenizer, Any]) -> None:
    echoed = [{**message, "audio": None, "annotations": [], "anything": {"x": 1}} for message in LONG]
    assert render(pair[0], echoed, chat_template=QWEN_TOOLS) == render(pair[0], LONG, chat_template=QWEN_TOOLS)


def test_template_variables_are_an_allow_list(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for template, given in ((QWEN_TOOLS, {"enable_thinking": False}), (LLAMA3, {"date_string": "1 Jan 2030"})):
        expected = theirs.apply_chat_template(
            SHORT, chat_template=template, add_generation_prompt=True, tokenize=False, **given
        )
        assert render(ours, SHORT, chat_template=template, chat_template_kwargs=given) == expected
        assert expected != render(ours, SHORT, chat_template=template)
    with pytest.raises(InvalidRequest, match=r'does not read it.*Did you mean "enable_thinking"\?') as caught:
        render(ours, SHORT, chat_template=QWEN_TOOLS, chat_template_kwargs={"enable_thinkin": False})
    assert caught.value.parameter == "chat_template_kwargs.enable_thinkin"
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "namespace"):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs cannot have"):
            render(ours, SHORT, chat_template=LLAMA3, chat_template_kwargs={name: []})
    with pytest.raises(InvalidRequest, match="chat_template_kwargs must be an object"):
        render(ours, SHORT, chat_template=LLAMA3, chat_template_kwargs=["x"])  # type: ignore[arg-type]


def test_documents_reach_the_template(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    documents = [{"title": "A", "text": "a"}, {"title": "B", "text": "b"}]
    expected = theirs.apply_chat_template(SHORT, documents=documents, chat_template=MACROS, tokenize=False)
    assert ours.apply_chat_template(SHORT, documents=documents, chat_template=MACROS, tokenize=False) == expected
    for name in ("documents", "tools"):
        with pytest.raises(InvalidRequest, match=f"{name} must be a list of objects"):
            render(ours, SHORT, chat_template=MACROS, **{name: ["x"]})  # type: ignore[arg-type]


def test_named_templates(tmp_path: Any) -> None:
    from tests.text.tokenizer_layouts import gpt2_folder, write

    def load() -> Tokenizer:
        return Tokenizer.from_folder(tmp_path)

    gpt2_folder(tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        render(load(), SHORT)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools|length }} tools"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert render(load(), SHORT) == "plain"
    assert render(load(), SHORT, tools=TOOLS) == "with 1 tools"
    assert render(load(), SHORT, chat_template="tool_use", tools=[]) == "with 0 tools"
    assert render(load(), SHORT, chat_template="{{ 'given' }}") == "given"
    write(tmp_path, "tokenizer_config.json", {"chat_template": named[1:]})
    with pytest.raises(InvalidRequest, match=r"must name one of \['tool_use'\]"):
        render(load(), SHORT)
    write(tmp_path, "tokenizer_config.json", {"chat_template": "in the configuration"})
    assert render(load(), SHORT) == load().chat_template == "in the configuration"
    write(tmp_path, "chat_template.json", {"chat_template": "in its own json"})
    assert render(load(), SHORT) == "in its own json"
    write(tmp_path, "chat_template.jinja", "in its own file")
    assert render(load(), SHORT) == "in its own file"
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", "tool_use.jinja", "for tools")
    assert render(load(), SHORT) == "in its own file"
    assert render(load(), SHORT, tools=TOOLS) == "for tools"
