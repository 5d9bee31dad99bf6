"""Small tokenizers, trained here, laid out on disk as the models that users name have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:45, isn't it?",
    "def add(left: int, right: int) -> int:\n    return left + right\n\n",
    "Äpfel, Öl und Übermut: naïve café crème, 日本語 の テスト, привет мир",
    "She said: 'Hello, world!' and they'll answer   with   many   spaces.",
    '{"name": "Quire", "pages": [1, 2, 3], "bound": true}',
] * 4
SAMPLES = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces, and trailing  ",
    "The quick brown fox — jumps… over 12345 dogs.",
    "日本語のテスト 😀👩‍👩‍👧 emoji",
    "line\nline\n\n\ttab",
    "it's they'll WE'LL",
    "<s>inside</s> <|im_end|> <|endoftext|>",
    "e\u0301 combining, \u00a0 no-break, \u200b zero width",
]


def write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8")


def added(token: int, content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": token, "content": content, "special": special, **base, **flags}


def train_byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level_folder(folder: Path) -> None:
    """As Qwen2.5-Instruct: tokenizer.json, special tokens after the vocabulary, one that is not special."""
    read = json.loads(train_byte_level().to_str())
    size = len(read["model"]["vocab"])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    read["added_tokens"] = [added(size + place, name) for place, name in enumerate(names)]
    read["added_tokens"].append(added(size + 3, "<tool_call>", special=False, normalized=False))
    read["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    read["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    write(folder, "tokenizer.json", read)
    listed = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in read["added_tokens"]}
    listed[str(size + 4)] = {k: v for k, v in added(size + 4, "<think>", special=False).items() if k != "id"}
    config = {"added_tokens_decoder": listed, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    config |= {"add_bos_token": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    write(folder, "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def sentencepiece_folder(folder: Path, *, metaspace: bool = False) -> None:
    """As Llama 2 and Mistral: byte fallback and a prepended space, `<s>` in front; or the Metaspace form of it."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=160, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token, _ in sorted(learned["vocab"].items(), key=lambda entry: entry[1])]
    backend = Backend(
        models.BPE(
            vocab={token: place for place, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    read = json.loads(backend.to_str())
    if metaspace:
        read["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        steps: list[dict[str, Any]] = [{"type": "ByteFallback"}, json.loads(decoders.Metaspace().__getstate__())]
    else:
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        read["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        steps += [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    read["decoder"] = {"type": "Sequence", "decoders": steps}
    backend = Backend.from_str(json.dumps(read))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    write(folder, "tokenizer.json", backend.to_str())
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
    }
    write(folder, "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def gpt2_folder(folder: Path) -> None:
    """As the first GPT-2 repositories: vocab.json and merges.txt, and nothing that says what they are but config.json."""
    backend = train_byte_level()
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    write(folder, "vocab.json", vocabulary | {"<|endoftext|>": len(vocabulary)})
    write(folder, "config.json", {"model_type": "gpt2"})


def opt_folder(folder: Path) -> None:
    """As facebook/opt-125m: GPT-2's files, fairseq's special tokens first, `</s>` in front of every text."""
    backend = train_byte_level()
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    front = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    write(folder, "vocab.json", front | {token: place + 4 for token, place in vocabulary.items()})
    end = {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    named = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>"}
    write(folder, "special_tokens_map.json", named)
    typed = {role: {"__type": "AddedToken", **end} for role in ("bos_token", "eos_token", "unk_token")}
    config = {"errors": "replace", **typed, "pad_token": "<pad>", "add_prefix_space": False, "add_bos_token": True}
    write(folder, "tokenizer_config.json", config | {"tokenizer_class": "GPT2Tokenizer"})
    write(folder, "config.json", {"model_type": "opt", "bos_token_id": 2, "eos_token_id": 2})


def words_folder(folder: Path) -> None:
    """Whole words and no decoder at all: tokens are joined with spaces."""
    backend = Backend(models.WordLevel({"[UNK]": 0, **{f"w{place}": place + 1 for place in range(20)}}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>", "<sep>"])
    write(folder, "tokenizer.json", backend.to_str())
    write(folder, "tokenizer_config.json", {"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"})


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "byte-level": byte_level_folder,
    "sentencepiece": sentencepiece_folder,
    "metaspace": lambda folder: sentencepiece_folder(folder, metaspace=True),
    "gpt2": gpt2_folder,
    "opt": opt_folder,
    "words": words_folder,
}
