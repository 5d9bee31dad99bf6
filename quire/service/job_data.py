"""A job's files as examples, or the reasons why they cannot be: what a failed job says of its data. Knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import AdapterError, ConfigError, DataError
from quire.service.job_request import JobRequest, resolved, training_config
from quire.service.jobs import Job
from quire.train.config import TrainingConfig
from quire.train.data import Dataset, read_dataset, shared_rows
from quire.train.rows import PAIRS, Wrong, layout_of

FEWEST_ROWS = 10
MOST_LINES_TOLD = 100


class JobFailed(Exception):
    """A job cannot go on. code, parameter: as in `job.error`. problems: of its files, line by line."""

    def __init__(self, message: str, code: str, parameter: str | None, problems: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.message, self.code, self.parameter = message, code, parameter
        self.problems = problems

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "param": self.parameter}

    def event_data(self) -> dict[str, Any]:
        """The same with every bad line as values."""
        listed = [{"line": found.line, "field": found.field, "message": found.message} for found in self.problems]
        return {**self.as_dict(), **({"problems": listed} if listed else {})}


@dataclass(frozen=True)
class JobData:
    """What a job trains on, and with which settings."""

    config: TrainingConfig
    hyperparameters: dict[str, Any]
    training: Dataset
    validation: Dataset | None

    @property
    def notes(self) -> list[str]:
        """What the owner should know of the files."""
        said = []
        for data in (self.training, self.validation):
            if data is not None:
                said += [f"{data.summary()}.", *data.notes]
        shared = 0 if self.validation is None else shared_rows(self.training, self.validation)
        if shared:
            said.append(f"{shared:,} rows of the validation file are in the training file, too: its loss says less.")
        return said


def request_of(job: Job) -> JobRequest:
    """The request that a job was made from."""
    return JobRequest(**{**job.asked, "integrations": tuple(job.asked.get("integrations", ()))})


def read_job(job: Job, training: Path, validation: Path | None, engine: Any) -> JobData:
    """Read and check a job's files whole. Raises JobFailed with all that is wrong with the first that is wrong."""
    request = request_of(job)
    first = _read(request, "training_file", training, _config(job, request, 1), engine)
    if len(first.examples) < FEWEST_ROWS:
        raise JobFailed(
            f"Training file has {len(first.examples)} example(s), but must have at least {FEWEST_ROWS} examples",
            "invalid_n_examples",
            "training_file",
        )
    hyperparameters = job.facts.get("hyperparameters") or resolved(request.hyperparameters, first.rows)
    config = _config(job, request, first.rows)
    second = None if validation is None else _read(request, "validation_file", validation, config, engine)
    return JobData(config, hyperparameters, first, second)


def _config(job: Job, request: JobRequest, rows: int) -> TrainingConfig:
    """What was settled when the files were validated; a later version's defaults do not change a job that has begun."""
    try:
        if "config" in job.facts:
            return TrainingConfig(**job.facts["config"])
        return training_config(request, resolved(request.hyperparameters, rows), job.facts["seed"])
    except (ConfigError, AdapterError) as error:
        raise JobFailed(str(error), "invalid_hyperparameters", "lora") from None


def _read(request: JobRequest, place: str, path: Path, config: TrainingConfig, engine: Any) -> Dataset:
    file = getattr(request, place)
    opening = f"The job failed due to an invalid {place.replace('_', ' ')}."
    try:
        return read_dataset(
            path,
            engine.tokenizer,
            config,
            longest=engine.plan.max_model_len,
            ends=engine.stop_token_ids,
            chat_template=engine.config.chat_template,
            name=file,
        )
    except DataError as error:
        raise JobFailed(f"{opening} Invalid file format. {_told(error)}", f"invalid_{place}", place, error.problems) from None
    except ConfigError as error:
        raise JobFailed(f"{opening} {_mismatch(file, path, config) or error}", f"invalid_{place}", place) from None


def _told(error: DataError) -> str:
    if not error.problems:
        return error.message
    told = error.problems[:MOST_LINES_TOLD]
    lines = " ".join(f"{str(problem)[:1].upper()}{str(problem)[1:]}" for problem in told)
    more = error.count - len(told)
    return f"{error.count:,} problem(s). {lines}" + (f" And {more:,} more." if more > 0 else "")


def _mismatch(file: str, path: Path, config: TrainingConfig) -> str | None:
    """The sentence for a file of another method's format, in OpenAI's words."""
    with path.open("rb") as lines:
        try:
            pairs = layout_of(json.loads(next(line for line in lines if line.strip()))) in PAIRS
        except (Wrong, ValueError, StopIteration):
            return None
    if pairs == (config.method == "dpo"):
        return None
    kind, method = ("fine-tune-preference", "dpo") if pairs else ("fine-tune-chat", "supervised")
    return (
        f"Input file {file} is in the {kind} format, but the specified fine-tuning job is not using '{method}' as the "
        f"training method (provided method={config.method})."
    )


def parity_rows(data: JobData) -> tuple[Sequence[Any], str]:
    """Held-out rows where there are any, else rows of the training file."""
    return (data.validation.examples, "validation") if data.validation is not None else (data.training.examples, "training")
