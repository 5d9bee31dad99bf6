"""What does a fine-tuning job cost the requests beside it: intervals between tokens, and answers, without and with training.

The same streams run alone, beside a job for each budget, and alone again, all in one process on one copy of the weights. A
budget is the milliseconds that training may add to a step; the machine's own noise is what differs between the two lone runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.record import Outcome
from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from quire.request import SamplingParams
from quire.service.fine_tuning import FineTuning
from quire.service.job_request import job_request

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
START_SECONDS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=list(random_model.SHAPES), help="a model with random weights; else quire-tiny")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.0, 50.0, 200.0], help="milliseconds")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--row-words", type=int, default=60, help="length of the rows that are trained on")
    parser.add_argument("--threads", type=int)


def run(options: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        model = "quire-tiny"
        if options.shape:
            model = str(Path(place) / "base")
            random_model.write(Path(model), random_model.SHAPES[options.shape], full_tokenizer=True)
        config = EngineConfig(
            model=model, enable_lora=True, max_num_seqs=16, max_model_len=1024, threads=options.threads, chat_template=CHAT,
            kv_cache_memory_bytes=256 << 20,
        )  # fmt: skip
        engine = AsyncEngine.from_config(config)
        try:
            return _measure(engine, Path(place), options)
        finally:
            engine.shutdown()


def _measure(engine: Any, place: Path, options: argparse.Namespace) -> Outcome:
    _streams(engine, options)  # warm
    answers, alone = _streams(engine, options)
    found: dict[str, Any] = {"alone": alone}
    changed = 0
    for budget in options.budgets:
        beside, numbers = _beside_a_job(engine, place / f"data-{budget}", budget / 1000, options)
        found[f"budget {budget:g} ms"] = numbers
        changed += beside != answers
    found["alone again"] = _streams(engine, options)[1]
    told = "; ".join(f"{name}: p99 {numbers['p99_ms']} ms" for name, numbers in found.items())
    return Outcome(
        f"{options.streams} streams beside a job, {changed} answers changed. {told}", {"runs": found, "changed": changed}
    )


def _beside_a_job(engine: Any, folder: Path, budget: float, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    house = FineTuning(folder, latency_budget=budget, most_training=1, most_unfinished=10, most_bytes=1 << 30)
    house.attach(engine, ("base",))
    trainer = house._trainer
    assert trainer is not None
    try:
        job = house.create_job("", job_request(_job(house, options)))
        deadline = time.monotonic() + START_SECONDS
        while len(house.jobs.steps_told(job.id)) < 1 and time.monotonic() < deadline:  # every kind of piece was seen once
            time.sleep(0.05)
        gaps = trainer.gaps
        before = gaps.pieces_between_steps
        answers, numbers = _streams(engine, options)
        numbers |= {
            "pieces": gaps.pieces_between_steps - before,
            "longest_added_ms": round(gaps.longest_between_steps * 1000, 1),
            "piece_ms": round(gaps.typical * 1000, 1),
        }
        house.jobs.cancel("", job.id)
        return answers, numbers
    finally:
        house.close()


def _job(house: FineTuning, options: argparse.Namespace) -> dict[str, Any]:
    upload = house.files.begin()
    text = " ".join(f"word{number % 17}" for number in range(options.row_words))
    for number in range(64):
        row = {"messages": [{"role": "user", "content": f"{number} {text}"}, {"role": "assistant", "content": text}]}
        upload.write(json.dumps(row).encode() + b"\n")
    file = house.files.create("", upload, "rows.jsonl", "fine-tune")
    return {"model": "base", "training_file": file.id, "hyperparameters": {"n_epochs": 50, "batch_size": 8}}


def _streams(engine: Any, options: argparse.Namespace) -> tuple[list[tuple[int, ...]], dict[str, Any]]:
    """(tokens of each stream, percentiles of the intervals between them)."""
    gaps: list[float] = []

    async def one(number: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=options.tokens, temperature=1.0, seed=number, ignore_eos=True)
        tokens: tuple[int, ...] = ()
        last = None
        async for output in engine.generate(list(range(5, 25 + number)), params, f"stream-{number}-{time.monotonic_ns()}"):
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last, tokens = now, tuple(output.outputs[0].token_ids)
        return tokens

    async def every() -> list[tuple[int, ...]]:
        return list(await asyncio.gather(*(one(number) for number in range(options.streams))))

    answers = asyncio.run(every())
    gaps.sort()
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}
    return answers, {name: round(gaps[int(share * (len(gaps) - 1))] * 1000, 1) for name, share in shares.items()}
