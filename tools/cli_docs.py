"""Writes docs/cli.md from the commands' own help; `--check` says whether the file is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from quire.cli.main import EXIT_CODES, INTERNAL, INTERRUPTED, USAGE, group

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 110
HEAD = """# The command line

Generated from the commands' own help by `python tools/cli_docs.py`; a test compares. Do not edit.

Whole numbers may be written `4k` (4000), `4K` (4096), `2M` (2 x 2^20). An unknown flag or command is answered with the one
that was probably meant, also for the names that vLLM and other engines use. `--debug` shows the trace of any error.

| Exit code | Meaning |
|---|---|
"""


def page() -> str:
    """The whole page."""
    codes = [(0, "well"), (INTERNAL, "an error inside Quire, or `quire doctor` found one"), (USAGE, "wrong usage")]
    codes += sorted((code, meaning) for _, code, meaning in EXIT_CODES)
    codes.append((INTERRUPTED, "interrupted (Ctrl-C)"))
    table = "".join(f"| {code} | {meaning} |\n" for code, meaning in codes)
    return HEAD + table + "".join(f"\n## {path}\n\n```text\n{text}\n```\n" for path, text in helps("quire", group))


def helps(path: str, command: click.Command, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and of all below it."""
    context = click.Context(
        command,
        info_name=path.split()[-1],
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    yield path, "\n".join(lines)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from helps(f"{path} {name}", inner, context)


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        if not fresh:
            print("docs/cli.md is not up to date: run python tools/cli_docs.py", file=sys.stderr)
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
