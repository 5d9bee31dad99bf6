"""`quire models`: the families that Quire can serve and the models that are on this machine. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from quire.cli.command import SectionedCommand, json_flag
from quire.errors import ModelError
from quire.models.config import read_model_config
from quire.models.registry import ARCHITECTURES
from quire.plan.memory import size_text

WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class FoundModel:
    """One model folder. problem: why it cannot be served, None if nothing is known against it."""

    name: str
    where: str
    path: str
    architecture: str
    context: int
    weight_bytes: int
    problem: str | None


@click.command("models", cls=SectionedCommand)
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_flag
def command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List model families and the models on this machine: the package's own, the hub's cache, and those in FOLDERS."""
    found = [*_embedded(), *_cached(), *(model for folder in folders for model in _below(folder))]
    families: dict[str, list[str]] = {}
    for architecture, family in ARCHITECTURES.items():
        families.setdefault(family, []).append(architecture)
    if as_json:
        click.echo(json.dumps({"families": families, "models": [asdict(model) for model in found]}, indent=2))
        return
    click.echo("Families:")
    for family, architectures in families.items():
        click.echo(f"  {family:<10}  {', '.join(architectures)}")
    click.echo("Models on this machine:")
    for model in found:
        size = size_text(model.weight_bytes) if model.weight_bytes else "no weights"
        facts = f"{model.architecture}, {model.context} tokens of context, {size}" if model.architecture else size
        click.echo(f"  {model.name}  ({model.where}: {facts}){'  ! ' + model.problem if model.problem else ''}")


def _embedded() -> Iterator[FoundModel]:
    from quire.weights.hub import EMBEDDED

    for folder in sorted(EMBEDDED.glob("*/")):
        if (folder / "config.json").is_file():
            yield _look(folder.name, "in the package", folder)


def _cached() -> Iterator[FoundModel]:
    """Models of the hub's cache, the newest snapshot of each."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for repository in sorted(Path(HF_HUB_CACHE).glob("models--*")):
        snapshots = sorted(repository.glob("snapshots/*/config.json"), key=lambda path: path.stat().st_mtime)
        if snapshots:
            name = repository.name.removeprefix("models--").replace("--", "/")
            yield _look(name, "hub cache", snapshots[-1].parent)


def _below(folder: Path) -> Iterator[FoundModel]:
    for path in sorted([folder / "config.json", *folder.glob("*/config.json")]):
        if path.is_file():
            yield _look(str(path.parent), "folder", path.parent)


def _look(name: str, where: str, folder: Path) -> FoundModel:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
    try:
        config = read_model_config(folder)
    except ModelError as error:
        return FoundModel(name, where, str(folder), "", 0, size, str(error))
    problem = None
    if config.architecture not in ARCHITECTURES:
        problem = "this family is not supported"
    elif not size:
        problem = "its weights are not here"
    return FoundModel(name, where, str(folder), config.architecture, config.max_position_embeddings, size, problem)
