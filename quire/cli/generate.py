"""`quire generate`: one prompt in, its continuation out, as it is computed."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from quire import envs, log
from quire.cli.answer import Answer, Speaker
from quire.cli.command import SectionedCommand, json_flag
from quire.cli.flags import build, options_of, with_options
from quire.cli.sampling import check, given_sampling, sampling_options
from quire.config import EngineConfig
from quire.errors import InvalidRequest
from quire.service.requests import TextRequest

DEFAULT_MODEL = "quire-tiny"
DEFAULT_MAX_TOKENS = 256
# --seed is the request's here; the engine's own seed only matters to requests without one.
NOT_HERE = ("model", "seed")


@with_options(options_of(EngineConfig, "Engine options", skip=NOT_HERE))
@with_options(sampling_options())
@click.command("generate", cls=SectionedCommand)
@click.argument("prompt", required=False)
@click.option("--model", "-m", help="Folder, hub id or quire-tiny. [default: quire-tiny, or the server's first]")
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt as a user's message through the model's chat template.")
@click.option("--system", help="A system message before it (implies --chat).")
@click.option("--url", help="Ask a running server instead of loading a model.")
@click.option("--api-key", help="The server's key. [default: QUIRE_API_KEY]")
@click.option("--verbose", "-v", is_flag=True, help="Show the engine's log.")
@json_flag
def command(prompt: str | None, as_chat: bool, system: str | None, verbose: bool, as_json: bool, **values: Any) -> None:
    """Continue PROMPT (standard input if it is missing or -), streaming the text to standard output.

    Counts and speeds go to standard error. --json prints text and counts as one object instead.
    """
    sampling = given_sampling(values)
    check(sampling)
    text = _prompt(prompt)
    log.setup("INFO" if verbose else "WARNING")
    speaker = open_speaker(values)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "user", "content": text}]
    is_chat = as_chat or system is not None
    request = TextRequest(
        request_id="generate",
        prompts=() if is_chat else (text,),
        messages=messages if is_chat else None,
        sampling=sampling,
        max_tokens_default=DEFAULT_MAX_TOKENS,
        preset=values.get("preset"),
        add_special_tokens=not is_chat,
    )
    answer = Answer()
    try:
        for piece in speaker.stream(request, answer):
            if not as_json:
                click.echo(piece, nl=False)
    finally:
        speaker.close()
    if as_json:
        click.echo(json.dumps({"model": speaker.name, **answer.as_dict()}, ensure_ascii=False, indent=2))
    else:
        click.echo()
        click.echo(answer.summary(), err=True)


def open_speaker(values: dict[str, Any]) -> Speaker:
    """The server of --url, or the local engine with the engine flags among `values`."""
    url, key, model = values.pop("url"), values.pop("api_key"), values.pop("model")
    if url is not None:
        from quire.cli.remote import RemoteModel

        return RemoteModel(url, key or envs.api_key(), model)
    from quire.cli.local import LocalModel

    return LocalModel(build(EngineConfig, {**values, "model": model or DEFAULT_MODEL}))


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError('no prompt. Try: quire generate "def fibonacci(n):"')
    text = sys.stdin.read()
    if not text:
        raise InvalidRequest("the prompt on standard input is empty.")
    return text
