"""TextStream: exact for any chunking, never takes text back, and its stop strings do what a plain search would do."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.request import SamplingParams
from quire.text import TextStream, Tokenizer
from quire.text.stream import StopWatch
from tests.text.tokenizer_layouts import CORPUS, LAYOUTS, SAMPLES

quick = settings(max_examples=150, deadline=None, database=None)
layouts = st.sampled_from(list(LAYOUTS))
texts = st.text(st.sampled_from("ab e\nthéの😀。"), max_size=30)
stops = st.lists(st.text(st.sampled_from("ab e\nt😀"), min_size=1, max_size=4), max_size=3)


@st.composite
def token_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Random tokens, byte tokens often, and the tokens of real text between them."""
    numbers = st.integers(0, len(tokenizer) + 2) | st.integers(0, 300)
    some = st.lists(numbers, max_size=12) | texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return [token for part in draw(st.lists(some, max_size=4)) for token in part]


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({min(cut, len(ids)) for cut in cuts} | {0, len(ids)})
    return [ids[start:end] for start, end in pairwise(places)]


def make(tokenizer: Tokenizer, prompt_ids: list[int] | None = None, **params: object) -> TextStream:
    return TextStream(tokenizer, prompt_ids or [], SamplingParams(**params))


def expected_stop(tokenizer: Tokenizer, ids: list[int], words: list[str], min_tokens: int) -> tuple[str, int, int, str] | None:
    """(text so far, start, end, stop string) by decoding everything after every token and looking everywhere."""
    seen = 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        whole = text.rstrip("\ufffd")
        ends = [
            (start + len(word), place)
            for place, word in enumerate(words)
            for start in range(len(whole))
            if whole.startswith(word, start) and start + len(word) > seen
        ]
        if ends and count >= min_tokens:
            end, place = min(ends)
            return text, end - len(words[place]), end, words[place]
        if count < min_tokens:
            seen = max(seen, len(whole))
    return None


@quick
@given(st.data(), layouts, st.booleans(), st.lists(st.integers(0, 60), max_size=6))
def test_any_chunking_gives_the_decoded_text(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, layout: str, skip: bool, cuts: list[int]
) -> None:
    tokenizer = tokenizers[layout]
    ids = data.draw(token_ids(tokenizer))
    final = tokenizer.decode(ids, skip_special_tokens=skip)
    stream = make(tokenizer, skip_special_tokens=skip, stop=data.draw(st.sampled_from([[], ["never there"]])))
    taken = ""
    for chunk in chunks(ids, cuts):
        assert stream.push(chunk) is None
        assert final.startswith(stream.text)
        taken += stream.take()
        assert taken == stream.text
    stream.finish()
    assert stream.text == final == taken + stream.take()
    assert stream.num_tokens == len(ids)


@quick
@given(st.data(), layouts, st.booleans())
def test_the_output_continues_the_prompt(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, layout: str, skip: bool
) -> None:
    tokenizer = tokenizers[layout]
    prompt = tokenizer.encode(data.draw(st.sampled_from(["", "the", "a <s> the"])))
    ids = data.draw(token_ids(tokenizer))
    stream = make(tokenizer, prompt, skip_special_tokens=skip)
    if layout != "words":  # a byte token cannot be told from text there is none before
        ids = [*tokenizer.encode("a", add_special_tokens=False), *ids]
    stream.push(ids)
    stream.finish()
    together, before = (tokenizer.decode(part, skip_special_tokens=skip) for part in (prompt + ids, prompt))
    assert before + stream.text == together


def test_a_space_after_the_prompt_is_kept_where_sentencepiece_has_one(tokenizers: dict[str, Tokenizer]) -> None:
    llama = tokenizers["sentencepiece"]
    ids = llama.convert_tokens_to_ids(["▁the", "▁", "t"])
    for prompt, text in (([], "the t"), ([1], "the t"), (llama.encode("It said"), " the t")):
        stream = make(llama, prompt)
        stream.push(ids)
        stream.finish()
        assert stream.text == text


@quick
@given(st.data(), layouts, stops, st.booleans(), st.integers(0, 12))
def test_stop_strings_are_those_of_a_plain_search(
    tokenizers: dict[str, Tokenizer], data: st.DataObject, layout: str, words: list[str], include: bool, min_tokens: int
) -> None:
    tokenizer = tokenizers[layout]
    # min_tokens is tried on valid text only: with bad bytes, positions in the text so far are not comparable.
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=False) if min_tokens else data.draw(token_ids(tokenizer))
    expected = expected_stop(tokenizer, ids, words, min_tokens)
    final = expected[0][: expected[2] if include else expected[1]] if expected else tokenizer.decode(ids)
    stream = make(tokenizer, stop=words, include_stop_str_in_output=include)
    for count, token in enumerate(ids, 1):
        found = stream.push([token], min_tokens_reached=count >= min_tokens)
        assert final.startswith(stream.text)
        if found:
            break
    assert stream.stop == (expected[3] if expected else None)
    stream.finish()
    assert stream.text == final

    at_once = make(tokenizer, stop=words, include_stop_str_in_output=include)
    if not min_tokens:
        at_once.push(ids)
        at_once.finish()
        assert (at_once.text, at_once.stop, at_once.num_tokens) == (stream.text, stream.stop, stream.num_tokens)


