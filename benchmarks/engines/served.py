"""A workload through an HTTP server: all requests of a run as streams at the same time, from this process.

The client is `quire bench serve`'s. A server's start is timed from its process to the first token of a first request.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engines.checkpoints import REPOSITORY
from benchmarks.engines.llama import free_port
from benchmarks.engines.processes import Failed, Running, TooSlow
from quire.cli.bench_data import Asked
from quire.cli.bench_http import Sent, Server
from quire.cli.bench_serve import Load, send_all, timed_of
from quire.errors import Unavailable

Prompts = list[list[int]]
ENDPOINT = "/v1/completions"
GREEDY = {"temperature": 0, "ignore_eos": True}


def measure(
    command: Callable[[int], list[str]],
    environment: dict[str, str],
    log: Path,
    runs: list[Prompts],
    output: int,
    first_prompt: list[int],
    *,
    warm_tokens: int,
    load_seconds: float,
    limit: float,
    started: Callable[[float], None],
    keep: Callable[[dict[str, Any]], None],
) -> int:
    """Start a server, send it every run (the first is not counted), end it; gives its peak of memory in MiB.

    `started` gets the seconds from the process to the first token, `keep` each counted run's numbers.
    """
    port = free_port()
    with Running(command(port), environment, REPOSITORY, log) as process:
        return asyncio.run(
            _measured(process, port, runs, output, first_prompt, warm_tokens, load_seconds, limit, started, keep)
        )


async def _measured(
    process: Running,
    port: int,
    runs: list[Prompts],
    output: int,
    first_prompt: list[int],
    warm_tokens: int,
    load_seconds: float,
    limit: float,
    started: Callable[[float], None],
    keep: Callable[[dict[str, Any]], None],
) -> int:
    server = Server(f"http://127.0.0.1:{port}")
    try:
        try:
            async with asyncio.timeout(load_seconds):
                load = await first_token(process, server, first_prompt)
        except TimeoutError:
            raise TooSlow(f"did not load within {load_seconds:.0f} s") from None
        started(round(time.monotonic() - process.began, 2))
        async with asyncio.timeout(limit):
            await _run(server, load, runs[0], min(warm_tokens, output))
            for prompts in runs[1:]:
                keep(await _run(server, load, prompts, output))
        return process.peak_mib()
    except TimeoutError:
        raise TooSlow from None
    finally:
        await server.close()


async def first_token(process: Running, server: Server, prompt: list[int]) -> Load:
    """Ask until it answers."""
    while True:
        if process.process.poll() is not None:
            raise Failed(f"the server has ended: {process.last_words()}")
        try:
            load = Load(ENDPOINT, (await server.models())[0], extra=GREEDY)
            sent = await server.stream(ENDPOINT, load.body(Asked(prompt, 1)))
        except (Unavailable, IndexError):
            await asyncio.sleep(0.05)
            continue
        if sent.error is not None:
            raise Failed(sent.error)
        return load


async def _run(server: Server, load: Load, prompts: Prompts, output: int) -> dict[str, Any]:
    sent, seconds = await send_all(server, [Asked(prompt, output) for prompt in prompts], load)
    _all_well(sent, output)
    timed = [timed_of(one) for one in sent]
    gaps = [one.tpot for one in timed if one.tpot is not None]
    return {
        "seconds": seconds,
        "tokens": sum(one.output_tokens for one in timed),
        "ttft_ms": 1e3 * statistics.fmean(one.ttft for one in timed),
        "itl_ms": 1e3 * statistics.fmean(gaps) if gaps else None,
    }


def _all_well(sent: list[Sent], output: int) -> None:
    for one in sent:
        if one.error is not None:
            raise Failed(one.error)
        if one.output_tokens not in (0, output):
            raise Failed(f"gave {one.output_tokens} tokens instead of {output}")
