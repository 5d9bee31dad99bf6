"""How fast does LoRA training go, in tokens a second and of what the machine's matrix rate allows, beside TRL and Unsloth?

Random weights in the 0.5 B shape (bfloat16), chat examples of mixed lengths (median 220 tokens, the assistant's turn 20 to 60 %
of them), rank 16 on all linears, loss on the assistant's turns, 8 examples a step in the same order for all. Each contestant
has a process of its own; the first steps are not counted. TRL and Unsloth run where
`python -m benchmarks.peers install trl unsloth --into DIR` put them. The bound counts the products that cannot be avoided: no
padding, the head on learned rows only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import ENVIRONMENT, random_model
from benchmarks.peers import PEERS, tcmalloc
from benchmarks.physical import multiply_rate
from benchmarks.record import Outcome

ROWS, MEDIAN_LOG, SPREAD, SHORTEST, LONGEST = 256, 5.394, 0.6, 64, 768
TEMPLATE = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HERE = Path(__file__).parent
# What is asked of the peers: TRL's defaults, its setting that was fastest of those that compile nothing, the base in float32,
# which is faster on processors without bfloat16 products; and Unsloth's fastest, with and without torch.compile.
PEER_SETTINGS = {
    "TRL defaults": ("trl", []),
    "TRL by length, no checkpointing": ("trl", ["--by-length", "--no-checkpointing"]),
    "TRL float32 by length": ("trl", ["--by-length", "--float32"]),
    "Unsloth by length, no checkpointing": ("unsloth", ["--by-length", "--no-checkpointing", "--unsloth"]),
    "Unsloth compiled, by length, no checkpointing": (
        "unsloth",
        ["--by-length", "--no-checkpointing", "--unsloth", "--compile"],
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=tuple(random_model.SHAPES), default="0.5b")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--folder", type=Path, help="where the model is, or goes; else a temporary one")
    parser.add_argument("--only", default="", help="of the peers' settings, those with this in their names")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a peer's run is ended")
    parser.add_argument("--together", type=int, default=4, help="jobs that train in one batch; 0: do not")


def run(options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        model, data = folder / options.shape, folder / f"{options.shape}.jsonl"
        if not (model / "model.safetensors").exists():
            random_model.write(model, random_model.SHAPES[options.shape], full_tokenizer=True)
        write_data(model, data)
        rate = _matrix_rate()
        counts = ["--steps", str(options.steps), "--warmup", str(options.warmup), "--batch", str(options.batch)]
        found = {"Quire": _child([sys.executable, "-m", "benchmarks.training_run", str(model), str(data), *counts])}
        for label, (peer, flags) in _peers(options).items():
            python = options.peers / peer / "bin" / "python"
            # -P: this folder's modules are not to be found in place of installed ones of the same name.
            words = [str(python), "-P", str(HERE / "training_trl.py"), str(model), str(data), *counts, *flags]
            found[label] = _child(words, preload=tcmalloc(options.peers), limit=options.limit)
        if options.together:
            for batch in (options.batch, 1):
                words = [sys.executable, "-m", "benchmarks.training_run", str(model), str(data), *counts]
                words += ["--together", str(options.together), "--batch", str(batch)]
                found[f"Quire, {options.together} jobs of {batch}"] = _child(words)
        rate = statistics.mean([rate, _matrix_rate()])
    options.peers = options.folder = None  # places of this machine are nobody's business
    ours = found["Quire"]
    for numbers in found.values():
        if "unfinished" in numbers:
            continue
        work = numbers.get("flops", ours["flops"] * numbers["tokens"] / ours["tokens"])
        numbers["share_of_bound"] = round(work / rate / numbers["seconds"], 3)
    return Outcome(_headline(found, options), {"matrix_rate": rate, "contestants": found})


def _matrix_rate() -> float:
    """The better of torch's two: without instructions for bfloat16 its products are slower than in float32."""
    return max(multiply_rate(torch.bfloat16), multiply_rate(torch.float32))


def _headline(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    def told(one: dict[str, Any]) -> str:
        if "unfinished" in one:
            return f"did not finish {options.warmup + options.steps} steps in {one['unfinished']:.0f} s"
        gain = f", {one['gain']:.2f}x one after the other" if "gain" in one else ""
        reached = f"{one['share_of_bound']:.0%} of the bound, {one['peak_gb']:.1f} GB"
        return f"{one['tokens_per_second']:.0f} tokens/s ({reached}{gain})"

    parts = [f"{label} {told(one)}" for label, one in found.items()]
    return f"{options.shape}, {options.batch} chat examples a step, rank 16 on all linears: " + "; ".join(parts)


def _peers(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    if options.peers is None:
        return {}
    options.peers = options.peers.resolve()
    for name in ("trl", "unsloth"):
        if not PEERS[name].installed(options.peers):
            print(f"not installed there: python -m benchmarks.peers install {name} --into DIR", file=sys.stderr)
    return {
        label: (peer, flags)
        for label, (peer, flags) in PEER_SETTINGS.items()
        if options.only in label and PEERS[peer].installed(options.peers)
    }


def _child(words: list[str], preload: Path | None = None, limit: float | None = None) -> dict[str, Any]:
    """The last line that a process of its own prints, as JSON; unfinished: the seconds after which it was ended."""
    environment = {**ENVIRONMENT, **({"LD_PRELOAD": str(preload)} if preload else {}), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"unfinished": limit}
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(words[2:4], {name: value for name, value in numbers.items() if name != "parts"}, flush=True)
    return numbers


def write_data(model: Path, path: Path) -> None:
    """The examples, the same for the same tokenizer: sentences of words that are one token each."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word[1:] for word, _ in sorted(vocabulary.items(), key=lambda entry: entry[1]) if re.fullmatch("Ġ[a-z]{2,}", word)]
    source = random.Random(0)
    odds = [1 / (place + 20) for place in range(len(words))]

    def text(tokens: int) -> str:
        return " ".join(source.choices(words, odds, k=max(1, tokens)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            length = min(LONGEST, max(SHORTEST, round(source.lognormvariate(MEDIAN_LOG, SPREAD)))) - 12
            answer = round(length * source.uniform(0.2, 0.6))
            turns = [("user", text(length - answer)), ("assistant", text(answer))]
            file.write(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n")
