"""`quire serve`: flags -> EngineConfig and ServerOptions -> the server.

The flags are the fields of those two classes (see flags.py); this file adds only what vLLM's users type out of habit.
A model on this machine is planned before torch is imported, so that one that does not fit is refused at once.
"""

from __future__ import annotations

import json
from typing import Any

import click

from quire import envs
from quire.cli.command import SectionedCommand, SectionedOption
from quire.cli.flags import build, flag_name, options_of, with_options
from quire.config import ALWAYS, EngineConfig, without_always
from quire.errors import ConfigError
from quire.server.options import ServerOptions

DEFAULT_MODEL = "quire-tiny"
SHARE_BESIDE_TRAINING = 0.6
"""Of the free memory, what serving may take where training is to find room, too."""


def _always() -> list[click.Option]:
    return [
        SectionedOption(
            [f"--{name.replace('_', '-')}/--no-{name.replace('_', '-')}", name],
            default=None,
            help=f"Accepted for vLLM's sake: {fact}.",
            section="Compatibility",
        )
        for name, (_, fact) in ALWAYS.items()
    ]


@with_options(_always())
@with_options(options_of(ServerOptions, "Server options"))
@with_options(options_of(EngineConfig, "Engine options", skip=("model",)))
@click.command("serve", cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--model", "model_flag", help="The same as MODEL.")
def command(model: str | None, model_flag: str | None, **values: Any) -> None:
    """Serve MODEL through the OpenAI API.

    MODEL is a folder in Hugging Face layout, a hub id, or quire-tiny, which comes with the package and is the default.
    Numbers may be written 4k (4000) or 4K (4096).
    """
    if model is not None and model_flag is not None and model != model_flag:
        raise ConfigError(f"MODEL is given twice: {model!r} and {model_flag!r}. Give one.")
    values = _with_adapters(without_always(values))
    config: EngineConfig = build(EngineConfig, {**values, "model": model or model_flag or DEFAULT_MODEL})
    options: ServerOptions = build(ServerOptions, _server_values(values))
    for name in ("lora_modules", "lora_dir", "allowed_lora_path"):
        if getattr(options, name) and not config.enable_lora:
            raise ConfigError(f"{flag_name(name)} needs --enable-lora.")

    from quire.cli.plan import plan_local

    plan_local(config)

    from quire.server.app import serve

    serve(config, options)


def _with_adapters(values: dict[str, Any]) -> dict[str, Any]:
    """A server that trains serves what it trains: adapters, in numbers that suit it where no flag says otherwise."""
    if not (values["enable_fine_tuning"] or values["data_dir"]):
        return values
    if values["enable_lora"] is False:
        raise ConfigError("--no-enable-lora cannot be given with --enable-fine-tuning: what is trained could not be served.")
    loras = values["max_loras"] or 2
    wishes = {"enable_lora": True, "max_loras": loras, "max_cpu_loras": max(4, loras)}
    wishes["training_jobs"] = values["max_training_jobs"] or ServerOptions.max_training_jobs
    if values["preset"] is None:
        wishes["gpu_memory_utilization"] = SHARE_BESIDE_TRAINING
    return {**values, **{name: value for name, value in wishes.items() if values[name] is None}}


def _server_values(values: dict[str, Any]) -> dict[str, Any]:
    """The environment's key if no flag names one, and vLLM's JSON spelling of lists."""
    values = dict(values)
    if not values["api_key"] and (key := envs.api_key()):
        values["api_key"] = (key,)
    origins = values["allowed_origins"]
    if len(origins) == 1 and origins[0].startswith("["):
        try:
            values["allowed_origins"] = tuple(json.loads(origins[0]))
        except json.JSONDecodeError as error:
            raise ConfigError(f"--allowed-origins must be origins or a JSON list, got {origins[0]!r} ({error}).") from None
    return values
