"""`quire`: finds the command, runs it, and turns what goes wrong into one clear line and an exit code.

Knows the commands' names and one-line summaries; their files are imported when they are called. Never imports torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from quire import __version__
from quire.cli.command import suggestion
from quire.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DoesNotFit,
    InvalidRequest,
    ModelError,
    QuireError,
    Unavailable,
    did_you_mean,
)

COMMANDS: dict[str, str] = {
    "serve": "Serve a model through the OpenAI API.",
    "generate": "Continue a prompt, streaming the text.",
    "chat": "Talk with a model: here, or with a server by its URL.",
    "models": "List model families and the models on this machine.",
    "presets": "Show scenario presets and where each value in force comes from.",
    "train": "Train a LoRA adapter on your examples.",
    "adapters": "Look at LoRA adapters: who would take them.",
    "merge": "Write adapters into a model's weights, or combine them.",
    "data": "Generate an example data set.",
    "quantize": "Write a quantized copy of a model.",
    "plan": "Say what a model needs and whether it fits, before loading it.",
    "cache": "List or clear the packed weights kept for quicker starts.",
    "bench": "Measure an engine or a running server.",
    "doctor": "Report the machine, versions, and what is wrong.",
}
# What people type who come from another tool.
OTHER_NAMES = {
    "run": "chat",
    "server": "serve",
    "start": "serve",
    "complete": "generate",
    "completion": "generate",
    "list": "models",
    "ls": "models",
    "ps": "models",
    "collect-env": "doctor",
    "check": "doctor",
    "env": "doctor",
    "preset": "presets",
    "config": "presets",
    "fit": "plan",
    "benchmark": "bench",
    "finetune": "train",
    "fine-tune": "train",
    "sft": "train",
    "dpo": "train",
    "lora": "train",
}

USAGE, INTERRUPTED, INTERNAL = 2, 130, 1
# The first class that fits counts.
EXIT_CODES: tuple[tuple[type[QuireError], int, str], ...] = (
    (DoesNotFit, 4, "the model does not fit this machine"),
    (ConfigError, 3, "an option has a wrong value"),
    (ModelError, 5, "the model's folder is missing, damaged or of an unknown family"),
    (InvalidRequest, 6, "the prompt or a sampling value is wrong"),
    (DataError, 8, "a training file has bad lines"),
    (AdapterError, 9, "an adapter's folder or configuration is wrong"),
    (Unavailable, 7, "the server cannot be reached, or its engine has died"),
)


class Commands(click.Group):
    """The group whose commands live in `quire/cli/<name>.py` as `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"quire.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            hint = f' Did you mean "{OTHER_NAMES[name]}"?' if name in OTHER_NAMES else did_you_mean(name, COMMANDS)
            raise click.UsageError(f"no command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(suggestion(error.option_name, self.get_params(ctx)), ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table: the inherited one would import every command for its summary.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _epilog() -> str:
    codes = [f"{code} {meaning}" for _, code, meaning in sorted(EXIT_CODES, key=lambda row: row[1])]
    return "Exit codes: 0 well; 1 an error inside Quire; 2 wrong usage; " + "; ".join(codes) + "; 130 interrupted."


@click.command(cls=Commands, epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", "-V", prog_name="quire", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the trace of an error (may stand anywhere).")
def group() -> None:
    """Fine-tune, serve and tune language models on machines that you own.

    Begin with `quire serve` or `quire chat`: both use the model that comes with the package.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Ends the process."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """Run one command line; gives the exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [word for place, word in enumerate(arguments) if place >= end or word != "--debug"]
    try:
        result = group.main(arguments, prog_name="quire", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone; closing stdout at exit would complain about it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """One line (or the few of a sized refusal) and the exit code."""
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "quire"
        _complain(f"{_sentence(error.format_message())} See '{path} --help'.")
        return USAGE
    if isinstance(error, click.ClickException):
        _complain(error.format_message())
        return error.exit_code
    for kind, code, _ in EXIT_CODES:
        if isinstance(error, kind):
            _complain(getattr(error, "message", None) or str(error))
            return code
    if isinstance(error, QuireError):
        _complain(str(error))
        return INTERNAL
    if isinstance(error, ModuleNotFoundError):
        _complain(f"the package {error.name!r} is missing: install Quire with its dependencies (pip install quire).")
        return INTERNAL
    _complain(f"inside Quire: {type(error).__name__}: {error}. Run it again with --debug for the trace.")
    return INTERNAL


def _complain(message: str) -> None:
    click.echo(f"error: {message}", err=True)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."


def __getattr__(name: str) -> Any:  # `quire.cli.main.cli` for tools that expect click's usual name
    if name == "cli":
        return group
    raise AttributeError(name)
