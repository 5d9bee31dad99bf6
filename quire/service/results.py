"""What a job says of itself while it runs: the texts of events, which scripts parse, and the result file. Pure functions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from quire.service.jobs import Event

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
PARITY_COLUMNS = ("parity_max_abs_logprob_difference", "parity_mean_abs_logprob_difference")


def step_event(report: Any) -> Event:
    """A training step. The numbers of a step without evaluation are left out."""
    text = f"Step {report.step}/{report.total_steps}: training loss={report.loss:.2f}"
    if report.validation_loss is not None:
        text += f", validation loss={report.validation_loss:.2f}, full validation loss={report.validation_loss:.2f}"
    return Event(text, data=metrics_of(report, total_steps=report.total_steps, epoch=report.epoch), step=report.step)


def metrics_of(report: Any, **more: Any) -> dict[str, Any]:
    """A report under OpenAI's names. The validation data is always gone through whole, so both kinds of numbers are equal."""
    found: dict[str, Any] = {
        "step": report.step,
        "train_loss": report.loss,
        "train_mean_token_accuracy": report.accuracy,
        "learning_rate": report.learning_rate,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "seconds": round(report.seconds, 4),
        **more,
    }
    if report.validation_loss is not None:
        for name in ("valid", "full_valid"):
            found[f"{name}_loss"] = report.validation_loss
            found[f"{name}_mean_token_accuracy"] = report.validation_accuracy
    return found


def checkpoint_event(step: int, name: str) -> Event:
    return Event(f"Checkpoint created at step {step} with Snapshot ID: {name}")


def parity_event(parity: Mapping[str, Any]) -> Event:
    """What training and serving think of the same tokens."""
    text = (
        f"Parity of training and serving on {parity['tokens']} tokens of {parity['rows']} {parity['source']} rows: "
        f"largest log-probability difference={parity['max']:.3g}, mean={parity['mean']:.3g}"
    )
    return Event(text, level="info" if parity["max"] == 0 else "warn", data={"parity": dict(parity)})


def closing_events(name: str) -> list[Event]:
    return [Event(f"New fine-tuned model created: {name}"), Event("The job has successfully completed")]


def result_csv(steps: Sequence[Mapping[str, Any]], parity: Mapping[str, Any] | None) -> bytes:
    """One line a step; the last one has the parity numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *PARITY_COLUMNS])
    for place, step in enumerate(steps):
        own = [step["step"], step["train_loss"], step["train_mean_token_accuracy"]]
        own += [step.get("valid_loss", ""), step.get("valid_mean_token_accuracy", "")]
        last = place == len(steps) - 1 and parity is not None
        writer.writerow([*own, *((parity["max"], parity["mean"]) if last and parity is not None else ("", ""))])
    return text.getvalue().encode()
