"""`quire bench serve`: sends requests to a server at a given rate and reports times and rates, in vLLM's names."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire import envs
from quire.cli.bench_data import Asked, file_requests, random_requests
from quire.cli.bench_metrics import (
    TITLES,
    Timed,
    arrival_times,
    read_metrics,
    read_percentiles,
    read_promises,
    summary,
)
from quire.cli.command import SectionedCommand, SectionedOption
from quire.cli.flags import JsonObject
from quire.errors import ConfigError, Unavailable
from quire.log import progress

if TYPE_CHECKING:
    from quire.cli.bench_http import Sent

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
WIDTH = 50


@dataclass(frozen=True)
class Load:
    """How requests are sent. rate: requests a second; most: requests at the same time, None for any number."""

    endpoint: str
    model: str
    rate: float = math.inf
    burstiness: float = 1.0
    most: int | None = None
    seed: int = 0
    extra: dict[str, Any] | None = None

    def body(self, asked: Asked) -> dict[str, Any]:
        chat = self.endpoint.endswith("/chat/completions")
        prompt = {"messages": [{"role": "user", "content": asked.prompt}]} if chat else {"prompt": asked.prompt}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": asked.output,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(self.extra or {}),
        }


async def send_all(
    server: Any, requests: list[Asked], load: Load, advance: Callable[[int], None] = lambda amount: None
) -> tuple[list[Sent], float]:
    """What came back for each request, and the seconds that it took together."""
    room = asyncio.Semaphore(load.most) if load.most else None
    begin = time.perf_counter()

    async def one(asked: Asked, after: float) -> Sent:
        await asyncio.sleep(max(0.0, begin + after - time.perf_counter()))
        if room is None:
            sent: Sent = await server.stream(load.endpoint, load.body(asked))
        else:
            async with room:
                sent = await server.stream(load.endpoint, load.body(asked))
        advance(1)
        return sent

    times = arrival_times(len(requests), load.rate, load.burstiness, random.Random(load.seed))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(asked, after)) for asked, after in zip(requests, times, strict=True)]
    return [task.result() for task in tasks], time.perf_counter() - begin


def timed_of(sent: Sent) -> Timed:
    """A request that was answered, for the metrics. Without usage in the stream an event counts as one token."""
    return Timed(sent.began, tuple(sent.arrivals), sent.prompt_tokens, sent.output_tokens or len(sent.arrivals))


def _option(*names: str, section: str, **options: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=SectionedOption, section=section, show_default="default" in options, **options)


COUNT, POSITIVE = click.IntRange(min=0), click.IntRange(min=1)


class SpreadingCommand(SectionedCommand):
    """Takes `--goodput ttft:200 tpot:50` as vLLM does, although no positional argument comes first."""

    def spread(self, args: list[str]) -> list[str]:
        return super().spread(["serve", *args])[1:]


@click.command("serve", cls=SpreadingCommand)
@_option("--base-url", section="Server", help="Where the server is. [default: http://HOST:PORT]")
@_option("--host", default="127.0.0.1", section="Server", help="Its host.")
@_option("--port", type=click.IntRange(1, 65535), default=8000, section="Server", help="Its port.")
@_option("--backend", type=click.Choice(list(ENDPOINTS)), default="openai", section="Server", help="Completions or chat.")
@_option("--endpoint", section="Server", help="Path of the API. [default: the backend's]")
@_option("--model", section="Server", help="Name of the model there. [default: the server's first]")
@_option("--api-key", section="Server", help="The server's key. [default: QUIRE_API_KEY]")
@_option("--ready-check-timeout-sec", type=COUNT, default=0, section="Server", help="Wait so long for it to be ready.")
@_option("--dataset-name", type=click.Choice(["random", "custom"]), default="random", section="Requests", help="Prompts.")
@_option("--dataset-path", type=click.Path(path_type=Path), section="Requests", help='custom: lines of {"prompt": ...}.')
@_option("--num-prompts", type=POSITIVE, default=1000, section="Requests", help="Requests to send.")
@_option("--num-warmups", type=COUNT, default=0, section="Requests", help="Requests before them that are not counted.")
@_option("--random-input-len", type=POSITIVE, default=1024, section="Requests", help="Tokens in.")
@_option("--random-output-len", type=POSITIVE, default=128, section="Requests", help="Tokens out.")
@_option("--random-prefix-len", type=COUNT, default=0, section="Requests", help="Further tokens in, the same in all requests.")
@_option("--random-range-ratio", type=float, default=0.0, section="Requests", help="Lengths vary by this share, in [0, 1).")
@_option("--custom-output-len", type=POSITIVE, default=256, section="Requests", help="custom: tokens out, by default.")
@_option("--ignore-eos", is_flag=True, section="Requests", help="An end token ends nothing. On for random prompts.")
@_option("--temperature", type=float, section="Requests", help="Sampling temperature. [default: the server's]")
@_option("--top-p", type=float, section="Requests", help="Sampling top_p. [default: the server's]")
@_option("--top-k", type=int, section="Requests", help="Sampling top_k. [default: the server's]")
@_option("--min-p", type=float, section="Requests", help="Sampling min_p. [default: the server's]")
@_option("--extra-body", type=JsonObject(), section="Requests", help="Further fields of every request, as a JSON object.")
@_option("--request-rate", type=float, default=math.inf, section="Load", help="Requests a second; inf sends all at once.")
@_option("--burstiness", type=float, default=1.0, section="Load", help="1 is a Poisson process, less comes in bursts.")
@_option("--max-concurrency", type=POSITIVE, section="Load", help="Most requests at a time.")
@_option("--seed", type=int, default=0, section="Load", help="Of prompts and times.")
@_option("--goodput", multiple=True, section="Report", help="Promises in ms: --goodput ttft:200 tpot:50 e2el:2000.")
@_option("--percentile-metrics", default="ttft,tpot,itl", section="Report", help="Which of ttft, tpot, itl, e2el.")
@_option("--metric-percentiles", default="99", section="Report", help="Which percentiles, as 50,99.")
@_option("--save-result", is_flag=True, section="Report", help="Write the numbers to a JSON file.")
@_option("--save-detailed", is_flag=True, section="Report", help="Also those of every request.")
@_option("--result-dir", type=click.Path(path_type=Path), section="Report", help="Its folder. [default: here]")
@_option("--result-filename", section="Report", help="Its name. [default: BACKEND-RATEqps-MODEL-TIME.json]")
@_option("--metadata", multiple=True, section="Report", help="KEY=VALUE to keep in the file.")
@_option("--label", section="Report", help="A name for the run in the file. [default: the backend]")
@_option("--disable-tqdm", is_flag=True, section="Report", help="No progress bar.")
def command(**values: Any) -> None:
    """Measure a running server that speaks OpenAI's API: Quire's own, vLLM's or another's.

    Random prompts are sent as token ids, so no tokenizer is needed; openai-chat gets random words instead, about one for a
    token. Metrics, flags and the JSON file's keys are those of `vllm bench serve`.
    """
    promises = read_promises(word for words in values["goodput"] for word in words.split())
    metrics, percentiles = read_metrics(values["percentile_metrics"]), read_percentiles(values["metric_percentiles"])
    metadata = _pairs(values["metadata"])
    for name in ("request_rate", "burstiness"):
        if not values[name] > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {values[name]:g}.")
    requests = _requests(values)
    sent, duration, load = asyncio.run(_measure(values, requests))
    answered = [timed_of(one) for one in sent if one.error is None]
    errors = [one.error for one in sent if one.error is not None]
    if not answered:
        raise Unavailable(f"none of {len(sent)} requests was answered: {errors[0]}")
    numbers = summary(
        answered, len(errors), duration, promises=promises, metrics=metrics, percentiles=percentiles
    )
    _print(numbers, values, metrics, percentiles)
    if errors:
        click.echo(f"{len(errors)} requests failed, the first with: {errors[0]}", err=True)
    if values["save_result"] or values["save_detailed"] or values["result_filename"]:
        detail = _detail(sent) if values["save_detailed"] else {}
        click.echo(f"written to {_save(values, load, {**numbers, **detail}, metadata)}", err=True)


def _requests(values: dict[str, Any]) -> list[Asked]:
    count, seed = values["num_prompts"], values["seed"]
    if values["dataset_name"] == "custom":
        if values["dataset_path"] is None:
            raise ConfigError("--dataset-name custom needs --dataset-path FILE.")
        return file_requests(values["dataset_path"], count, values["custom_output_len"], seed)
    return random_requests(
        count,
        values["random_input_len"],
        values["random_output_len"],
        prefix=values["random_prefix_len"],
        spread=values["random_range_ratio"],
        seed=seed,
        text=values["backend"] == "openai-chat",
    )


async def _measure(values: dict[str, Any], requests: list[Asked]) -> tuple[list[Sent], float, Load]:
    from quire.cli.bench_http import Server

    server = Server(values["base_url"] or f"http://{values['host']}:{values['port']}", values["api_key"] or envs.api_key())
    found = await _models(server, values["ready_check_timeout_sec"])
    models = [values["model"]] if values["model"] else found
    if not models:
        raise Unavailable(f"{server.url} serves no model.")
    extra = {name: values[name] for name in ("temperature", "top_p", "top_k", "min_p") if values[name] is not None}
    if values["ignore_eos"] or values["dataset_name"] == "random":
        extra["ignore_eos"] = True
    load = Load(
        values["endpoint"] or ENDPOINTS[values["backend"]],
        models[0],
        values["request_rate"],
        values["burstiness"],
        values["max_concurrency"],
        values["seed"],
        {**extra, **(values["extra_body"] or {})},
    )
    try:
        if values["num_warmups"]:
            warm = [requests[number % len(requests)] for number in range(values["num_warmups"])]
            await send_all(server, warm, Load(load.endpoint, load.model, extra=load.extra, most=load.most))
        with progress("Requests", len(requests), quiet=values["disable_tqdm"]) as advance:
            sent, duration = await send_all(server, requests, load, advance)
    finally:
        await server.close()
    return sent, duration, load


async def _models(server: Any, seconds: float) -> list[str]:
    """The server's models; an unready one is asked again for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            names: list[str] = await server.models()
            return names
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


