"""Writes the folder of quire-tiny except for its weights: configuration, tokenizer, chat template, generation defaults.

    python tools/embedded_folder.py [--folder quire/embedded/quire-tiny]

The tokenizer is a byte-level BPE of exactly 8,192 entries, trained on the standard library and on generated
conversations; digits stand alone, so that sums can be learned. The same Python gives the same file. Knows no torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from embedded_data import conversations, corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).resolve().parents[1] / "quire" / "embedded" / "quire-tiny"
VOCABULARY = 8192
PAD, BEGIN, END, TURN = "<|pad|>", "<|begin|>", "<|end|>", "<|turn|>"
CONVERSATIONS = 12_000
LANGUAGE_SEED = 8192

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}

# Content may be a string or OpenAI's list of parts; only text parts are read.
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% elif message['content'] %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""

TOKENIZER_CONFIG = {
    "added_tokens_decoder": {
        str(index): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, text in enumerate((PAD, BEGIN, END, TURN))
    },
    "bos_token": BEGIN,
    "eos_token": END,
    "pad_token": PAD,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.9,
}


def render(messages: list[dict[str, str]], *, for_answer: bool = False) -> str:
    """The chat template's own text for plain messages, without jinja."""
    text = BEGIN + "".join(f"{TURN}{m['role']}\n{m['content']}{END}\n" for m in messages)
    return text + f"{TURN}assistant\n" if for_answer else text


def sample_texts() -> Iterator[str]:
    """What the vocabulary is learned from. Conversations without their special tokens, which are fixed."""
    train, _ = corpus.split(corpus.documents())
    yield from (text for _, text in train)
    random = Random(LANGUAGE_SEED)
    # The role names stand in every turn: each is to be one token.
    yield from ["system\n", "user\n", "assistant\n"] * CONVERSATIONS
    for _ in range(CONVERSATIONS):
        yield from (message["content"] for message in conversations.conversation(random))


def train_tokenizer() -> Tokenizer:

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1)]
    )
    return tokenizer


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    files = {
        "config.json": CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "generation_config.json": GENERATION_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    write(parser.parse_args().folder)
