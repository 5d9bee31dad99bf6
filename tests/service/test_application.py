"""Stages, health, names and the laying over each other of sampling values, with a stand-in for the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.errors import NotFound, Unavailable
from quire.metrics import Metrics
from quire.service.application import Application
from quire.service.generation import merged
from quire.service.lifecycle import Lifecycle, Stage
from quire.service.limits import Limits
from quire.service.prepare import sampling_values
from quire.service.requests import TextRequest


class StandIn:
    """What health and names ask of an engine."""

    def __init__(self, **config: Any) -> None:
        self.config = EngineConfig(**{"model": "org/name", **config})
        self.metrics = Metrics("org/name")
        self.adapters = None
        self.default_sampling = {"temperature": 0.6, "top_p": 0.8, "top_k": 20}
        self.signs = SimpleNamespace(alive=True, running=0, waiting=0, steps=0, age_s=0.0, backlog_tokens=0)

    def heartbeat(self) -> Any:
        return self.signs


def test_stages_only_go_forward() -> None:
    life = Lifecycle()
    with pytest.raises(Unavailable, match="loading"):
        life.check_open()
    assert life.advance(Stage.READY)
    life.check_open()
    assert life.advance(Stage.DRAINING)
    assert not life.advance(Stage.READY)
    life.check_open()
    life.close_door()
    with pytest.raises(Unavailable, match="shutting down"):
        life.check_open()


def test_health() -> None:
    now = [0.0]
    application = Application(Limits(stall_seconds=10), clock=lambda: now[0])
    assert application.failing() == ["loading"]
    assert application.alive()
    engine = StandIn()
    application.attach(engine)
    assert application.failing() == []
    now[0] += 1000
    assert application.failing() == [], "idle is healthy"
    engine.signs.running = 3
    engine.signs.steps = 5
    assert application.failing() == []
    now[0] += 9
    assert application.failing() == [], "one long step is not a stall yet"
    now[0] += 2
    assert application.failing() == ["stalled"]
    engine.signs.steps = 6
    assert application.failing() == []
    engine.signs.running, engine.signs.age_s = 0, 11.0
    assert application.failing() == ["stalled"], "a first step that never ends has no count yet"
    engine.signs.age_s = 0.5
    assert application.failing() == []
    application.lifecycle.advance(Stage.DRAINING)
    assert application.failing() == ["draining"]
    engine.signs.alive = False
    assert not application.alive()


def test_a_dead_engine_is_not_ready() -> None:
    application = Application(Limits())
    engine = StandIn()
    application.attach(engine)
    engine.signs.alive = False
    assert application.failing() == ["engine"]


def test_names() -> None:
    application = Application(Limits())
    with pytest.raises(Unavailable):
        application.check_model("x")
    application.attach(StandIn())
    assert application.check_model(None) == application.check_model("org/name") == "org/name"
    with pytest.raises(NotFound, match="`x` does not exist"):
        application.check_model("x")
    named = Application(Limits(), ("a", "b"))
    named.attach(StandIn())
    assert named.check_model("b") == "a"
    with pytest.raises(NotFound):
        named.check_model("org/name")


def test_refusals_are_counted() -> None:
    engine = StandIn()
    application = Application(Limits(max_num_queued_reqs=1))
    application.attach(engine)
    application.arrive()
    for reason in ("queued_requests", "draining"):
        with pytest.raises(Unavailable):
            application.arrive()
        assert engine.metrics.value("vllm:admission_rejections_total", reason=reason) == 1
        application.lifecycle.advance(Stage.DRAINING)
        application.lifecycle.close_door()


def test_precedence_of_sampling_values() -> None:
    engine = StandIn(preset="chat", override_generation_config={"temperature": 0.5})

    def values(preset: str | None = None, **sampling: Any) -> dict[str, Any]:
        found = sampling_values(TextRequest("r", prompts=("a",), sampling=sampling, preset=preset), engine)
        return {name: found.get(name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}

    chat = {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    assert values() == chat, "flag over preset over generation_config"
    assert values(temperature=0.1) == {**chat, "temperature": 0.1}
    assert values("creative") == {"temperature": 1.0, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.0}
    assert values("creative", top_p=0.2)["top_p"] == 0.2


async def _count(upto: int, closed: list[int], error: bool = False) -> AsyncIterator[int]:
    try:
        for number in range(upto):
            await asyncio.sleep(0.001)
            yield number
        if error:
            raise ValueError("broken")
    finally:
        closed.append(upto)


def test_merging_keeps_each_streams_order_and_closes_all() -> None:
    async def run() -> None:
        closed: list[int] = []
        seen = [item async for item in merged([_count(5, closed), _count(100, closed)])]
        for index, upto in ((0, 5), (1, 100)):
            assert [number for which, number in seen if which == index] == list(range(upto))
        assert sorted(closed) == [5, 100]
        closed.clear()
        with pytest.raises(ValueError, match="broken"):
            async for _ in merged([_count(3, closed, error=True), _count(10_000, closed)]):
                pass
        assert sorted(closed) == [3, 10_000]
        closed.clear()
        merging = merged([_count(1000, closed), _count(2000, closed)])
        async for _ in merging:
            break
        await merging.aclose()
        assert sorted(closed) == [1000, 2000]

    asyncio.run(run())
