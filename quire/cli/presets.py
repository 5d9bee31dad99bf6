"""`quire presets`: the scenario table, and where each value in force comes from. Never imports torch."""

from __future__ import annotations

import json
from typing import Any

import click

from quire import presets
from quire.cli.command import SectionedCommand, json_flag
from quire.cli.flags import build, options_of, with_options
from quire.cli.sampling import check, given_sampling, sampling_defaults, sampling_options
from quire.config import AUTO, EngineConfig
from quire.errors import DoesNotFit, did_you_mean
from quire.models.config import read_json, read_model_config
from quire.plan.hardware import probe
from quire.plan.memory import DEFAULT_UTILIZATION, Plan, make_plan

PLANNED = (
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "block_size",
    "num_blocks",
    "threads",
)


class PresetCommands(click.Group):
    """A group that knows a preset's name where a sub-command was expected."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            known = [*self.commands, *presets.names()]
            hint = f' Did you mean "show {name}"?' if name in presets.names() else did_you_mean(name, known)
            raise click.UsageError(f"no command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group("presets", cls=PresetCommands, invoke_without_command=True)
@json_flag
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Scenario presets: sampling and deployment values for seven kinds of work, with reasons and ranges.

    Use one with --preset NAME (serve, generate, chat), "preset" in a request, or SamplingParams.preset(NAME).
    """
    if ctx.invoked_subcommand is not None:
        return
    if as_json:
        click.echo(json.dumps([row.as_dict() for row in presets.PRESETS], indent=2))
        return
    width = max(len(row.name) for row in presets.PRESETS)
    for row in presets.PRESETS:
        click.echo(f"{row.name:<{width}}  {row.title}")
        click.echo(f"{'':<{width}}  {_values({**row.sampling, **row.deployment})}")
    click.echo("\n'quire presets show NAME' has reasons and ranges; 'quire presets explain' where each value comes from.")


@command.command("show")
@click.argument("name")
@json_flag
def show(name: str, as_json: bool) -> None:
    """One preset with its reason, its values and the range in which each may be moved."""
    row = presets.find(name)
    if as_json:
        click.echo(json.dumps(row.as_dict(), indent=2))
        return
    click.echo(f"{row.name}: {row.title}\n{row.reason}")
    for half, values in (("sampling", row.sampling), ("deployment", row.deployment)):
        for key, value in values.items():
            low, high = row.ranges.get(key, (value, value))
            allowed = f"  (range {low:g} to {high:g})" if low != high else ""
            click.echo(f"  {half:<10}  {key} = {value}{allowed}")
    if row.aliases:
        click.echo(f"Also called: {', '.join(row.aliases)}")


@with_options(options_of(EngineConfig, "Engine options", skip=("model", "seed")))
@with_options(sampling_options())
@command.command("explain", cls=SectionedCommand)
@click.option("--model", "-m", default="quire-tiny", help="Folder, hub id or quire-tiny. [default: quire-tiny]")
@click.option("--request-preset", help='The "preset" field of a request.')
@json_flag
def explain(model: str, request_preset: str | None, as_json: bool, **values: Any) -> None:
    """Show each value in force and where it comes from: request > flag > preset > generation_config > default.

    Sampling flags stand for the fields of a request, engine flags for those of `quire serve`.
    """
    from quire.weights.hub import resolve

    sampling = given_sampling(values)
    config: EngineConfig = build(EngineConfig, {**values, "model": model})
    folder = resolve(model, config.revision, weights=False)
    path = folder / "generation_config.json"
    recommended = presets.recommended_sampling(read_json(path)) if config.generation_config == AUTO and path.is_file() else {}
    resolved = presets.resolve(
        request={**sampling, "preset": request_preset},
        flags=config.override_generation_config,
        preset=config.preset,
        generation_config=recommended,
        defaults=sampling_defaults(),
    )
    resolved = {name: found for name, found in resolved.items() if name in sampling_defaults()}
    check({name: found.value for name, found in resolved.items()})
    plan, misfit = _plan(config, folder)
    engine = _engine_rows(plan, config)
    notes = _departures(config.preset, request_preset, resolved, plan)
    if as_json:
        facts = {name: {"value": f.value, "source": f.source, "beaten": dict(f.beaten)} for name, f in resolved.items()}
        rows = {name: {"value": value, "source": source} for name, value, source in engine}
        click.echo(json.dumps({"model": model, "sampling": facts, "engine": rows, "notes": notes, "misfit": misfit}, indent=2))
        return
    _print_rows("Sampling", [(n, f.value, _source(f, config.preset, request_preset)) for n, f in resolved.items()])
    _print_rows("Engine", engine)
    for note in notes:
        click.echo(f"note: {note}")
    if misfit:
        click.echo(misfit, err=True)


def _plan(config: EngineConfig, folder: Any) -> tuple[Plan | None, str | None]:
    from quire.cli.plan import stored_weights

    shape = read_model_config(folder)
    try:
        return make_plan(config, shape, stored_weights(folder, shape)[0], probe()), None
    except DoesNotFit as error:
        return None, str(error)


def _engine_rows(plan: Plan | None, config: EngineConfig) -> list[tuple[str, Any, str]]:
    if plan is None:
        return []
    share = config.gpu_memory_utilization
    if share is None:
        wish = presets.deployment_of(config.preset) if config.preset else {}
        share = wish.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    return [(name, getattr(plan, name, share), plan.reasons[name]) for name in PLANNED]


def _departures(
    preset: str | None, request_preset: str | None, resolved: dict[str, presets.Resolved], plan: Plan | None
) -> list[str]:
    """Where the values in force have left the scenario's range."""
    notes: list[str] = []
    values = {name: found.value for name, found in resolved.items()}
    if plan is not None:
        values |= {name: getattr(plan, name) for name in PLANNED if hasattr(plan, name)}
    for name in dict.fromkeys(name for name in (request_preset, preset) if name):
        notes += presets.find(name).departures(values)
    return notes


def _source(found: presets.Resolved, preset: str | None, request_preset: str | None) -> str:
    named = {"preset": preset, "request preset": request_preset}.get(found.source)
    source = f"{found.source} {named}" if named else found.source
    beaten = ", ".join(f"{source} {value}" for source, value in found.beaten if value != found.value)
    return f"{source}  (instead of {beaten})" if beaten else source


def _print_rows(title: str, rows: list[tuple[str, Any, str]]) -> None:
    if not rows:
        return
    click.echo(f"{title}:")
    width = max(len(name) for name, _, _ in rows)
    for name, value, source in rows:
        click.echo(f"  {name:<{width}}  {'-' if value is None else value!s:<10}  {source}")


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