def _pairs(words: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not (name and sign):
            raise ConfigError(f"--metadata must be KEY=VALUE, got {word!r}.")
        pairs[name] = value
    return pairs


def _print(numbers: dict[str, Any], values: dict[str, Any], metrics: list[str], percentiles: list[float]) -> None:
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", numbers["completed"]),
        ("Failed requests:", numbers["failed"]),
        ("Benchmark duration (s):", numbers["duration"]),
        ("Total input tokens:", numbers["total_input_tokens"]),
        ("Total generated tokens:", numbers["total_output_tokens"]),
        ("Request throughput (req/s):", numbers["request_throughput"]),
        ("Request goodput (req/s):", numbers["request_goodput"]),
        ("Output token throughput (tok/s):", numbers["output_throughput"]),
        ("Peak output token throughput (tok/s):", numbers["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", numbers["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", numbers["total_token_throughput"]),
    ]
    if not math.isinf(values["request_rate"]):
        rows.insert(2, ("Request rate configured (RPS):", values["request_rate"]))
    if values["max_concurrency"]:
        rows.insert(2, ("Maximum request concurrency:", values["max_concurrency"]))
    click.echo(f"{' Serving Benchmark Result ':=^{WIDTH}}")
    for title, value in rows:
        if value is not None:
            click.echo(f"{title:<40}{value:<10.2f}" if isinstance(value, float) else f"{title:<40}{value:<10}")
    for name in metrics:
        click.echo(f"{TITLES[name]:-^{WIDTH}}")
        for prefix, word in (("mean", "Mean"), ("median", "Median"), *((f"p{p:g}", f"P{p:g}") for p in percentiles)):
            click.echo(f"{f'{word} {name.upper()} (ms):':<40}{numbers[f'{prefix}_{name}_ms']:<10.2f}")
    click.echo("=" * WIDTH)


def _detail(sent: list[Sent]) -> dict[str, Any]:
    answered = [timed_of(one) if one.error is None else None for one in sent]
    return {
        "input_lens": [one.prompt_tokens for one in sent],
        "output_lens": [timed.output_tokens if timed else 0 for timed in answered],
        "ttfts": [timed.ttft if timed else 0.0 for timed in answered],
        "itls": [timed.itl if timed else [] for timed in answered],
        "start_times": [one.began for one in sent],
        "generated_texts": ["".join(one.text) for one in sent],
        "errors": [one.error or "" for one in sent],
    }


def _save(values: dict[str, Any], load: Load, numbers: dict[str, Any], metadata: dict[str, str]) -> Path:
    now = datetime.now(UTC)
    rate = "inf" if math.isinf(load.rate) else load.rate
    result = {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "backend": values["backend"],
        "endpoint_type": values["backend"],
        "label": values["label"],
        "model_id": load.model,
        "tokenizer_id": load.model,
        "num_prompts": values["num_prompts"],
        **metadata,
        "request_rate": rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.most,
        **numbers,
    }
    most = f"-concurrency{load.most}" if load.most else ""
    name = f"{values['label'] or values['backend']}-{rate}qps{most}-{Path(load.model).name}-{now:%Y%m%d-%H%M%S}.json"
    path: Path = (values["result_dir"] or Path()) / (values["result_filename"] or name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--result-dir, --result-filename: {path} cannot be written: {error.strerror}.") from None
    return path
