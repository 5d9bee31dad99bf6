"""The scenario table: which sampling and deployment values suit which work, and why; and which of several wishes wins.

One table for every door (`quire presets`, `--preset`, `"preset"` in a request, `SamplingParams.preset`). The sampling half
is applied as it stands; the deployment half is a wish that the plan (quire/plan) shrinks to what the machine can hold.
This room knows no model, no machine and no torch; defaults and the model's own values are handed in by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.errors import InvalidRequest, did_you_mean

Range = tuple[float, float]


@dataclass(frozen=True)
class Preset:
    """One row: values to apply, the range in which each may be moved without leaving the scenario, and the reason."""

    name: str
    title: str
    reason: str
    sampling: Mapping[str, float] = field(default_factory=dict)
    deployment: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "reason": self.reason,
            "sampling": dict(self.sampling),
            "deployment": dict(self.deployment),
            "ranges": {key: list(bounds) for key, bounds in self.ranges.items()},
            "aliases": list(self.aliases),
        }

    def departures(self, values: Mapping[str, Any]) -> list[str]:
        """One line for each value that has left this scenario's range; for advice, nothing is refused because of it."""
        return [
            f"{key}={values[key]} is outside the range {_range_text(bounds)} of preset {self.name}"
            for key, bounds in self.ranges.items()
            if isinstance(values.get(key), (int, float)) and not bounds[0] <= values[key] <= bounds[1]
        ]


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="code",
        title="Code and factual questions",
        reason="One answer is right: take the likeliest token. No repetition penalty, since code and names must repeat.",
        sampling={"temperature": 0.0, "repetition_penalty": 1.0},
        ranges={"temperature": (0.0, 0.2), "repetition_penalty": (1.0, 1.0)},
        aliases=("coding", "qa", "factual"),
    ),
    Preset(
        name="summarize",
        title="Summaries and translation",
        reason="Stay near the source with a little freedom of wording; a light penalty stops repeated sentences.",
        sampling={"temperature": 0.3, "repetition_penalty": 1.1},
        ranges={"temperature": (0.2, 0.5), "repetition_penalty": (1.1, 1.1)},
        aliases=("summary", "summarization", "summarisation", "translate", "translation"),
    ),
    Preset(
        name="chat",
        title="General chat and copywriting",
        reason="Natural variety without the unlikely tail; 4096 tokens hold a conversation and keep the KV cache small.",
        sampling={"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
        deployment={"max_model_len": 4096},
        ranges={"temperature": (0.7, 0.7), "top_p": (0.9, 0.9), "repetition_penalty": (1.1, 1.2)},
        aliases=("general", "assistant", "copywriting"),
    ),
    Preset(
        name="creative",
        title="Creative writing and brainstorming",
        reason="Surprise is wanted: sample the model's own distribution and cut only the last 5 % of probability.",
        sampling={"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.0},
        ranges={"temperature": (0.8, 1.2), "top_p": (0.95, 0.95), "repetition_penalty": (1.0, 1.0)},
        aliases=("writing", "brainstorm", "brainstorming"),
    ),
    Preset(
        name="throughput",
        title="High-concurrency throughput",
        reason="Weights are read once a step for all sequences, so run many; short sequences leave blocks for more of them.",
        deployment={"gpu_memory_utilization": 0.92, "max_num_seqs": 512, "max_model_len": 2048},
        ranges={"gpu_memory_utilization": (0.90, 0.95), "max_num_seqs": (256, 1024)},
        aliases=("high-throughput", "high-concurrency", "batch"),
    ),
    Preset(
        name="low-latency",
        title="Low-latency interaction",
        reason="Few sequences share a step and prefill chunks stay short, so the next token of each comes soon.",
        deployment={"gpu_memory_utilization": 0.90, "max_num_seqs": 32, "max_num_batched_tokens": 512},
        ranges={"gpu_memory_utilization": (0.90, 0.90), "max_num_seqs": (16, 64), "max_num_batched_tokens": (256, 1024)},
        aliases=("latency", "interactive", "realtime"),
    ),
    Preset(
        name="memory",
        title="Memory-constrained machine",
        reason="Leave a fifth of the free memory to others; few short sequences and small chunks need little of the rest.",
        deployment={
            "gpu_memory_utilization": 0.80,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "max_model_len": 2048,
        },
        ranges={"gpu_memory_utilization": (0.80, 0.80), "max_num_seqs": (1, 16), "max_num_batched_tokens": (128, 512)},
        aliases=("low-memory", "memory-constrained", "small"),
    ),
)

_BY_NAME: dict[str, Preset] = {name: row for row in PRESETS for name in (row.name, *row.aliases)}


def names() -> list[str]:
    """The scenarios' own names, in the table's order."""
    return [row.name for row in PRESETS]


def find(name: str) -> Preset:
    """The row of that name or alias; case and `_` for `-` do not matter. Raises InvalidRequest."""
    row = _BY_NAME.get(name.strip().lower().replace("_", "-")) if isinstance(name, str) else None
    if row is None:
        hint = did_you_mean(str(name), _BY_NAME)
        raise InvalidRequest(f"preset must be one of {', '.join(names())}, got {name!r}.{hint}", parameter="preset", value=name)
    return row


def sampling_of(name: str) -> dict[str, Any]:
    """Sampling values of a preset, to be laid under a request's own; empty for a scenario that is only about deployment."""
    return dict(find(name).sampling)


def deployment_of(name: str) -> dict[str, Any]:
    """Engine options of a preset; the plan may lower them to what fits."""
    return dict(find(name).deployment)


# Strongest first. A request's own preset is the request's wish, so it stands above what the server was started with.
SOURCES = ("request", "request preset", "flag", "preset", "generation_config", "default")


@dataclass(frozen=True)
class Resolved:
    """The value in force, which of SOURCES it came from, and the weaker wishes that it beat."""

    value: Any
    source: str
    beaten: tuple[tuple[str, Any], ...] = ()


def resolve(
    *,
    request: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    preset: str | None = None,
    generation_config: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Resolved]:
    """Value and source of every parameter: request > flag > preset > generation_config > default.

    None means "not said" in every layer but the last. `request` may itself hold "preset". Works for sampling and for
    engine options alike, as both halves of a preset are laid in; names that only one side knows do no harm to the other.
    """
    request = dict(request or {})
    request_preset = request.pop("preset", None)
    layers: list[Mapping[str, Any]] = [
        request,
        sampling_of(request_preset) if request_preset is not None else {},
        flags or {},
        {**sampling_of(preset), **deployment_of(preset)} if preset is not None else {},
        generation_config or {},
    ]
    defaults = defaults or {}
    resolved = {}
    for key in _union(defaults, *layers):
        said = [(source, layer[key]) for source, layer in zip(SOURCES, layers, strict=False) if layer.get(key) is not None]
        if key in defaults:
            said.append((SOURCES[-1], defaults[key]))
        if said:
            resolved[key] = Resolved(value=said[0][1], source=said[0][0], beaten=tuple(said[1:]))
    return resolved


def _union(*layers: Iterable[str]) -> list[str]:
    """All keys in order of first appearance."""
    return list(dict.fromkeys(key for layer in layers for key in layer))


def _range_text(bounds: Range) -> str:
    low, high = bounds
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# generation_config.json's names for what SamplingParams can take.
_GENERATION_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def recommended_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's generation_config.json recommends, under SamplingParams' names."""
    found = {name: generation_config.get(theirs) for theirs, name in _GENERATION_NAMES.items()}
    return {name: value for name, value in found.items() if value is not None}
