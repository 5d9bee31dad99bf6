"""`quire merge`: adapters written into their base's weights, or combined into one adapter. The work is quire/merging.py's."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quire import log
from quire.cli.command import SectionedCommand, SectionedOption, json_flag
from quire.errors import ConfigError

COMBINING, WRITING, COMPARING = "Several adapters", "Writing", "Comparing"


@click.command("merge", cls=SectionedCommand)
@click.argument("model")
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The new folder, or an empty one.")
@click.option("--dtype", cls=SectionedOption, section=WRITING, help="Type of the written weights. [default: as they are]")
@click.option(
    "--adapter-only", cls=SectionedOption, section=WRITING, is_flag=True, help="Write the combined adapter, not a model."
)
@click.option("--revision", cls=SectionedOption, section=WRITING, help="Hub revision of the model.")
@click.option(
    "--weights", cls=SectionedOption, section=COMBINING, help="One number for each adapter, with commas. [default: 1 each]"
)
@click.option(
    "--combination",
    cls=SectionedOption,
    section=COMBINING,
    help="cat (exactly the weighted sum), svd (its nearest of a rank), linear, ties, dare_linear, dare_ties, magnitude_prune, "
    "or one of the last four with _svd, as in PEFT. [default: cat]",
)
@click.option("--rank", cls=SectionedOption, section=COMBINING, type=int, help="Rank of the result, for svd and *_svd.")
@click.option(
    "--density", cls=SectionedOption, section=COMBINING, type=float, help="Share of numbers that ties, dare, ... keep."
)
@click.option("--sign", cls=SectionedOption, section=COMBINING, help="How ties counts votes: total or frequency.")
@click.option("--seed", cls=SectionedOption, section=COMBINING, type=int, help="Of the numbers that dare drops. [default: 0]")
@click.option(
    "--data",
    cls=SectionedOption,
    section=COMPARING,
    type=click.Path(path_type=Path),
    help='.txt, or .jsonl with "text" or "messages". [default: built-in text]',
)
@click.option(
    "--held-out", cls=SectionedOption, section=COMPARING, default=16, show_default=True, help="Rows to compare on; 0: do not."
)
@click.option("--length", cls=SectionedOption, section=COMPARING, default=512, show_default=True, help="Tokens of a row.")
@json_flag
def command(
    model: str,
    adapters: tuple[Path, ...],
    output: Path,
    dtype: str | None,
    adapter_only: bool,
    revision: str | None,
    weights: str | None,
    combination: str | None,
    rank: int | None,
    density: float | None,
    sign: str | None,
    seed: int | None,
    data: Path | None,
    held_out: int,
    length: int,
    as_json: bool,
) -> None:
    """Write MODEL (a folder, a hub id or quire-tiny) with ADAPTERS in its weights: a folder that needs nothing else.

    Weights keep their type, so what an adapter adds is rounded: at the end the merged model and the adapter beside its base
    read held-out text, and their difference is printed. A quantized MODEL becomes a dense one (--dtype, or the type that its
    configuration names). Several adapters are added up, each with its weight.
    """
    numbers = _numbers(weights)
    if held_out < 0 or length < 2:
        raise ConfigError(f"--held-out must be at least 0 and --length at least 2, got {held_out} and {length}.")
    log.setup("WARNING")
    from quire.lora.combine import Combination
    from quire.merging import merge

    chosen = {"kind": combination, "rank": rank, "density": density, "sign": sign, "seed": seed}
    given = {name: value for name, value in chosen.items() if value is not None}
    report = merge(
        model,
        list(adapters),
        output,
        weights=numbers,
        how=Combination(**given) if given else None,
        dtype=dtype,
        adapter_only=adapter_only,
        data=data,
        held_out=held_out,
        length=length,
        revision=revision,
        say=_say,
    )
    _say(f"Wrote {output} in {report.seconds:.1f} s{f' (rank {report.rank})' if adapter_only else ''}.")
    if report.untied:
        _say("The head is a tensor of its own now (tie_word_embeddings is false), since the adapter changes one of the two.")
    if report.lost is not None and report.lost_most is not None:
        name, share = report.lost_most
        most = f", most in {name} ({share:.2%})" if share else ""
        _say(f"Rounding to the weights' type took {report.lost:.2%} of the update{most}.")
    if report.drift is not None:
        _say(f"Drift: {report.drift.text()}.")
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))


def _numbers(weights: str | None) -> list[float] | None:
    """The weights as numbers. Raises ConfigError."""
    if weights is None:
        return None
    try:
        return [float(one) for one in weights.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--weights must be numbers with commas between them (0.7,0.3), got {weights!r}.") from None


def _say(line: str) -> None:
    click.echo(line, err=True)
