"""Measures quire-tiny: held-out loss beside unigram and bigram, Python that parses, right answers of every kind.

    python tools/embedded_eval.py [--model quire-tiny] [--questions 50] [--programs 50]

Answers come through `quire.LLM`, greedily, as a user would get them; the loss through the same model in training mode.
Everything asked here is held out from training (see embedded_data/exchange.py for what that means in each kind).
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import time
import warnings
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from embedded_baselines import Bigram
from embedded_data import conversations, corpus
from embedded_rows import Row, stream
from tokenizers import Tokenizer

from quire import LLM, SamplingParams
from quire.batch import packed
from quire.models.config import read_model_config
from quire.models.registry import build_model
from quire.weights.hub import resolve

EXAMINATION_SEED = 2048
LONGEST_ANSWER, PROGRAM_TOKENS = 200, 160
# Without a space at the end: it would be a token of its own, where the text has it in front of the next word.
STARTS = (
    "def",
    "import",
    "class",
    "def __init__(self",
    "for",
    "if",
    "def main():\n   ",
    "try:\n   ",
    "while",
    "with open(",
)


def loss_bits(folder: Path, rows: list[Row]) -> float:
    """Bits per token of the weights as shipped, computed in float32 by the model definition in training mode."""
    from safetensors.torch import load_file

    model = build_model(read_model_config(folder)).float()
    model.load_state_dict(
        {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}, strict=False
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = packed([row.tokens])
            logits = model.logits(model(batch)[:-1])
            total += float(torch.nn.functional.cross_entropy(logits, batch.tokens[1:], reduction="sum"))
            count += len(row.tokens) - 1
    return total / count / math.log(2)


def windows(tokens: list[int], length: int, most: int) -> list[Row]:
    starts = range(0, min(most, len(tokens)) - length + 1, length)
    return [Row(tokens[start : start + length], [True] * length) for start in starts]


def text_losses(folder: Path, most: int) -> dict[str, float]:
    """Bits per token on held-out library text, the same tokens for every model; and late in a full context."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train, kept = (stream(tokenizer, files) for files in corpus.split(corpus.documents()))
    bigram = Bigram(train, tokenizer.get_vocab_size())
    short, whole = windows(kept, 512, most), windows(kept, 2048, most)
    pairs = [token for row in short for token in row.tokens]
    return {
        "tokens": len(pairs),
        "unigram": bigram.unigram_bits(pairs),
        "bigram": bigram.bigram_bits(pairs),
        "quire-tiny, windows of 512": loss_bits(folder, short),
        "quire-tiny, windows of 2048": loss_bits(folder, whole),
    }


def parses(text: str) -> bool:
    """True if a beginning of this text, at least half of its lines and at least three, is valid Python.

    A sample stops in the middle of something, so its last lines may be dropped; nothing else may.
    """
    lines = text.split("\n")
    for end in range(len(lines), max(2, len(lines) // 2), -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse("\n".join(lines[:end]))
            return True
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
    return False


def programs(llm: LLM, count: int) -> dict[str, float]:
    """Share of sampled continuations of Python beginnings that parse, at temperatures 0.3 and 0.7."""
    shares = {}
    for temperature in (0.3, 0.7):
        prompts = [STARTS[index % len(STARTS)] for index in range(count)]
        params = [
            SamplingParams(temperature=temperature, max_tokens=PROGRAM_TOKENS, seed=index) for index in range(count)
        ]
        texts = [
            prompt + out.outputs[0].text for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True)
        ]
        shares[f"temperature {temperature}"] = sum(map(parses, texts)) / count
    return shares


def answers(llm: LLM, count: int, show: int) -> dict[str, dict[str, float]]:
    """For each kind: share of exactly right answers, and of answers that end by themselves."""
    table = {}
    for kind in conversations.KINDS:
        random = Random(f"{EXAMINATION_SEED}:{kind}")
        asked = [conversations.examination(kind, random) for _ in range(count)]
        greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER)
        given = [out.outputs[0] for out in llm.chat([messages for messages, _ in asked], greedy)]
        right = [exchange.is_right(answer.text) for (_, exchange), answer in zip(asked, given, strict=True)]
        table[kind] = {
            "right": sum(right) / count,
            "ended": sum(answer.finish_reason == "stop" for answer in given) / count,
        }
        for (messages, exchange), answer in list(zip(asked, given, strict=True))[:show]:
            print(
                f"[{kind}] {messages[-1]['content']!r}\n  wanted {exchange.answer!r}\n  given  {answer.text!r}",
                flush=True,
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="quire-tiny")
    parser.add_argument("--questions", type=int, default=50, help="held-out questions of each kind")
    parser.add_argument("--programs", type=int, default=50, help="Python continuations at each temperature")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="most held-out text tokens")
    parser.add_argument("--show", type=int, default=0, help="print that many answers of each kind")
    wishes = parser.parse_args()
    began = time.perf_counter()
    report: dict[str, object] = {"text, bits per token": text_losses(resolve(wishes.model), wishes.tokens)}
    llm = LLM(wishes.model, max_model_len=1024, max_num_seqs=64)
    report["python that parses"] = programs(llm, wishes.programs)
    table = answers(llm, wishes.questions, wishes.show)
    report["answers"] = table
    report["all answers"] = {name: sum(row[name] for row in table.values()) / len(table) for name in ("right", "ended")}
    print(json.dumps(report, indent=1))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
