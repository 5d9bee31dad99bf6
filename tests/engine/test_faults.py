"""The third promise: one request can only hurt itself."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
import torch

from quire import AsyncEngine, EngineConfig, SamplingParams
from quire.engine.engine import CorruptedLogits, StepFailed
from quire.errors import EngineDead, InvalidRequest
from quire.request import RequestOutput, RequestOutputKind

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)


@pytest.fixture
def engine(tiny_llama: Path):
    made = AsyncEngine.from_config(EngineConfig(str(tiny_llama), max_model_len=256, num_gpu_blocks_override=64))
    yield made
    made.shutdown()


@pytest.fixture
def slow(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take so long that a request of some tokens is still running after a moment."""
    schedule = engine._engine.scheduler.schedule

    def slowly():
        time.sleep(0.005)
        return schedule()

    monkeypatch.setattr(engine._engine.scheduler, "schedule", slowly)


async def run(engine: AsyncEngine, prompt: list[int], name: str, params: SamplingParams = PARAMS) -> RequestOutput:
    last = None
    async for output in engine.generate(prompt, params, name):
        last = output
    return last


async def settled(engine: AsyncEngine) -> None:
    """Wait until the engine has nothing left to do."""
    for _ in range(500):
        if not engine._engine.has_work() and not engine._readers:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine did not come to rest")


def at_baseline(engine: AsyncEngine) -> bool:
    scheduler = engine._engine.scheduler
    scheduler.pool.check()
    held = (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_held, len(engine._engine._progress))
    return held == (0, 0, 0, 0)


def test_a_poisoned_token_ends_its_own_request_only(engine: AsyncEngine) -> None:
    table = engine._engine._runner.model.model.embed_tokens.weight
    table.data[300] = torch.nan
    params = PARAMS.clone(logit_bias={300: -100.0})  # only a prompt may hold it

    async def scenario() -> None:
        alone = await run(engine, [5, 6, 7], "before", params)
        bad, *good = await asyncio.gather(
            run(engine, [5, 300, 7], "poisoned", params),
            *(run(engine, [5, 6, 7], f"good-{number}", params) for number in range(5)),
            return_exceptions=True,
        )
        assert isinstance(bad, CorruptedLogits)
        assert all(output.outputs[0].token_ids == alone.outputs[0].token_ids for output in good)
        # Blocks that held NaN go to others afterwards, and must not leak into them.
        again = await asyncio.gather(*(run(engine, [5, 6, 7], f"again-{number}", params) for number in range(60)))
        assert {tuple(output.outputs[0].token_ids) for output in again} == {tuple(alone.outputs[0].token_ids)}
        await settled(engine)

    asyncio.run(scenario())
    assert at_baseline(engine)
    assert engine.metrics.value("vllm:corrupted_requests_total") == 1


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine._engine._runner
    working = runner.run

    def broken(step, scored):
        monkeypatch.setattr(runner, "run", working)
        raise MemoryError("no memory for this step")

    async def scenario() -> None:
        expected = await run(engine, [5, 6, 7] * 10, "before")
        monkeypatch.setattr(runner, "run", broken)
        with pytest.raises(StepFailed, match="no memory for this step"):
            await run(engine, [5, 6, 7] * 10, "unlucky")
        assert (await run(engine, [5, 6, 7] * 10, "after")).outputs[0].token_ids == expected.outputs[0].token_ids
        await settled(engine)

    asyncio.run(scenario())
    assert at_baseline(engine)


@pytest.mark.usefixtures("slow")
def test_invalid_requests_raise_before_anything_is_queued(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            await run(engine, [5000], "bad")
        first = asyncio.create_task(run(engine, [5, 6], "same", PARAMS.clone(max_tokens=100)))
        await asyncio.sleep(0.02)
        with pytest.raises(InvalidRequest, match="already in use"):
            await run(engine, [5, 6], "same")
        assert len((await first).outputs[0].token_ids) == 100
        await settled(engine)

    asyncio.run(scenario())
    assert at_baseline(engine)


def test_a_storm_of_aborts_and_vanished_readers_leaves_nothing(engine: AsyncEngine) -> None:
    async def reader(number: int) -> str:
        params = SamplingParams(n=1 + number % 3, seed=number, max_tokens=40, output_kind=RequestOutputKind.DELTA)
        stream = engine.generate([number % 300 + 2] * (number % 50 + 1), params, f"storm-{number}")
        taken = 0
        async for output in stream:
            taken += 1
            if output.finished:
                return output.outputs[0].finish_reason
            if number % 3 == 0 and taken == number % 7:
                await stream.aclose()  # the client went away
                return "left"
            if number % 5 == 0:
                engine.abort(f"storm-{number}")
        return "ended"

    async def scenario() -> None:
        tasks = [asyncio.create_task(reader(number)) for number in range(120)]
        await asyncio.sleep(0.05)
        for task in tasks[1::11]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert "abort" in results
        assert "left" in results
        await settled(engine)

    asyncio.run(scenario())
    assert at_baseline(engine)


@pytest.mark.usefixtures("slow")
def test_after_shutdown_readers_are_told(engine: AsyncEngine) -> None:
    async def scenario() -> None:
        running = asyncio.create_task(run(engine, [5, 6], "running", PARAMS.clone(max_tokens=250)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDead):
            await running
        with pytest.raises(EngineDead):
            await run(engine, [5, 6], "late")

    asyncio.run(scenario())
    assert not engine.heartbeat().alive


@pytest.mark.usefixtures("slow")
def test_an_engine_thread_that_dies_tells_everyone(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("scheduler broke")

    async def scenario() -> None:
        running = asyncio.create_task(run(engine, [5, 6], "running", PARAMS.clone(max_tokens=250)))
        await asyncio.sleep(0.05)
        monkeypatch.setattr(engine._engine.scheduler, "schedule", fail)
        with pytest.raises(EngineDead, match="scheduler broke"):
            await running

    asyncio.run(scenario())
    assert not engine.heartbeat().alive
    engine.abort("running")  # idempotent in every state, this one too
    with pytest.raises(EngineDead, match="scheduler broke"):
        engine.reset_prefix_cache()


def test_a_request_that_breaks_the_queue_ends_alone(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    adding = engine._engine.add

    def add(request) -> None:
        if request.request_id == "odd":
            raise RuntimeError("odd request")
        adding(request)

    async def scenario() -> None:
        monkeypatch.setattr(engine._engine, "add", add)
        with pytest.raises(RuntimeError, match="odd request"):
            await run(engine, [5, 6], "odd")
        assert (await run(engine, [5, 6], "even")).finished
        await settled(engine)

    asyncio.run(scenario())
    assert at_baseline(engine)


def test_an_unknown_model_type_stops_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    from quire.errors import ModelError

    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(ModelError, match="'Unheard' is not supported"):
        AsyncEngine.from_config(EngineConfig(str(tmp_path)))
