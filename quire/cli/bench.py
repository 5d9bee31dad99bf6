"""`quire bench`: how fast an engine or a server is, with the names of vLLM's benchmarks. Never imports torch by itself."""

from __future__ import annotations

import click

from quire.cli.bench_offline import latency, throughput
from quire.cli.bench_serve import command as serve
from quire.errors import did_you_mean


class BenchCommands(click.Group):
    """A group that says which sub-command was meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(f"no command {name!r}.{did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


@click.group("bench", cls=BenchCommands)
def command() -> None:
    """Measure an engine in this process (latency, throughput) or a running server (serve).

    Flags, metrics and JSON keys are those of `vllm bench`, so that results can be laid side by side.
    """


for _part in (latency, throughput, serve):
    command.add_command(_part)
