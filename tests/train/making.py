"""Small models and examples that the room's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from quire.assemble import assemble
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.train.examples import Example
from quire.train.report import StepReport
from quire.train.run import TrainingRun

LENGTHS = (20, 33, 12, 40, 25, 18, 30)


def load(folder: Path, dtype: str = "float32", quantization: str | None = None) -> CausalLM:
    """As it serves: with packed weights."""
    return assemble(folder, read_model_config(folder), dtype, quantization)


def examples(lengths: Sequence[int] = LENGTHS, seed: int = 1, vocabulary: int = 320) -> list[Example]:
    """Random tokens; the second half of each row is learned, but for one token in it."""
    source = torch.Generator().manual_seed(seed)
    made = []
    for line, length in enumerate(lengths, 1):
        tokens = torch.randint(0, vocabulary, (length,), generator=source).tolist()
        weights = [0.0] * (length // 2) + [1.0] * (length - length // 2)
        weights[length // 2 + 2] = 0.0
        made.append(Example(tuple(tokens), tuple(weights), line, length // 2))
    return made


def pairs(seed: int = 2) -> list[Example]:
    """Preference pairs: the rejected answer is the preferred one from its end."""
    return [Example(one.tokens, one.weights, one.line, one.prompt, _turned(one)) for one in examples((14, 22, 17, 28), seed)]


def _turned(one: Example) -> Example:
    answer = tuple(reversed(one.tokens[one.prompt :]))[:-2]
    return Example(one.tokens[: one.prompt] + answer, one.weights[: one.prompt] + (1.0,) * len(answer), one.line, one.prompt)


def train(run: TrainingRun, steps: int | None = None) -> list[StepReport]:
    """The reports of a run, driven to its end or over so many steps."""
    reports: list[StepReport] = []
    for report in run.pieces():
        if report is not None:
            reports.append(report)
            if len(reports) == steps:
                break
    return reports
