"""The scenario table holds the numbers that were promised, and precedence is as stated."""

from __future__ import annotations

import pytest

from quire import presets
from quire.errors import InvalidRequest
from quire.request import SamplingParams

# name: (sampling values, ranges) as the specification gives them
SAMPLING = {
    "code": ({"temperature": 0.0, "repetition_penalty": 1.0}, {"temperature": (0.0, 0.2), "repetition_penalty": (1.0, 1.0)}),
    "summarize": (
        {"temperature": 0.3, "repetition_penalty": 1.1},
        {"temperature": (0.2, 0.5), "repetition_penalty": (1.1, 1.1)},
    ),
    "chat": ({"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}, {"repetition_penalty": (1.1, 1.2)}),
    "creative": ({"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.0}, {"temperature": (0.8, 1.2)}),
    "throughput": ({}, {"gpu_memory_utilization": (0.90, 0.95)}),
    "low-latency": ({}, {"max_num_seqs": (16, 64)}),
    "memory": ({}, {"gpu_memory_utilization": (0.80, 0.80)}),
}


def test_seven_scenarios_with_the_promised_values() -> None:
    assert presets.names() == list(SAMPLING)
    for name, (values, ranges) in SAMPLING.items():
        assert presets.sampling_of(name) == values, name
        row = presets.find(name)
        assert ranges.items() <= row.ranges.items(), name
        assert row.reason
        assert row.title


def test_deployment_halves() -> None:
    assert presets.deployment_of("chat") == {"max_model_len": 4096}
    throughput, latency, memory = (presets.deployment_of(name) for name in ("throughput", "low-latency", "memory"))
    assert 0.90 <= throughput["gpu_memory_utilization"] <= 0.95
    assert throughput["max_num_seqs"] > 256
    assert latency["gpu_memory_utilization"] == 0.9
    assert 16 <= latency["max_num_seqs"] <= 64
    assert memory["gpu_memory_utilization"] == 0.8
    assert memory["max_num_seqs"] <= 16
    assert all(presets.deployment_of(name) == {} for name in ("code", "summarize", "creative"))


@pytest.mark.parametrize("row", presets.PRESETS, ids=lambda row: row.name)
def test_every_value_lies_in_its_own_range_and_is_valid(row: presets.Preset) -> None:
    assert row.departures({**row.sampling, **row.deployment}) == []
    SamplingParams(**row.sampling)
    for bounds in row.ranges.values():
        assert bounds[0] <= bounds[1]


@pytest.mark.parametrize(
    "alias, name", [("qa", "code"), ("translation", "summarize"), ("Low_Latency", "low-latency"), (" chat ", "chat")]
)
def test_aliases(alias: str, name: str) -> None:
    assert presets.find(alias).name == name


def test_names_and_aliases_are_unique() -> None:
    spoken = [name for row in presets.PRESETS for name in (row.name, *row.aliases)]
    assert len(spoken) == len(set(spoken))


@pytest.mark.parametrize("wrong", ["creativ", "", "../x", None, 3])
def test_unknown_name_is_a_bad_request(wrong: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        presets.sampling_of(wrong)  # type: ignore[arg-type]
    assert caught.value.parameter == "preset"
    assert "low-latency" in str(caught.value)
    if wrong == "creativ":
        assert 'Did you mean "creative"?' in str(caught.value)


def test_sampling_params_of_a_preset() -> None:
    params = SamplingParams.preset("chat", max_tokens=5, top_p=0.5)
    assert (params.temperature, params.top_p, params.repetition_penalty, params.max_tokens) == (0.7, 0.5, 1.1, 5)


def test_precedence_every_layer_beats_the_ones_below() -> None:
    layers = {
        "request": {"request": {"temperature": 0.11}},
        "request preset": {"request": {"preset": "creative"}},
        "flag": {"flags": {"temperature": 0.33}},
        "preset": {"preset": "chat"},
        "generation_config": {"generation_config": {"temperature": 0.55}},
        "default": {"defaults": {"temperature": 0.66}},
    }
    values = {"request": 0.11, "request preset": 1.0, "flag": 0.33, "preset": 0.7, "generation_config": 0.55, "default": 0.66}
    assert tuple(layers) == presets.SOURCES
    for first in range(len(layers)):
        given: dict[str, dict] = {}
        for name in presets.SOURCES[first:]:
            for key, value in layers[name].items():
                given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
        found = presets.resolve(**given)["temperature"]
        assert (found.source, found.value) == (presets.SOURCES[first], values[presets.SOURCES[first]])
        assert [source for source, _ in found.beaten] == list(presets.SOURCES[first + 1 :])


def test_none_means_not_said() -> None:
    found = presets.resolve(
        request={"temperature": None}, flags={"seed": None}, preset="code", defaults={"temperature": 1.0, "seed": None}
    )
    assert (found["temperature"].value, found["temperature"].source) == (0.0, "preset")
    assert (found["seed"].value, found["seed"].source) == (None, "default")


def test_a_zero_is_a_value() -> None:
    assert presets.resolve(request={"temperature": 0.0}, preset="creative")["temperature"].value == 0.0


def test_recommended_sampling_takes_known_names_only() -> None:
    raw = {"temperature": 0.6, "top_p": None, "max_new_tokens": 12, "do_sample": True, "eos_token_id": 2}
    assert presets.recommended_sampling(raw) == {"temperature": 0.6, "max_tokens": 12}
