"""`quire bench latency` and `quire bench throughput`: the engine in this process, without a server, in vLLM's names."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quire import log
from quire.cli.bench_data import HIGHEST_ID, LOWEST_ID, Asked, file_requests, random_requests
from quire.cli.bench_metrics import percentile
from quire.cli.command import SectionedCommand, SectionedOption
from quire.cli.flags import build, options_of, with_options
from quire.config import EngineConfig
from quire.errors import ConfigError

DEFAULT_MODEL = "quire-tiny"
PERCENTILES = (10, 25, 50, 75, 90, 99)
COUNT, POSITIVE = click.IntRange(min=0), click.IntRange(min=1)


def _option(name: str, **options: Any) -> Callable[[Any], Any]:
    shown = options.get("default") is not None
    return click.option(name, cls=SectionedOption, section="Measurement", show_default=shown, **options)


@with_options(options_of(EngineConfig, "Engine options", skip=("model",)))
@click.command("latency", cls=SectionedCommand)
@_option("--model", help="Folder, hub id or quire-tiny. [default: quire-tiny]")
@_option("--input-len", type=POSITIVE, default=32, help="Tokens in.")
@_option("--output-len", type=POSITIVE, default=128, help="Tokens out.")
@_option("--batch-size", type=POSITIVE, default=8, help="Requests that run together.")
@_option("--n", type=POSITIVE, default=1, help="Samples of each request.")
@_option("--num-iters-warmup", type=COUNT, default=10, help="Batches before those that count.")
@_option("--num-iters", type=POSITIVE, default=30, help="Batches that count.")
@_option("--output-json", type=click.Path(path_type=Path), help="Write the numbers to this file.")
@_option("--disable-tqdm", is_flag=True, help="No progress bar.")
def latency(**values: Any) -> None:
    """Measure how long one batch of requests takes, from its prompts to its last tokens.

    Prompts differ from batch to batch, so that the prefix cache does not answer for the model.
    """
    llm = _load(values)
    from quire import SamplingParams

    params = SamplingParams(n=values["n"], temperature=1.0, ignore_eos=True, max_tokens=values["output_len"], detokenize=False)
    draw = random.Random(0)

    def batch() -> float:
        prompts = [
            [draw.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(values["input_len"])] for _ in range(values["batch_size"])
        ]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    warm, counted = values["num_iters_warmup"], values["num_iters"]
    with log.progress("Batches", warm + counted, quiet=values["disable_tqdm"]) as advance:
        seconds = []
        for _ in range(warm + counted):
            seconds.append(batch())
            advance(1)
    seconds = seconds[warm:]
    percentiles = {percent: percentile(seconds, percent) for percent in PERCENTILES}
    click.echo(f"Avg latency: {statistics.fmean(seconds):.4f} seconds")
    for percent, value in percentiles.items():
        click.echo(f"{percent}% percentile latency: {value:.4f} seconds")
    _save(
        values["output_json"],
        {
            "avg_latency": statistics.fmean(seconds),
            "latencies": seconds,
            "percentiles": {str(percent): value for percent, value in percentiles.items()},
        },
    )


@with_options(options_of(EngineConfig, "Engine options", skip=("model",)))
@click.command("throughput", cls=SectionedCommand)
@_option("--model", help="Folder, hub id or quire-tiny. [default: quire-tiny]")
@_option("--dataset-name", type=click.Choice(["random", "custom"]), default="random", help="Where prompts come from.")
@_option("--dataset-path", type=click.Path(path_type=Path), help='custom: lines of {"prompt": ...}.')
@_option("--num-prompts", type=POSITIVE, default=1000, help="Requests.")
@_option("--input-len", type=POSITIVE, default=1024, help="random: tokens in.")
@_option("--output-len", type=POSITIVE, default=128, help="Tokens out; custom: if the line is silent.")
@_option("--prefix-len", type=COUNT, default=0, help="random: further tokens in, the same in all requests.")
@_option("--random-range-ratio", type=float, default=0.0, help="random: lengths vary by this share, in [0, 1).")
@_option("--n", type=POSITIVE, default=1, help="Samples of each request.")
@_option("--output-json", type=click.Path(path_type=Path), help="Write the numbers to this file.")
@_option("--disable-tqdm", is_flag=True, help="No progress bar.")
def throughput(**values: Any) -> None:
    """Measure requests and tokens a second with all requests queued at once."""
    requests = _requests(values)
    llm = _load(values)
    from quire import SamplingParams

    params = [
        SamplingParams(n=values["n"], temperature=1.0, ignore_eos=True, max_tokens=asked.output, detokenize=False)
        for asked in requests
    ]
    begin = time.perf_counter()
    outputs = llm.generate([asked.prompt for asked in requests], params, use_tqdm=not values["disable_tqdm"])
    elapsed = time.perf_counter() - begin
    given = sum(len(output.prompt_token_ids) for output in outputs)
    drawn = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    click.echo(
        f"Throughput: {len(requests) / elapsed:.2f} requests/s, {(given + drawn) / elapsed:.2f} total tokens/s, "
        f"{drawn / elapsed:.2f} output tokens/s"
    )
    click.echo(f"Total num prompt tokens:  {given}\nTotal num output tokens:  {drawn}")
    _save(
        values["output_json"],
        {
            "elapsed_time": elapsed,
            "num_requests": len(requests),
            "total_num_tokens": given + drawn,
            "requests_per_second": len(requests) / elapsed,
            "tokens_per_second": (given + drawn) / elapsed,
            "output_tokens_per_second": drawn / elapsed,
        },
    )


def _requests(values: dict[str, Any]) -> list[Asked]:
    seed = values["seed"] or 0
    if values["dataset_name"] == "custom":
        if values["dataset_path"] is None:
            raise ConfigError("--dataset-name custom needs --dataset-path FILE.")
        return file_requests(values["dataset_path"], values["num_prompts"], values["output_len"], seed)
    return random_requests(
        values["num_prompts"],
        values["input_len"],
        values["output_len"],
        prefix=values["prefix_len"],
        spread=values["random_range_ratio"],
        seed=seed,
    )


def _load(values: dict[str, Any]) -> Any:
    """The model, after what cannot fit was refused without torch."""
    config: EngineConfig = build(EngineConfig, {**values, "model": values["model"] or DEFAULT_MODEL})
    log.setup("WARNING" if values["disable_tqdm"] else "INFO")
    from quire.cli.plan import plan_local

    plan_local(config)
    from quire.cli.flags import given
    from quire.engine.llm import LLM

    return LLM(config.model, **{name: value for name, value in given(EngineConfig, values).items() if name != "model"})


def _save(path: Path | None, numbers: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(numbers, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output-json {path} cannot be written: {error.strerror}.") from None
    click.echo(f"written to {path}", err=True)
