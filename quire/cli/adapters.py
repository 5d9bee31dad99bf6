"""`quire adapters check`: would Quire, PEFT and vLLM take an adapter folder? The rules are in quire/lora/check.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from quire import log
from quire.cli.command import SectionedCommand, json_flag


@click.group("adapters")
def command() -> None:
    """Look at LoRA adapters."""


@command.command("check", cls=SectionedCommand)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", help="Its base (a folder, a hub id or quire-tiny): names and shapes are compared too.")
@click.option("--revision", help="Hub revision of the model.")
@json_flag
@click.pass_context
def check(context: click.Context, folder: Path, model: str | None, revision: str | None, as_json: bool) -> None:
    """Say whether Quire, PEFT and vLLM would take the adapter in DIR, and why not.

    Exit code 1 when Quire would not.
    """
    from quire.lora.check import check_adapter
    from quire.models.config import read_model_config
    from quire.weights.hub import resolve

    log.setup("ERROR")
    config = None if model is None else read_model_config(resolve(model, revision, weights=False))
    verdicts = check_adapter(folder, config)
    if as_json:
        click.echo(json.dumps([{**asdict(verdict), "accepts": verdict.accepts} for verdict in verdicts], indent=2))
    else:
        for verdict in verdicts:
            click.echo(f"{verdict.reader:<6} {'accepts it' if verdict.accepts else 'refuses it'}")
            for reason in verdict.reasons:
                click.echo(f"       ! {reason}")
            for note in verdict.notes:
                click.echo(f"       - {note}")
    context.exit(0 if verdicts[0].accepts else 1)
