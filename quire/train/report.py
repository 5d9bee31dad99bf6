"""What a run says of each step, and the files that keep it: metrics.jsonl, loss.svg, TensorBoard's if it is installed.

Knows no model. Of two writings of one step the later counts, so that a resumed run's files are as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS, PICTURE, SAMPLES, BOARD = "metrics.jsonl", "loss.svg", "samples.jsonl", "runs"
WIDTH, HEIGHT, MARGIN = 720, 360, 48


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. loss: per supervised token (DPO: per pair). accuracy: share of supervised tokens that were the
    likeliest (DPO: of pairs with the preferred answer ahead); validation_*: where this step was evaluated.

    run: the TrainingRun that made it. saved: the checkpoint that was written after it.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    saved: Path | None = None
    run: Any = field(default=None, compare=False, repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        line = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("run", "saved")}
        line["tokens_per_second"] = round(self.tokens_per_second, 1)
        return {name: _plain(value) for name, value in line.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 8) if math.isfinite(value) else str(value)
    return value


class Journal:
    """The files of a run in its output folder; `line` adds a report."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        """step: where the run stands; lines of later steps, which it will make again, are dropped."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SAMPLES):
            _keep(folder / name, step)
        self.board = _board(folder / BOARD)

    def line(self, report: StepReport) -> None:
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.as_dict()) + "\n")
        if self.board is not None:
            for name, value in report.as_dict().items():
                if isinstance(value, float):
                    self.board.add_scalar(f"train/{name}", value, report.step)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")

    def draw(self) -> None:
        """loss.svg from metrics.jsonl."""
        lines = _read(self.folder / METRICS)
        training = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), (int, float))]
        checked = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
        write_whole(self.folder / PICTURE, loss_picture(training, checked))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that was being written when the machine stopped is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _keep(path: Path, step: int) -> None:
    """Only the lines of the first `step` steps."""
    if path.is_file():
        write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _read(path) if line["step"] <= step))


def write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _board(folder: Path) -> Any:
    """A TensorBoard writer, if the package is there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def loss_picture(training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> str:
    """An SVG: the training loss as a thin line, smoothed as a thick one, the validation loss as dots on a line."""
    points = [*training, *validation]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"/>\n'
    last = max(step for step, _ in points)
    low, high = min(0.0, *(loss for _, loss in points)), max(loss for _, loss in points) or 1.0

    def place(step: float, loss: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / max(1, last)
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - low) / (high - low or 1.0)
        return f"{x:.1f},{y:.1f}"

    def line(values: Sequence[tuple[int, float]], colour: str, width: float) -> str:
        listed = " ".join(place(*value) for value in values)
        return f'<polyline points="{listed}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        loss = low + (high - low) * share
        (x0, y), x1 = place(0, loss).split(","), place(last, loss).split(",")[0]
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y}" font-size="11" text-anchor="end">{loss:.3g}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 18}" font-size="11" text-anchor="end">step {last}</text>')
    parts += [line(training, "#b9cbe8", 1), line(_smoothed(training), "#2b5fb0", 2)]
    if validation:
        parts.append(line(validation, "#c4501b", 1.5))
        for x, y in (place(*value).split(",") for value in validation):
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#c4501b"/>')
    parts.append(f'<text x="{MARGIN}" y="24" font-size="13" fill="#2b5fb0">training loss</text>')
    if validation:
        parts.append(f'<text x="{MARGIN + 110}" y="24" font-size="13" fill="#c4501b">validation loss</text>')
    style = 'font-family="sans-serif" fill="#333"'
    inside = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" {style}>\n{inside}\n</svg>\n'


def _smoothed(values: Sequence[tuple[int, float]], memory: float = 0.9) -> list[tuple[int, float]]:
    out, mean, weight = [], 0.0, 0.0
    for step, loss in values:
        mean, weight = memory * mean + (1 - memory) * loss, memory * weight + (1 - memory)
        out.append((step, mean / weight))
    return out
