"""What a person sees of a run: its facts, a live bar, an example as coloured tokens, a histogram. Knows no model.

On a terminal the bar is live; elsewhere a line is written now and then, so that a log of it stays readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from quire.text.tokenizer import Tokenizer
from quire.train.data import Dataset
from quire.train.estimate import duration
from quire.train.examples import Example
from quire.train.report import StepReport

# Lines of a whole run where there is no terminal.
LINES = 20
BAR = 40
MOST_TOKENS = 2000


def say(lines: Iterable[str], show: bool = True) -> None:
    """To standard error: standard output is for results."""
    for line in lines if show else ():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Called with each report; a context manager for the bar."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self.total, self.first, self.show = total, done, show
        self.begin, self.tokens, self.seconds, self.smooth = time.monotonic(), 0, 0.0, None
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(TextColumn("Training"), *columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.first, text="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, report: StepReport) -> None:
        self.tokens, self.seconds = self.tokens + report.tokens, self.seconds + report.seconds
        self.smooth = report.loss if self.smooth is None else 0.9 * self.smooth + 0.1 * report.loss
        if not self.show:
            return
        text = self.text(report)
        checked = "" if report.validation_loss is None else f"step {report.step}: validation loss {report.validation_loss:.4f}"
        if self.bar is not None:
            self.bar.update(self.task, completed=report.step, text=text)
            if checked:
                self.bar.console.print(checked, highlight=False)
            return
        if report.step % max(1, self.total // LINES) == 0 or report.step == self.total or checked:
            say([f"step {report.step}/{self.total} {text}" + (f", {checked.partition(': ')[2]}" if checked else "")])

    def text(self, report: StepReport) -> str:
        passed = time.monotonic() - self.begin
        left = passed / max(1, report.step - self.first) * (self.total - report.step)
        return f"loss {self.smooth:.4f}, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s, {duration(left)} left"


def histogram(dataset: Dataset) -> list[str]:
    """Examples by learned tokens, as bars."""
    rows = dataset.histogram()
    most = max(count for _, _, count in rows)
    return ["Learned tokens of a row:"] + [
        f"  {low:>6,} to {high:>6,}  {'#' * max(bool(count), round(BAR * count / most)):<{BAR}} {count:,}"
        for low, high, count in rows
    ]


def preview(tokenizer: Tokenizer, example: Example) -> None:
    """One example on standard output: what is learned in colour (and between « », where there is none)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for title, one in (("", example), ("The answer that is not wanted:", example.rejected)):
        if one is None:
            continue
        if title:
            console.print(f"\n{title}")
        text, inside = Text(), False
        for place, (token, weight) in enumerate(zip(one.tokens[:MOST_TOKENS], one.weights, strict=False)):
            learned = weight > 0
            if not console.is_terminal and learned != inside:
                text.append("«" if learned else "»")
            inside = learned
            colour = ("black on green", "black on bright_green") if learned else ("dim", "none")
            text.append(tokenizer.token_text(token), style=colour[place % 2])
        if inside and not console.is_terminal:
            text.append("»")
        console.print(text)
        console.print(
            f"line {one.line or example.line}: {len(one.tokens):,} tokens, {one.supervised:,} learned", highlight=False
        )
