"""Answers of an adapter in training to prompts of its validation data, by the engine that serves: how it would do now."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.lora.request import LoRARequest
from quire.request import SamplingParams
from quire.service.job_data import JobData
from quire.service.jobs import Event
from quire.train.config import TrainingConfig
from quire.train.report import StepReport

MOST_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Sample:
    """What came before the answer, the model's answer, and the one in the data."""

    prompt: str
    answer: str
    expected: str


def due(config: TrainingConfig, report: StepReport | None) -> bool:
    """Whether samples are asked for after this step."""
    return report is not None and config.sample_steps is not None and report.step % config.sample_steps == 0


def prompts(data: JobData) -> list[Any]:
    """The rows of the validation data that are asked."""
    rows = () if data.validation is None else data.validation.examples
    return [row for row in rows if row.prompt][: data.config.sample_prompts]


async def answers(engine: Any, name: str, rows: Sequence[Any]) -> list[Sample]:
    """What the adapter `name` answers, likeliest tokens first."""
    found = []
    for row in rows:
        prompt = list(row.tokens[: row.prompt])
        params = SamplingParams(max_tokens=MOST_ANSWER_TOKENS, temperature=0.0)
        last = None
        async for output in engine.generate(prompt, params, f"sample-{uuid.uuid4().hex}", lora_request=LoRARequest(name)):
            last = output
        assert last is not None
        decode = engine.tokenizer.decode
        expected = decode(list(row.tokens[row.prompt :]), skip_special_tokens=True)
        found.append(Sample(decode(prompt, skip_special_tokens=False), last.outputs[0].text, expected))
    return found


def event(step: int, samples: Sequence[Sample]) -> Event:
    """The event that carries them."""
    listed = [{"prompt": sample.prompt, "answer": sample.answer, "expected": sample.expected} for sample in samples]
    return Event(
        f"Samples at step {step}: {len(samples)} prompts of the validation file", data={"step": step, "samples": listed}
    )
