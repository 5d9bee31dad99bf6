"""`quire cache`: the packed weights that `--packed-cache` keeps: list them, or remove them all."""

from __future__ import annotations

import json
import time

import click

from quire.cli.command import SectionedCommand, json_flag


@click.command("cache", cls=SectionedCommand)
@click.argument("action", type=click.Choice(("list", "clear")), default="list")
@click.option("--packed-cache", default="auto", show_default=True, help="The folder, if serving is given one.")
@json_flag
def command(action: str, packed_cache: str, as_json: bool) -> None:
    """List the packed weights that are kept for quicker starts, or clear them away.

    They can always be made again; a server that uses one goes on when it is cleared.
    """
    from quire.plan.memory import size_text
    from quire.weights.packed_cache import entries, folder_of
    from quire.weights.packed_file import clear_parts

    folder = folder_of(packed_cache)
    found = entries(folder) if folder is not None else []
    if action == "clear" and folder is not None:
        clear_parts(folder)
        for entry in found:
            entry.path.unlink(missing_ok=True)
    total = sum(entry.size for entry in found)
    if as_json:
        files = [{"path": str(entry.path), "bytes": entry.size, "used": int(entry.used)} for entry in found]
        click.echo(json.dumps({"folder": str(folder), "cleared": action == "clear", "bytes": total, "files": files}, indent=2))
        return
    for entry in reversed(found):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        click.echo(f"{entry.path.name}  {size_text(entry.size)}  last used {used}")
    done = "Cleared" if action == "clear" else "In all"
    click.echo(f"{done}: {len(found)} files, {size_text(total)}, in {folder}")
