"""An adapter's whole life on one base: python examples/sql_journey.py [--folder FOLDER] [--rows N]

Makes questions with their queries, trains an adapter for the embedded model on them, watches it answer questions that it has
never seen, answers with base and adapter in one batch, merges the two, and compares. Some minutes on two cores; docs/journey.md
does the same from the command line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quire
from quire import LLM, LoRARequest, SamplingParams
from quire.datasets import sql

BASE = "quire-tiny"
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
ADAPTER = LoRARequest("sql")


def read(path: Path) -> tuple[list[list[dict[str, str]]], list[str]]:
    """(questions as conversations, the right answers) of a file of examples."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[:-1] for row in rows], [row[-1]["content"] for row in rows]


def engine(model: str, requests: int, **options: Any) -> LLM:
    """An engine for `requests` short questions at a time, so that it leaves the memory to the training."""
    return LLM(model, max_model_len=160, max_num_seqs=requests, num_gpu_blocks_override=requests * 10, **options)


def share(answers: Sequence[str], right: Sequence[str]) -> float:
    """Of the answers, how many are the right query, letter by letter."""
    return sum(answer == query for answer, query in zip(answers, right, strict=True)) / len(right)


def journey(folder: Path, rows: int, held_out: int, tables: Sequence[str] = sql.NAMES, **options: Any) -> dict[str, float]:
    """All of it. Gives the shares of held-out questions that were answered with exactly the right query."""
    training, judge = sql.write(folder / "data", rows, held_out, tables=tables)
    questions, right = read(judge)
    llm = engine(BASE, min(held_out, 64), enable_lora=True)
    base = llm.chat(questions, GREEDY, use_tqdm=False)
    found = {"base": share([output.outputs[0].text for output in base], right)}
    print(f"The base answers {found['base']:.1%} of {held_out} held-out questions with the right query.")

    def watch(adapter: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Answers held-out questions with the adapter as it is by now, through the engine that serves it later."""
        llm.add_adapter("sql", adapter, replace=True)
        outputs = llm.generate([list(prompt) for prompt in prompts], GREEDY, use_tqdm=False, lora_request=ADAPTER)
        answers = [output.outputs[0].text for output in outputs]
        print(f"  held-out questions answered exactly: {share(answers, right[: len(answers)]):.1%}")
        return answers

    steps = -(-rows // 16)
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "sample_steps": max(1, steps // 8),
        "sample_prompts": held_out,
        "eval_steps": steps,
    }
    # The engine's own weights are trained on: nothing is loaded twice.
    quire.train(BASE, training, folder / "adapter", validation=judge, slots=llm.slots, sampler=watch, **settings | options)

    llm.add_adapter("sql", folder / "adapter", replace=True)
    both = llm.chat(questions * 2, GREEDY, use_tqdm=False, lora_request=[None] * held_out + [ADAPTER] * held_out)
    answers = [output.outputs[0].text for output in both]
    found["adapter"] = share(answers[held_out:], right)
    print(f"Base and adapter in one batch: {share(answers[:held_out], right):.1%} and {found['adapter']:.1%}. One of them:")
    print(f"  {questions[0][0]['content']!r}\n    base:    {answers[0]!r}\n    adapter: {answers[held_out]!r}")

    report = quire.merge(BASE, folder / "adapter", folder / "merged", data=judge, length=128)
    merged = engine(str(folder / "merged"), min(held_out, 64)).chat(questions, GREEDY, use_tqdm=False)
    found["merged"] = share([output.outputs[0].text for output in merged], right)
    print(f"Merged: {found['merged']:.1%}; {report.drift.text() if report.drift else ''}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where data, adapter and merged model go; else nothing is kept")
    parser.add_argument("--rows", type=int, default=16_000, help="rows to train on")
    parser.add_argument("--held-out", type=int, default=200, help="rows to judge by")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="sql-journey-"))
    try:
        journey(folder, given.rows, given.held_out)
    finally:
        if given.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
