"""Byte-level tokenizers for models of random weights: a small one, and one as large as the model's vocabulary."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SMALL, MERGED = 300, 30_000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_small(folder: Path) -> None:
    tokenizer = _empty()
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], _trainer(SMALL))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_full(folder: Path, vocabulary: int, end: int) -> None:
    """Merges learned from the standard library's sources; every further id has a name of its own; `end` ends a text."""
    tokenizer = _empty()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    tokenizer.train([str(path) for path in sources], _trainer(MERGED))
    # Unlearned names go into the vocabulary itself, where no merge reaches them: as added tokens they would be searched for.
    spec = json.loads(tokenizer.to_str())
    names = spec["model"]["vocab"]
    first = end - len(SPECIAL) + 1
    for number in range(len(names), first):
        names[f"<unused{number}>"] = number
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(f"<unused{number}>", normalized=False) for number in range(end + 1, vocabulary)])
    assert tokenizer.get_vocab_size() == vocabulary, (tokenizer.get_vocab_size(), vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": 32_768,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _empty() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trainer(size: int) -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
