"""`quire data`: example data sets, generated on the spot. Imports no torch."""

from __future__ import annotations

import json
import os
import tempfile
from itertools import islice
from pathlib import Path

import click

from quire.cli.command import SectionedCommand, json_flag
from quire.errors import ConfigError

MOST_ROWS = 100_000


@click.group("data")
def command() -> None:
    """Generate an example data set to train and to judge an adapter with."""


@command.command("sql", cls=SectionedCommand)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for train.jsonl and held_out.jsonl.")
@click.option("--rows", default=12_000, show_default=True, help="Rows to train on.")
@click.option("--held-out", default=200, show_default=True, help="Rows to judge by.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same rows.")
@json_flag
def sql(output: Path, rows: int, held_out: int, seed: int, as_json: bool) -> None:
    """Text to SQL: a table's schema and a question in English, answered with one query.

    What a held-out row asks for (table, columns and values together) is never asked for in a row to train on, in whatever
    words and under whatever names of columns.
    """
    from quire.datasets.sql import Example, examples

    for name, value in (("rows", rows), ("held-out", held_out)):
        if not 1 <= value <= MOST_ROWS:
            raise ConfigError(f"--{name} must be from 1 to {MOST_ROWS}, got {value}.")
    output.mkdir(parents=True, exist_ok=True)
    facts: dict[str, str | int] = {}
    first: Example | None = None
    for name, count, kept in (("train", rows, False), ("held_out", held_out, True)):
        made = list(islice(examples(seed, held_out=kept), count))
        _write(output / f"{name}.jsonl", "".join(json.dumps(one.messages()) + "\n" for one in made))
        facts |= {name: str(output / f"{name}.jsonl"), f"{name}_rows": count}
        first = first or made[0]
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    assert first is not None
    click.echo(f"Wrote {rows} rows to {facts['train']} and {held_out} rows of other questions to {facts['held_out']}.")
    click.echo(f"The first:\n  {first.schema}\n  {first.question}\n  -> {first.query}")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, working = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(working).chmod(0o644)
        os.replace(working, path)
    except BaseException:
        Path(working).unlink(missing_ok=True)
        raise
