"""What files are read, what is said of bad lines, and that the tokens of training are those that a server builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from quire.errors import ConfigError, DataError
from quire.text import Tokenizer
from quire.text.chat import render
from quire.train.config import TrainingConfig
from quire.train.data import Dataset, read_dataset, shared_rows
from quire.train.examples import Example
from tests.text.test_chat import CHATML, LLAMA3, MISTRAL, QWEN_TOOLS
from tests.text.tokenizer_layouts import LAYOUTS

# Thinking is cut from earlier turns, and the last one gets an empty one: history is written otherwise than it was generated.
THINKING = """\
{%- for message in messages %}
{%- if message.role == 'assistant' and not loop.last %}{{ '<|im_start|>assistant\n' + message.content.split('</think>')[-1] }}
{%- elif message.role == 'assistant' and '</think>' not in message.content -%}
{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
# The prompt ends with more than the history of the same turn shows.
OPENED = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""
GEMMA = """\
{%- for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<|im_start|>' + role + '\n' + message.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""
BARE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "tools": QWEN_TOOLS,
    "thinking": THINKING,
    "opened": OPENED,
    "gemma": GEMMA,
    "bare": BARE,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte-level")
    LAYOUTS["byte-level"](folder)
    return Tokenizer.from_folder(folder)


def read(rows: Any, tokenizer: Tokenizer, template: str = CHATML, longest: int = 4096, **options: Any) -> Dataset:
    return read_dataset(rows, tokenizer, TrainingConfig(**options), longest=longest, chat_template=template)


def learned_text(tokenizer: Tokenizer, example: Example) -> list[str]:
    """The learned spans of an example, as text."""
    spans: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.tokens, example.weights, strict=True):
        if weight:
            if not before:
                spans.append([])
            spans[-1].append(token)
        before = weight
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


TEXTS = some.text(some.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=12)
WORDS = some.sampled_from(["Hi", "\nthere", " a\n\n", "b ", "été", "<|im_end|>", "12", "</think>x"])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(data=some.data())
def test_tokens_are_those_that_a_server_builds(tokenizer: Tokenizer, name: str, data: some.DataObject) -> None:
    turns = data.draw(some.integers(1, 3))
    contents = [data.draw(some.one_of(TEXTS, WORDS)) for _ in range(2 * turns)]
    system = data.draw(some.none() | WORDS) if name != "mistral" else None
    messages = chat(*contents, system=system)
    weights = [data.draw(some.integers(0, 1)) for _ in range(turns)]
    for message, weight in zip([m for m in messages if m["role"] == "assistant"], weights, strict=True):
        message["weight"] = weight
    template = TEMPLATES[name]
    if not any(weights):
        with pytest.raises(DataError, match="no message of the assistant to learn"):
            read([{"messages": messages}], tokenizer, template)
        return
    examples = list(read([{"messages": messages}], tokenizer, template).examples)
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    # Each learned turn: some example goes on with exactly the server's prompt, and with nothing learned beyond the turn.
    seen = 0
    for place, message in enumerate(messages):
        if not message.get("weight"):
            continue
        prompt = tokenizer.encode(
            render(tokenizer, plain[:place], add_generation_prompt=True, chat_template=template), add_special_tokens=False
        )
        holders = [
            one
            for one in examples
            if list(one.tokens[: len(prompt)]) == prompt and len(one.tokens) > len(prompt) and one.weights[len(prompt)]
        ]
        assert holders, (name, place)
        seen += 1
    assert sum(len(learned_spans(one)) for one in examples) == seen
    if name not in ("thinking", "opened"):
        assert len(examples) <= turns


def learned_spans(example: Example) -> list[int]:
    """Where learned spans begin."""
    return [place for place in range(1, len(example.weights)) if example.weights[place] and not example.weights[place - 1]]


def test_the_end_of_turn_is_learned_and_what_follows_it_is_not(tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat("Hi", "Hello", "Bye", "See you", system="Be kind.")}]
    (example,) = read(rows, tokenizer).examples
    assert learned_text(tokenizer, example) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert tokenizer.decode(list(example.tokens[: example.prompt]), skip_special_tokens=False).endswith("assistant\n")
    (last,) = read(rows, tokenizer, train_on="last").examples
    assert learned_text(tokenizer, last) == ["See you<|im_end|>"]
    (whole,) = read(rows, tokenizer, train_on="all").examples
    assert whole.supervised == len(whole.tokens) - 1


def test_weights_of_messages_count_as_in_openais_files(tokenizer: Tokenizer) -> None:
    messages = chat("Hi", "Hello", "Bye", "See you")
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    (example,) = read([{"messages": messages}], tokenizer).examples
    assert learned_text(tokenizer, example) == ["See you<|im_end|>"]


def test_thinking_that_history_drops_makes_two_sequences(tokenizer: Tokenizer) -> None:
    messages = chat("Hi", "<think>\nhm\n</think>\n\nHello", "Bye", "<think>\nso\n</think>\n\nCiao")
    dataset = read([{"messages": messages}], tokenizer, THINKING)
    assert [learned_text(tokenizer, one) for one in dataset.examples] == [
        ["<think>\nhm\n</think>\n\nHello<|im_end|>"],
        ["<think>\nso\n</think>\n\nCiao<|im_end|>"],
    ]
    assert "sequences more than rows" in dataset.notes[0]


def test_an_empty_think_of_the_generation_prompt_is_not_learned(tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat("Hi", "Hello")}]
    (example,) = read(rows, tokenizer, THINKING, chat_template_kwargs={"enable_thinking": False}).examples
    assert learned_text(tokenizer, example) == ["Hello<|im_end|>"]
    (example,) = read(rows, tokenizer, THINKING).examples
    assert learned_text(tokenizer, example) == ["<think>\n\n</think>\n\nHello<|im_end|>"]
    (example,) = read(rows, tokenizer, OPENED).examples
    assert learned_text(tokenizer, example) == ["Hello<|im_end|>"]
    assert "<think>\nHello" in tokenizer.decode(list(example.tokens), skip_special_tokens=False)


def test_tools_and_calls_are_rendered_as_served(tokenizer: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"city": "Bonn"}'}}
    tool = {"type": "function", "function": {"name": "time", "parameters": {}}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12:45"},
        {"role": "assistant", "content": "A quarter to one."},
    ]
    (example,) = read([{"messages": messages, "tools": [tool]}], tokenizer, QWEN_TOOLS).examples
    first, second = learned_text(tokenizer, example)
    assert '"time"' in first and "Bonn" in first and first.endswith("<|im_end|>")  # noqa: PT018
    assert second == "A quarter to one.<|im_end|>"
    assert "# Tools" in tokenizer.decode(list(example.tokens), skip_special_tokens=False)


def test_a_template_without_end_of_turn_gets_one(tokenizer: Tokenizer) -> None:
    dataset = read([{"messages": chat("Hi", "Hello")}], tokenizer, BARE)
    (example,) = dataset.examples
    assert example.tokens[-1] == tokenizer.eos_token_id
    assert any("no token of its own" in note for note in dataset.notes)


LAYOUT_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "messages": ({"messages": chat("Hi", "Hello")}, ["Hello<|im_end|>"]),
    "ShareGPT conversations": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "system": "Be kind.",
        },
        ["Hello<|im_end|>"],
    ),
    "prompt and completion": ({"prompt": "2 + 2 =", "completion": " 4"}, [" 4<|im_end|>"]),
    "text": ({"text": "Some words."}, ["ome words.<|im_end|>"]),
}


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_every_layout_is_known(tokenizer: Tokenizer, layout: str) -> None:
    row, learned = LAYOUT_ROWS[layout]
    dataset = read([row], tokenizer)
    assert dataset.layout == layout
    (example,) = dataset.examples
    assert learned_text(tokenizer, example) == learned


def test_trls_conversational_prompt_and_completion(tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": chat("Hi", "Hello", "Bye")[:3], "completion": [{"role": "assistant", "content": "Ciao"}]},
        {"prompt": "Hi", "completion": [{"role": "assistant", "content": "Ciao"}]},
    ]
    first, second = read(rows, tokenizer).examples
    assert learned_text(tokenizer, first) == ["Ciao<|im_end|>"]  # what stands in the prompt is given
    assert learned_text(tokenizer, second) == ["Ciao<|im_end|>"]


PAIR_ROWS = [
    {
        "input": {"messages": chat("Hi")},
        "preferred_output": [{"role": "assistant", "content": "Hello"}],
        "non_preferred_output": [{"role": "assistant", "content": "What"}],
    },
    {"prompt": chat("Hi"), "chosen": chat("", "Hello")[1:], "rejected": chat("", "What")[1:]},
    {"chosen": chat("Hi", "Hello"), "rejected": chat("Hi", "What")},
]


@pytest.mark.parametrize("row", PAIR_ROWS)
def test_preference_pairs(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    (example,) = read([row], tokenizer, method="dpo").examples
    assert learned_text(tokenizer, example) == ["Hello<|im_end|>"]
    assert example.rejected is not None
    assert learned_text(tokenizer, example.rejected) == ["What<|im_end|>"]
    assert example.tokens[: example.prompt] == example.rejected.tokens[: example.prompt]
    with pytest.raises(ConfigError, match="needs rows with one answer each"):
        read([row], tokenizer)


def test_pairs_are_needed_for_dpo(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="preferred and a rejected"):
        read([{"messages": chat("Hi", "Hello")}], tokenizer, method="dpo")
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(DataError, match="same answer"):
        read([same], tokenizer, method="dpo")


BAD_LINES = {
    "{oops": "is not valid JSON",
    "[1]": "must be a JSON object, got list",
    '{"messages": []}': "messages must be a list of messages with at least one",
    '{"messages": [{"role": "asistant", "content": "x"}]}': 'Did you mean "assistant"',
    '{"messages": [{"content": "x"}]}': "messages[0].role is missing",
    '{"messages": [{"role": "user"}]}': "messages[0].content is missing",
    '{"messages": [{"role": "user", "content": 3}]}': "messages[0].content must be a text",
    '{"messages": [{"role": "user", "content": "x"}]}': "has no message of the assistant to learn",
    '{"messages": [{"role": "user", "content": "x", "weight": 1}]}': "messages[0].weight must stand",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}': "weight must be 0 or 1",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "messages[0] is the assistant's",
    '{"messages": [{"role": "assistant", "tool_calls": [{}]}]}': "tool_calls[0].function must be an object",
    '{"prompt": "a", "completion": "b"}': "messages is missing",
    '{"messages": [{"role": "user", "content": "x"}], "tools": 3}': "tools must be a list",
}


def test_every_bad_line_is_told_with_number_field_and_remedy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"messages": chat("Hi", "Hello")})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([good, "", *BAD_LINES, good]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(path, tokenizer)
    assert caught.value.count == len(BAD_LINES)
    for number, (problem, expected) in enumerate(zip(caught.value.problems, BAD_LINES.values(), strict=True), 3):
        assert problem.line == number
        assert expected in str(problem)
    assert str(caught.value).count("\n") == len(BAD_LINES)


def test_the_list_of_problems_is_bounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{}\n" * 500, encoding="utf-8")
    with pytest.raises(DataError, match="and 480 more") as caught:
        read(path, tokenizer)
    assert caught.value.count == 500


def test_bytes_that_are_no_text_and_files_that_are_not_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 1: is not UTF-8"):
        read(path, tokenizer)
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="has no rows"):
        read(path, tokenizer)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nowhere.jsonl", tokenizer)
    path.write_bytes(b'\xef\xbb\xbf{"text": "marked"}\n')
    assert read(path, tokenizer).rows == 1


@pytest.mark.parametrize(
    ("row", "advice"),
    [({"instruction": "a", "output": "b"}, "rename instruction and output"), ({"mesages": []}, 'Did you mean "messages"')],
)
def test_other_layouts_are_told_what_to_rename(tokenizer: Tokenizer, row: dict[str, Any], advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        read([row], tokenizer)


def test_nothing_is_cut_silently(tokenizer: Tokenizer) -> None:
    long, short = {"messages": chat("Hi", "Hello " * 50)}, {"messages": chat("Hi", "Hello")}
    with pytest.raises(DataError, match=r"line 2: has \d+ tokens, more than the model's 40"):
        read([short, long], tokenizer, longest=40)
    dataset = read([short, long], tokenizer, max_length=40)
    assert [len(one.tokens) <= 40 for one in dataset.examples] == [True, True]
    assert any("Cut to 40 tokens: 1 rows" in note and "lines 2" in note for note in dataset.notes)
    wordy = {"messages": chat("Hi " * 60, "Hello")}
    with pytest.raises(DataError, match="the cut at 40 tokens took them"):
        read([wordy], tokenizer, max_length=40)


def test_columns_and_rows_that_deserve_a_word(tokenizer: Tokenizer) -> None:
    row = {"messages": chat("Hi", "Hello"), "source": "here"}
    dataset = read([row, row], tokenizer)
    assert dataset.notes == ("Columns that are not used: source.", "1 rows appear more than once.")
    assert shared_rows(dataset, dataset) == 2
    assert sum(count for _, _, count in dataset.histogram()) == 2
