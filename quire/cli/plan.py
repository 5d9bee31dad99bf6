"""`quire plan`: what a model needs and whether it fits, from its headers; no torch, no tensor is read.

Finds the numbers that the planner (quire/plan) wants: the model's configuration, the size of its weights, the machine.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quire.cli.ahead import begin
from quire.cli.command import SectionedCommand, json_flag
from quire.cli.flags import HumanInteger, build, options_of, with_options
from quire.config import EngineConfig
from quire.models.config import ModelConfig, read_model_config
from quire.plan.exits import diagnose
from quire.plan.hardware import Hardware, probe
from quire.plan.memory import ITEM_BYTES, Plan, find_plan, make_plan, size_text
from quire.quant.scheme import scheme_of
from quire.quant.sizes import Sizes, WeightSizes, estimated_sizes, layer_elements

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DOES_NOT_FIT = 4


@with_options(options_of(EngineConfig, "Engine options", skip=("model",)))
@click.command("plan", cls=SectionedCommand)
@click.argument("model", default="quire-tiny")
@click.option("--memory", type=HumanInteger(), help="Plan for a machine with so much free memory (such as 8G).")
@click.option("--cores", type=int, help="Plan for a machine with so many cores.")
@json_flag
def command(model: str, memory: int | None, cores: int | None, as_json: bool, **values: Any) -> int:
    """Say what MODEL needs, where the memory goes, and whether it fits: before loading, from headers.

    Takes the engine flags of `quire serve`. What does not fit is answered with ways out, each of which was computed.
    """
    from quire.weights.hub import resolve

    config: EngineConfig = build(EngineConfig, {**values, "model": model})
    hardware = _machine(memory, cores)
    start = time.monotonic()
    folder = resolve(config.model, config.revision, weights=False)
    shape = read_model_config(folder)
    weights, source = stored_weights(folder, shape)
    plan = find_plan(config, shape, weights, hardware)
    took = time.monotonic() - start
    if as_json:
        facts = plan.as_dict() if plan else diagnose(config, shape, weights, hardware).as_dict()
        click.echo(json.dumps({"model": model, "fits": plan is not None, "weights_from": source, **facts}, indent=2))
        return 0 if plan else DOES_NOT_FIT
    if plan is None:
        make_plan(config, shape, weights, hardware)  # raises, with the ways out
    _print_plan(plan, model, shape, source, hardware, took)
    return 0


def local_folder(model: str) -> Path | None:
    """The folder of a model whose files are on this machine, None where a hub would have to be asked."""
    from quire.weights.hub import EMBEDDED

    folders = (Path(model).expanduser(), EMBEDDED / model)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def plan_local(config: EngineConfig) -> Plan | None:
    """Before a model is loaded: its plan, if its files are on this machine and no hub has to be asked, and what can be begun
    ahead of torch. Raises DoesNotFit."""
    folder = local_folder(config.model)
    if folder is None:
        return None
    shape = read_model_config(folder)
    weights, _ = stored_weights(folder, shape)
    plan = make_plan(config, shape, weights, probe())
    begin(config, folder, plan)
    return plan


def stored_weights(folder: Path, model: ModelConfig) -> tuple[WeightSizes, str]:
    """(sizes of all weights, where they are from)."""
    from quire.errors import ModelError
    from quire.models.config import read_json
    from quire.weights.files import weight_sizes

    try:
        return weight_sizes(folder, model), "the files' headers"
    except ModelError:
        # The weights may not be here (a hub id is planned before it is downloaded), but their index often is.
        scheme = scheme_of(model.raw, None)
        for name in INDEXES:
            if (folder / name).is_file():
                size = read_json(folder / name).get("metadata", {}).get("total_size")
                if isinstance(size, int):
                    source = f"{name}; the files are not on this machine"
                    if scheme is not None:
                        return WeightSizes(Sizes(0, size)), source
                    return estimated_sizes(size // ITEM_BYTES[model.dtype], model), source
        sizes = estimated_sizes(estimated_parameters(model), model)
        if scheme is not None:
            sizes = WeightSizes(sizes.at_load[scheme.form.kind])
        return sizes, "config.json; the files are not on this machine"


def estimated_parameters(model: ModelConfig) -> int:
    """Parameters of a decoder of these sizes, norms and biases left out."""
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return tables + layer_elements(model)


def _machine(memory: int | None, cores: int | None) -> Hardware:
    hardware = probe()
    if memory is not None:
        hardware = replace(hardware, memory_total=memory, memory_free=memory)
    return replace(hardware, cores=cores) if cores is not None else hardware


def _print_plan(plan: Plan, name: str, model: ModelConfig, source: str, hardware: Hardware, took: float) -> None:
    click.echo(
        f"{name} ({model.architecture}, {model.num_layers} layers, weights {size_text(plan.weight_bytes)} from {source}) "
        f"fits {hardware.cores} cores with {size_text(hardware.memory_free)} of free memory."
    )
    for line in plan.describe():
        click.echo("  " + line)
    click.echo(f"Planned in {took:.2f} s.")
