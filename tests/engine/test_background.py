"""Work between steps: done once on the engine's thread, or again and again while there is more, without harm to requests."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from quire.errors import EngineDead
from quire.request import SamplingParams


@pytest.fixture
def engine(tiny_llama: Path) -> AsyncEngine:
    config = EngineConfig(model=str(tiny_llama), dtype="float32", max_num_seqs=4, num_gpu_blocks_override=64)
    made = AsyncEngine.from_config(config)
    yield made
    made.shutdown()


async def _answer(engine: AsyncEngine, id: str) -> list[int]:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    last = None
    async for output in engine.generate([5, 6, 7], params, id):
        last = output
    assert last is not None
    return list(last.outputs[0].token_ids)


def test_once_between_steps(engine: AsyncEngine) -> None:
    assert engine.between_steps(lambda: threading.current_thread().name).result(10) == "quire-engine"

    def fail() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        engine.between_steps(fail).result(10)
    engine.shutdown()
    with pytest.raises(EngineDead):
        engine.between_steps(lambda: 1).result(10)


def test_background_runs_when_idle_and_between_steps_and_then_sleeps(engine: AsyncEngine) -> None:
    plain = asyncio.run(_answer(engine, "a"))
    seen: list[bool] = []
    left = 50
    idle = threading.Event()

    def work(busy: bool) -> bool:
        nonlocal left
        seen.append(busy)
        left -= 1
        if left <= 0:
            idle.set()
        return left > 0

    engine.set_background(work)
    assert idle.wait(10), "an idle engine does all of it without being asked again"
    assert not any(seen)
    calls = len(seen)
    assert asyncio.run(_answer(engine, "b")) == plain
    assert any(seen[calls:]), "it is also called between steps, and told that requests run"
    assert len(seen) <= calls + 20, "work that has no more to do is not called in a hurry"
    before = len(seen)
    engine.wake()
    engine.between_steps(lambda: None).result(10)
    assert len(seen) > before


def test_failing_background_ends_alone(engine: AsyncEngine) -> None:
    plain = asyncio.run(_answer(engine, "a"))

    def fail(busy: bool) -> bool:
        raise RuntimeError("training broke")

    engine.set_background(fail)
    engine.between_steps(lambda: None).result(10)
    assert asyncio.run(_answer(engine, "b")) == plain
    assert engine.heartbeat().alive
