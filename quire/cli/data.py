"""`quire data`: example data sets, generated on the spot (quire/datasets). Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quire.cli.command import SectionedCommand, json_flag


@click.group("data")
def command() -> None:
    """Generate an example data set to train and to judge an adapter with."""


@command.command("sql", cls=SectionedCommand)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for train.jsonl and held_out.jsonl.")
@click.option("--rows", default=16_000, show_default=True, help="Rows to train on.")
@click.option("--held-out", default=200, show_default=True, help="Rows to judge by.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same rows.")
@click.option("--tables", multiple=True, help="Ask about these tables only. May be given several times. [default: all six]")
@json_flag
def sql(output: Path, rows: int, held_out: int, seed: int, tables: tuple[str, ...], as_json: bool) -> None:
    """Text to SQL: a table's schema and a question in English, answered with one query.

    What a held-out row asks for (table, columns and values together) is never asked for in a row to train on, in whatever
    words and under whatever names of columns.
    """
    from quire.datasets.sql import NAMES, write

    train, judge = write(output, rows, held_out, seed, tables or NAMES)
    if as_json:
        facts = {"train": str(train), "train_rows": rows, "held_out": str(judge), "held_out_rows": held_out}
        click.echo(json.dumps(facts, indent=2))
        return
    with train.open(encoding="utf-8") as file:
        question, answer = (message["content"] for message in json.loads(file.readline())["messages"])
    click.echo(f"Wrote {rows} rows to {train} and {held_out} rows with other questions to {judge}. The first:\n")
    click.echo(f"{question}\n-> {answer}")
