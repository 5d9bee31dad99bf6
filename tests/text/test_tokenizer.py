"""The tokenizer against `transformers` on every layout, and what it says when a folder is wrong."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quire.errors import InvalidRequest, ModelError
from quire.text import Tokenizer
from tests.text.tokenizer_layouts import (
    LAYOUTS,
    SAMPLES,
    added,
    byte_level_folder,
    gpt2_folder,
    opt_folder,
    sentencepiece_folder,
    write,
)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_encodes_and_decodes_as_transformers(layout: str, folders: dict[str, Path], tokenizers: dict[str, Tokenizer]) -> None:
    ours, theirs = tokenizers[layout], reference(folders[layout])
    draw = random.Random(layout)
    for text in SAMPLES:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
    for ids in [ours.encode(text) for text in SAMPLES] + [draw.choices(range(len(ours)), k=30) for _ in range(100)]:
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert len(ours) == ours.vocab_size == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("eos_token", "eos_token_id", "bos_token", "bos_token_id", "pad_token_id"):
        if layout != "sentencepiece" or "pad" not in name:
            assert getattr(ours, name) == getattr(theirs, name), name
    assert set(theirs.all_special_ids) <= ours.special_ids
    tokens = ours.convert_ids_to_tokens(ours.encode(SAMPLES[4]))
    assert tokens == theirs.convert_ids_to_tokens(theirs.encode(SAMPLES[4]))
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    batch = theirs(SAMPLES[2:5])
    assert ours(SAMPLES[2:5]) == {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_opt_begins_with_its_end_token_and_gpt2_does_not(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert tokenizers["opt"].encode("Hello")[0] == 2 == tokenizers["opt"].bos_token_id
    assert tokenizers["opt"].encode("Hello")[1:] == tokenizers["opt"].encode("Hello", add_special_tokens=False)
    assert tokenizers["gpt2"].encode("Hello") == tokenizers["gpt2"].encode("Hello", add_special_tokens=False)
    assert tokenizers["gpt2"].eos_token == "<|endoftext|>"
    opt_folder(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    bare = Tokenizer.from_folder(tmp_path)
    assert bare.encode("Hello") == tokenizers["opt"].encode("Hello")
    assert (bare.eos_token_id, bare.pad_token_id) == (2, 1)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_configured_bos_and_eos(bos: bool, eos: bool, tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", config | {"add_bos_token": bos, "add_eos_token": eos})
    assert Tokenizer.from_folder(tmp_path).encode("Hello") == reference(tmp_path).encode("Hello")  # tokenizer.json says it all
    read = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for processor in (None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}):
        write(tmp_path, "tokenizer.json", read | {"post_processor": processor})
        ours = Tokenizer.from_folder(tmp_path)
        plain = ours.encode("Hello", add_special_tokens=False)
        assert ours.encode("Hello") == [1] * bos + plain + [2] * eos


def test_added_tokens_file_extends_vocab_and_merges(tmp_path: Path) -> None:
    gpt2_folder(tmp_path)
    size = len(json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")))
    write(tmp_path, "added_tokens.json", {"<tool>": size + 1, "<end>": size})
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<end>"})
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("a<tool>b<end>")[-3::2] == [size + 1, size]
    assert ours.eos_token_id == size
    assert ours.special_ids >= {size}
    assert ours.decode(ours.encode("a<tool>b<end>")) == "a<tool>b"
    write(tmp_path, "added_tokens.json", {"<tool>": size + 7})
    with pytest.raises(ModelError, match=r"'<tool>' is listed with id"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_without_an_embedding_get_no_id(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    before = len(Tokenizer.from_folder(tmp_path))
    write(tmp_path, "tokenizer_config.json", config | {"pad_token": "<not-there>"})
    ours = Tokenizer.from_folder(tmp_path)
    assert (len(ours), ours.pad_token_id, ours.pad_token) == (before, None, "<not-there>")


def test_a_named_special_token_that_is_listed_as_ordinary_is_special(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    read = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    end = next(token for token in read["added_tokens"] if token["content"] == "<|im_end|>")
    end |= added(end["id"], "<|im_end|>", special=False)
    write(tmp_path, "tokenizer.json", read)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.special_ids >= {end["id"]}
    assert ours.decode(ours.encode("a<|im_end|>")) == "a"


def test_token_bytes_and_text(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("byte-level", "gpt2", "opt", "sentencepiece"):
        ours = tokenizers[name]
        for text in SAMPLES[1:]:
            ids = ours.encode(text, add_special_tokens=False)
            joined = b"".join(ours.token_bytes(token) for token in ids).decode()
            assert joined == ours.decode(ids, skip_special_tokens=False) or joined == " " + text
    llama = tokenizers["sentencepiece"]
    assert llama.token_bytes(3 + 0xE4) == b"\xe4"
    assert llama.token_text(3 + 0xE4) == "\ufffd"
    assert llama.token_text(llama.convert_tokens_to_ids("▁the")) == " the"
    assert llama.token_text(2) == "</s>"
    assert llama.token_bytes(10**6) == b""


def test_spaces_between_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    words = tokenizers["words"]
    ids = words.encode("w1 <end> <sep> w2")
    assert words.decode(ids, skip_special_tokens=False) == "w1 <end> <sep> w2"
    assert words.decode(ids, False, spaces_between_special_tokens=False) == "w1 <end><sep> w2"
    assert words.decode(ids) == "w1 w2"


def test_decodes_out_of_vocabulary_ids_as_nothing_and_refuses_impossible_ones(tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["byte-level"]
    ids = ours.encode("Hello")
    assert ours.decode([*ids, len(ours) + 5]) == "Hello"
    for wrong in (-1, 2**40):
        with pytest.raises(InvalidRequest, match=r"token ids must be integers in \[0, "):
            ours.decode([wrong])


def test_text_that_is_no_unicode_is_the_callers_fault(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        tokenizers["byte-level"].encode("a\ud800b")
    with pytest.raises(InvalidRequest, match="it is NoneType"):
        tokenizers["byte-level"].encode(None)  # type: ignore[arg-type]


def test_many_threads(tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["byte-level"]
    texts = [sample * 3 for sample in SAMPLES] * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: ours.decode(ours.encode(text), False), texts)) == texts


def test_clear_words_for_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"need tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(ModelError, match=r"only a SentencePiece tokenizer\.model.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("damage", ["", '{"model"', "[1]"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    write(tmp_path, name, damage)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Tokenizer.from_folder(tmp_path)


def test_unknown_splitting_and_unknown_decoders_are_refused(tmp_path: Path) -> None:
    gpt2_folder(tmp_path)
    write(tmp_path, "config.json", {"model_type": "roberta"})
    with pytest.raises(ModelError, match="'roberta' tokenizer splits text"):
        Tokenizer.from_folder(tmp_path)
    byte_level_folder(tmp_path)
    read = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    write(tmp_path, "tokenizer.json", read | {"decoder": {"type": "BPEDecoder", "suffix": "</w>"}})
    with pytest.raises(ModelError, match="decoder step 'BPEDecoder'"):
        Tokenizer.from_folder(tmp_path)


def test_qwen2_splits_text_in_its_own_way(tmp_path: Path) -> None:
    gpt2_folder(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    write(tmp_path, "config.json", {"model_type": "qwen2"})
    ours, theirs = Tokenizer.from_folder(tmp_path), reference(tmp_path)
    for text in SAMPLES:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.eos_token == theirs.eos_token == "<|endoftext|>"
