"""One real engine with few blocks for all tests of the server, and a server over it with default options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def engine(tiny_llama: Path) -> Iterator[AsyncEngine]:
    config = EngineConfig(
        model=str(tiny_llama), dtype="float32", max_num_seqs=8, max_num_batched_tokens=64, num_gpu_blocks_override=96
    )
    made = AsyncEngine.from_config(config)
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def trainer_engine(tiny_llama: Path) -> Iterator[AsyncEngine]:
    """An engine that serves adapters, for servers that train."""
    config = EngineConfig(
        model=str(tiny_llama),
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=96,
        enable_lora=True,
        max_loras=3,
        max_cpu_loras=4,
    )
    made = AsyncEngine.from_config(config)
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def server(engine: AsyncEngine) -> Iterator[RunningServer]:
    with RunningServer(engine, served_model_name=("tiny", "other-name")) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