def test_only_what_may_become_a_stop_string_is_held_back(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gpt2"]
    stream = make(tokenizer, stop=["\n\nUser:"])
    for character, shown in (
        ("a", "a"),
        ("\n", "a"),
        ("b", "a\nb"),
        ("\n", "a\nb"),
        ("\n", "a\nb"),
        ("U", "a\nb"),
        ("x", None),
    ):
        stream.push(tokenizer.encode(character))
        assert stream.text == (shown if shown is not None else "a\nb\n\nUx")


@pytest.mark.parametrize(
    ("words", "text", "shown", "stop"),
    [
        (["world", "wor"], "Hello world", "Hello ", "wor"),
        (["lo w", "o"], "Hello world", "Hell", "o"),
        (["o", "lo"], "Hello", "Hell", "o"),
        (["lo", "o"], "Hello", "Hel", "lo"),
        (["abab"], "aababab", "a", "abab"),
    ],
)
def test_the_earliest_to_be_completed_wins(
    words: list[str], text: str, shown: str, stop: str, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers["gpt2"]
    for include in (False, True):
        stream = make(tokenizer, stop=words, include_stop_str_in_output=include)
        assert stream.push(tokenizer.encode(text)) == stop
        assert stream.text == shown + stop * include
        assert stream.push(tokenizer.encode("more")) == stop
        stream.finish()
        assert stream.text == shown + stop * include


def test_a_newline_that_is_a_byte_token_stops_at_once(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    stream = make(tokenizer, stop=["\n"])
    assert stream.push(tokenizer.encode("the")) is None
    assert stream.push([newline]) == "\n"
    assert stream.text == "the"
    late = make(tokenizer, stop=["\n"])
    assert late.push([newline], min_tokens_reached=False) is None
    assert late.push(tokenizer.encode("the")) is None
    assert late.push([newline, newline]) == "\n"
    assert (late.text, late.num_tokens) == ("\n the", len(tokenizer.encode("the")) + 2)


def test_a_stop_string_may_begin_before_min_tokens_and_end_after(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gpt2"]
    stream = make(tokenizer, stop=["xyz"])
    ids = [tokenizer.encode(character)[0] for character in "xyzxyz"]
    assert stream.push(ids[:5], min_tokens_reached=False) is None
    assert stream.text == "xyz"
    assert stream.push(ids[5:]) == "xyz"
    assert stream.text == "xyz"


def test_half_characters_are_never_shown(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("byte-level", "sentencepiece", "metaspace"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("a😀", add_special_tokens=False)
        stream = make(tokenizer)
        for token in ids[:-1]:
            stream.push([token])
            assert "\ufffd" not in stream.text
        stream.finish()
        assert stream.text == tokenizer.decode(ids[:-1])
        assert stream.text.endswith("\ufffd")


def test_without_detokenizing_there_is_no_text(tokenizers: dict[str, Tokenizer]) -> None:
    stream = make(tokenizers["gpt2"], detokenize=False)
    stream.push([1, 2, 3])
    stream.finish()
    assert (stream.text, stream.num_tokens) == ("", 3)


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.lists(st.text("ab", max_size=6), max_size=6))
def test_depth_is_the_longest_beginning_of_a_stop_string(words: list[str], parts: list[str]) -> None:
    watch, text = StopWatch(words), ""
    for part in parts:
        watch.scan(part, allowed=False)
        text += part
        depths = [count for word in words for count in range(len(word)) if text.endswith(word[:count])]
        assert watch.depth == max(depths)


def test_a_long_text_costs_no_more_per_token_than_a_short_one(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("byte-level", "sentencepiece"):
        tokenizer = tokenizers[name]
        once = tokenizer.encode(" ".join(CORPUS + SAMPLES), add_special_tokens=False)
        times = []
        for repeat in (4, 40):
            stream = make(tokenizer, stop=["\n\nUser:", "<|im_start|>"])
            begin = time.thread_time()
            for token in once * repeat:
                stream.push([token])
                stream.take()
            times.append((time.thread_time() - begin) / repeat)
        assert times[1] < 3 * times[0]
