"""`quire chat`: a conversation at the terminal, with the local engine or with a server by its URL.

A line is a message unless it begins with `/`. Ctrl-C stops the answer, not the conversation. Lines between triple quotes are
one message. What the commands do to the conversation is in `Conversation`; this file's loop only reads and prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import click

from quire import envs, log
from quire.cli.answer import Answer, Speaker
from quire.cli.command import SectionedCommand
from quire.cli.flags import options_of, with_options
from quire.cli.generate import NOT_HERE, open_speaker
from quire.cli.sampling import SAMPLING, check, given_sampling, parse, sampling_options
from quire.config import EngineConfig
from quire.errors import EngineDead, InvalidRequest, QuireError, Unavailable, did_you_mean
from quire.service.requests import TextRequest

HISTORY_LINES = 1000
FENCE = '"""'


@with_options(options_of(EngineConfig, "Engine options", skip=NOT_HERE))
@with_options(sampling_options())
@click.command("chat", cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--url", help="Talk with a running server instead of loading a model.")
@click.option("--api-key", help="The server's key. [default: QUIRE_API_KEY]")
@click.option("--system", help="The system message.")
@click.option("--verbose", "-v", is_flag=True, help="Show the engine's log, and counts after each answer.")
def command(model: str | None, system: str | None, verbose: bool, **values: Any) -> None:
    """Talk with MODEL: a folder, a hub id, quire-tiny (the default), or with --url the server's model of that name.

    Type /help there. Reads standard input line by line if it is not a terminal.
    """
    sampling = given_sampling(values)
    check(sampling)
    log.setup("INFO" if verbose else "WARNING")
    preset = values.get("preset")
    speaker = open_speaker({**values, "model": model})
    try:
        conversation = Conversation(speaker, sampling, preset, system, verbose)
        if sys.stdin.isatty():
            where = getattr(speaker, "url", "this machine")
            click.echo(f"{speaker.name} on {where}. /help lists commands, /exit or Ctrl-D leaves.")
        with _history():
            _loop(conversation)
    finally:
        speaker.close()


def _loop(conversation: Conversation) -> None:
    terminal = sys.stdin.isatty()
    while True:
        try:
            message = _read_message(terminal)
        except EOFError:
            if terminal:
                click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(/exit or Ctrl-D leaves)")
            continue
        try:
            if message.startswith("/"):
                if conversation.command(message) is False:
                    return
            elif message.strip():
                conversation.say(message)
        except (EngineDead, Unavailable):
            raise
        except QuireError as error:
            click.echo(f"error: {getattr(error, 'message', None) or error}", err=True)


def _read_message(terminal: bool) -> str:
    """One line, or several between two fences."""
    line = input(">>> " if terminal else "")
    if not line.startswith(FENCE):
        return line
    lines = [line[len(FENCE) :]]
    while not lines[-1].endswith(FENCE):
        lines.append(input("... " if terminal else ""))
    lines[-1] = lines[-1][: -len(FENCE)]
    return "\n".join(lines).strip("\n")


class Conversation:
    """Messages, sampling values and the last answer; one method for each command."""

    def __init__(
        self, speaker: Speaker, sampling: dict[str, Any], preset: str | None, system: str | None, verbose: bool = False
    ) -> None:
        self.speaker, self.sampling, self.preset, self.system, self.verbose = speaker, sampling, preset, system, verbose
        self.messages: list[dict[str, Any]] = []
        self.answers: list[Answer] = []

    def say(self, message: str) -> None:
        """Send a message and print the answer as it comes. What was shown of a stopped answer stays in the conversation."""
        asked = {"role": "user", "content": message}
        system = [{"role": "system", "content": self.system}] if self.system else []
        request = TextRequest(
            request_id=f"chat-{len(self.answers)}",
            messages=[*system, *self.messages, asked],
            sampling=self.sampling,
            preset=self.preset,
            add_special_tokens=False,
        )
        answer = Answer()
        stream = self.speaker.stream(request, answer)
        stopped = False
        try:
            with closing(stream) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stopped = True
        click.echo(" [stopped]" if stopped else "")
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        if answer.finish_reason == "length" and not stopped:
            click.echo("(cut off at the token limit; /set max_tokens N, or /reset to free the context)", err=True)
        if self.verbose:
            click.echo(answer.summary(), err=True)

    def command(self, line: str) -> bool:
        """Run a `/command`; False when it is time to leave."""
        name, _, rest = line[1:].partition(" ")
        if name in ("exit", "quit", "bye"):
            return False
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS)
            raise InvalidRequest(f"no command /{name}.{hint} /help lists them; a message may begin with a space and /.")
        COMMANDS[name][0](self, rest.strip())
        return True

    def set_value(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            shown = (
                ", ".join(f"{key}={value}" for key, value in self.sampling.items()) or "nothing set; the model's defaults hold"
            )
            click.echo(f"{shown}\nNames: {', '.join(SAMPLING)}")
            return
        plain = name.replace("-", "_")
        if value in ("", "default"):
            if plain not in SAMPLING:
                parse(plain, value)  # says what is known
            self.sampling.pop(plain, None)
            click.echo(f"{plain} is the model's or preset's again")
            return
        changed = {**self.sampling, plain: parse(plain, value)}
        check(changed)
        self.sampling = changed
        click.echo(f"{plain} = {changed[plain]}")

    def set_preset(self, rest: str) -> None:
        from quire import presets

        if not rest:
            click.echo(f"preset: {self.preset or 'none'}. Known: {', '.join(presets.names())}, off")
        elif rest in ("off", "none"):
            self.preset = None
            click.echo("no preset of this conversation; what the engine or server was started with holds")
        else:
            row = presets.find(rest)
            self.preset = row.name
            values = ", ".join(f"{key}={value}" for key, value in row.sampling.items())
            click.echo(f"{row.title}: {values or 'about deployment only, so nothing changes here'}")

    def stats(self, _rest: str) -> None:
        if not self.answers:
            click.echo("no answer yet")
            return
        tokens = sum(answer.tokens for answer in self.answers)
        click.echo(f"last: {self.answers[-1].summary()}\nall: {len(self.answers)} answers, {tokens} tokens written")

    def reset(self, _rest: str) -> None:
        self.messages.clear()
        click.echo("the conversation is empty")

    def set_system(self, rest: str) -> None:
        if rest:
            self.system = None if rest == "off" else rest
        click.echo(f"system: {self.system or 'none'}")

    def help(self, _rest: str) -> None:
        width = max(len(usage) for _, usage, _ in COMMANDS.values())
        for _, usage, text in COMMANDS.values():
            click.echo(f"{usage:<{width}}  {text}")
        click.echo(f"{'/exit':<{width}}  Leave (also Ctrl-D). Ctrl-C stops an answer.")
        click.echo(f"{FENCE:<{width}}  Begins and ends a message of several lines.")


COMMANDS: dict[str, tuple[Callable[[Conversation, str], None], str, str]] = {
    "set": (Conversation.set_value, "/set [NAME [VALUE]]", "Set a sampling value; without VALUE take it back."),
    "preset": (Conversation.set_preset, "/preset [NAME|off]", "Use a scenario's sampling values."),
    "system": (Conversation.set_system, "/system [TEXT|off]", "Set the system message."),
    "stats": (Conversation.stats, "/stats", "Tokens and speed of the last answer."),
    "reset": (Conversation.reset, "/reset", "Forget the conversation, keep the settings."),
    "help": (Conversation.help, "/help", "This list."),
}


class _history:
    """Line editing and a history that outlives the session, where the terminal's library is there."""

    def __enter__(self) -> None:
        self._readline: Any = None
        if not sys.stdin.isatty():
            return
        with suppress(ImportError, OSError):
            import readline

            self._file = envs.cache_dir() / "chat_history"
            self._file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(HISTORY_LINES)
            self._readline = readline
            readline.read_history_file(self._file)

    def __exit__(self, *_error: object) -> None:
        if self._readline is not None:
            with suppress(OSError):
                self._readline.write_history_file(self._file)
                self._file.chmod(0o600)
