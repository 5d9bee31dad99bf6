"""What a client may ask of a fine-tuning job: names, ranges, and what "auto" becomes once the data is known.

Everything here is checked before a job exists. Knows no HTTP, no store and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from quire.errors import AdapterError, ConfigError, InvalidRequest, did_you_mean
from quire.lora.config import LoraConfig
from quire.plan.training import PIECE_TOKENS
from quire.train.config import TrainingConfig

AUTO = "auto"
METHODS = ("supervised", "dpo")
MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512
MAX_SEED = 2**31 - 1
BASE_LEARNING_RATE = 2e-4
"""What a learning_rate_multiplier of 1 stands for, if `lora.learning_rate` does not say it."""
FEW_ROWS = 10_000
MICRO_BATCH_TOKENS = PIECE_TOKENS
"""Tokens that go through the model at once, unless `lora.micro_batch_tokens` says otherwise: fewer than `quire train` takes,
because a piece of training is what a request may have to wait for."""

# What a job's own fields say, or what has no meaning here: not to be said again under `lora`.
_ELSEWHERE = {
    "method": "method.type",
    "beta": "method.dpo.hyperparameters.beta",
    "num_train_epochs": "hyperparameters n_epochs",
    "per_device_train_batch_size": "hyperparameters batch_size",
    "gradient_accumulation_steps": "hyperparameters batch_size",
    "seed": "seed",
}
_NOT_SAID = ("lora", "logging_steps", *_ELSEWHERE)
EXTENSION_KEYS = tuple(
    dict.fromkeys(
        name
        for name in (*(f.name for f in fields(TrainingConfig)), *(f.name for f in fields(LoraConfig)))
        if name not in (*_NOT_SAID, "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "target_parameters")
    )
)
"""What may stand under `lora`: an adapter's fields in PEFT's names, a run's settings in those of transformers."""

_SUFFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class JobRequest:
    """One job as asked for; plain values throughout, so that it is kept as JSON.

    hyperparameters: n_epochs, batch_size, learning_rate_multiplier and, of dpo, beta; each a number or "auto".
    lora: further settings, the keys of EXTENSION_KEYS.
    """

    model: str
    training_file: str
    validation_file: str | None = None
    method: str = "supervised"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    integrations: tuple[Mapping[str, Any], ...] = ()
    lora: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def job_request(body: Mapping[str, Any]) -> JobRequest:
    """The request in `body`, whose outer types are right. Raises InvalidRequest that names the field by its path."""
    method, hyperparameters = _method(body.get("method"), body.get("hyperparameters"))
    _check_suffix(body.get("suffix"))
    seed = body.get("seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"seed must be in [0, {MAX_SEED}], got {seed}.", parameter="seed")
    request = JobRequest(
        model=body["model"],
        training_file=body["training_file"],
        validation_file=body.get("validation_file"),
        method=method,
        hyperparameters=hyperparameters,
        suffix=body.get("suffix"),
        seed=seed,
        metadata=_metadata(body.get("metadata")),
        integrations=_integrations(body.get("integrations") or []),
        lora=_extension(body.get("lora") or {}),
    )
    _check_run(request)
    return request


def _method(method: Mapping[str, Any] | None, older: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """(kind, hyperparameters): `method` wins over the older field at the top."""
    kind, place, values = "supervised", "hyperparameters", dict(older or {})
    if method is not None:
        kind = method.get("type", "supervised")
        if kind == "reinforcement":
            raise InvalidRequest(
                "method.type 'reinforcement' is not supported: use supervised or dpo.", parameter="method.type"
            )
        _one_of("method.type", kind, METHODS)
        _known("method", method, ("type", *METHODS))
        own = method.get(kind)
        if own is not None:
            _object(f"method.{kind}", own)
            _known(f"method.{kind}", own, ("hyperparameters",))
            if own.get("hyperparameters") is not None:
                place, values = f"method.{kind}.hyperparameters", own["hyperparameters"]
    _object(place, values)
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", *(("beta",) if kind == "dpo" else ()))
    _known(place, values, names)
    made = {name: AUTO if values.get(name) is None else values[name] for name in names}
    _whole_or_auto(f"{place}.n_epochs", made["n_epochs"], 1, 50)
    _whole_or_auto(f"{place}.batch_size", made["batch_size"], 1, 256)
    _number_or_auto(f"{place}.learning_rate_multiplier", made["learning_rate_multiplier"], 1000.0)
    if kind == "dpo":
        _number_or_auto(f"{place}.beta", made["beta"], 2.0)
    return kind, made


def resolved(asked: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The hyperparameters with a number in place of every "auto", for a file of so many rows."""
    auto = {
        "n_epochs": 3 if rows <= FEW_ROWS else 2 if rows <= 3 * FEW_ROWS else 1,
        "batch_size": max(1, min(32, round(rows * 0.002))),
        "learning_rate_multiplier": 1.0,
        "beta": 0.1,
    }
    return {name: auto[name] if value == AUTO else value for name, value in asked.items()}


def training_config(request: JobRequest, hyperparameters: Mapping[str, Any], seed: int) -> TrainingConfig:
    """The run that a request describes. Raises ConfigError, AdapterError."""
    peft = {name: value for name, value in request.lora.items() if name not in TrainingConfig.__dataclass_fields__}
    own = {name: value for name, value in request.lora.items() if name not in peft}
    own.setdefault("micro_batch_tokens", MICRO_BATCH_TOKENS)
    rate = own.pop("learning_rate", BASE_LEARNING_RATE)
    if type(rate) in (int, float):  # what is no number is told by the run's own check
        rate *= hyperparameters["learning_rate_multiplier"]
    if request.method == "dpo":
        own["beta"] = hyperparameters["beta"]
    return TrainingConfig.of(
        **own,
        lora=peft,
        method=request.method,
        num_train_epochs=hyperparameters["n_epochs"],
        per_device_train_batch_size=hyperparameters["batch_size"],
        learning_rate=rate,
        seed=seed,
    )


def _extension(given: Mapping[str, Any]) -> dict[str, Any]:
    _object("lora", given)
    for name in given:
        if name in _ELSEWHERE:
            raise InvalidRequest(f"lora.{name} is said elsewhere: give {_ELSEWHERE[name]}.", parameter=f"lora.{name}")
    _known("lora", given, EXTENSION_KEYS)
    return {name: value for name, value in given.items() if value is not None}


def _check_run(request: JobRequest) -> None:
    """Ranges are the run's own; its errors begin with the field, which is found under `lora` here."""
    try:
        training_config(request, resolved(request.hyperparameters, 1), 0)
    except (ConfigError, AdapterError, TypeError, ValueError) as error:
        first = str(error).split(" ")[0].split("[")[0]
        place = f"lora.{first}" if first in EXTENSION_KEYS else "lora"
        prefix = "lora." if first in EXTENSION_KEYS else ""
        raise InvalidRequest(f"{prefix}{error}", parameter=place) from None


def _metadata(given: Mapping[str, Any] | None) -> dict[str, str] | None:
    if given is None:
        return None
    if len(given) > MAX_PAIRS:
        raise InvalidRequest(f"metadata may have {MAX_PAIRS} pairs, got {len(given)}.", parameter="metadata")
    for key, value in given.items():
        if not 1 <= len(key) <= MAX_KEY:
            raise InvalidRequest(f"metadata keys must have 1 to {MAX_KEY} characters, got {len(key)}.", parameter="metadata")
        if not isinstance(value, str) or len(value) > MAX_VALUE:
            raise InvalidRequest(
                f"metadata[{key!r}] must be a string of at most {MAX_VALUE} characters.", parameter=f"metadata.{key}"
            )
    return dict(given)


def _integrations(given: Iterable[Any]) -> tuple[Mapping[str, Any], ...]:
    """Accepted as none only: nothing leaves this machine, and silence would look like success."""
    if list(given):
        raise InvalidRequest(
            "integrations are not supported: metrics are in the job's events and result file.", parameter="integrations"
        )
    return ()


def _check_suffix(suffix: str | None) -> None:
    if suffix is not None and not _SUFFIX.fullmatch(suffix):
        raise InvalidRequest(
            f"suffix must have 1 to 64 letters, digits or any of _.- and is part of the model's name, got {suffix[:80]!r}.",
            parameter="suffix",
        )


def _known(place: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in given:
        if name not in set(names):
            shown = str(name)[:100]
            raise InvalidRequest(
                f"unknown field '{place}.{shown}'; known are {', '.join(names)}.{did_you_mean(shown, names)}",
                parameter=f"{place}.{shown}",
            )


def _object(place: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{place} must be an object.", parameter=place, value=value)


def _one_of(place: str, value: Any, names: tuple[str, ...]) -> None:
    if value not in names:
        raise InvalidRequest(f"{place} must be one of {', '.join(names)}, got {str(value)[:80]!r}.", parameter=place)


def _whole_or_auto(place: str, value: Any, low: int, high: int) -> None:
    if value != AUTO and (type(value) is not int or not low <= value <= high):
        raise InvalidRequest(f"{place} must be 'auto' or a whole number in [{low}, {high}], got {value!r}.", parameter=place)


def _number_or_auto(place: str, value: Any, high: float) -> None:
    if value != AUTO and (type(value) not in (int, float) or not 0 < value <= high):
        raise InvalidRequest(f"{place} must be 'auto' or a number in (0, {high:g}], got {value!r}.", parameter=place)
