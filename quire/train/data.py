"""A training file: read whole, checked whole, and only then tokens. Every bad line is told with number, field and remedy.

Nothing is cut unless a maximum length was asked for, and then it says how much. Knows no model but its longest length.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, DataError
from quire.text.tokenizer import Tokenizer
from quire.train.config import TrainingConfig
from quire.train.examples import Example
from quire.train.rows import PAIRS, Problem, Row, Wrong, layout_of, read_row
from quire.train.tokens import Encoder

MOST_PROBLEMS, MOST_KEPT = 20, 1000
BUCKETS = 8


@dataclass(frozen=True)
class Dataset:
    """The examples of one file. notes: what a user should know of it, a sentence each."""

    name: str
    layout: str
    rows: int
    examples: Sequence[Example]
    notes: Sequence[str] = field(default=())

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(example.length for example in self.examples)

    @property
    def supervised(self) -> int:
        """Those of them that are learned."""
        return sum(one.supervised for example in self.examples for one in (example, example.rejected) if one is not None)

    @property
    def longest(self) -> int:
        return max(len(one.tokens) for example in self.examples for one in (example, example.rejected) if one is not None)

    def summary(self) -> str:
        share = self.supervised / max(1, self.tokens)
        return (
            f"{self.name}: {self.rows:,} rows ({self.layout}), {self.tokens:,} tokens, {self.supervised:,} of them learned "
            f"({share:.0%}), longest row {self.longest:,}"
        )

    def histogram(self) -> list[tuple[int, int, int]]:
        """(from, to, examples) by learned tokens, in powers of two."""
        counts = [example.supervised for example in self.examples]
        edges = [2**power for power in range(max(counts).bit_length() + 1)]
        rows = [(low, high - 1, sum(low <= count < high for count in counts)) for low, high in itertools.pairwise(edges)]
        while rows and not rows[0][2]:
            rows.pop(0)
        return rows


def read_dataset(
    source: Path | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: TrainingConfig,
    *,
    longest: int,
    ends: Iterable[int] = (),
    chat_template: str | None = None,
    name: str | None = None,
) -> Dataset:
    """Examples of a JSONL file (or of rows as objects). Raises DataError with the problems of all lines, ConfigError.

    longest: tokens that the model takes. ends: tokens at which the server stops, beside the tokenizer's end-of-text.
    """
    name = name or (source.name if isinstance(source, Path) else "rows")
    problems = Problems(name)
    rows, layout = _read_rows(_lines(source, problems) if isinstance(source, Path) else enumerate(source, 1), problems)
    if not rows and not problems.count:
        raise DataError(f"{name} has no rows.", [], 0)
    if layout is not None and (layout in PAIRS) != (config.method == "dpo"):
        kind = "rows with a preferred and a rejected answer" if config.method == "dpo" else "rows with one answer each"
        raise ConfigError(f"method {config.method!r} needs {kind}, but {name} is in the layout {layout!r}.")
    end = tokenizer.eos_token_id
    encoder = Encoder(
        tokenizer,
        frozenset(ends) | (frozenset() if end is None else {end}),
        config.train_on,
        chat_template,
        config.chat_template_kwargs,
    )
    examples, cut = _encode(rows, encoder, problems, longest, config.max_length)
    problems.raise_if_any()
    return Dataset(name, layout or "", len(rows), examples, tuple(_notes(rows, examples, encoder, cut, config)))


class Problems:
    """The first of them by line, and how many there are."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.first: list[Problem] = []

    def add(self, line: int, wrong: Wrong) -> None:
        self.count += 1
        bisect.insort(self.first, Problem(line, wrong.field, wrong.message), key=lambda problem: problem.line)
        del self.first[MOST_KEPT:]

    def raise_if_any(self) -> None:
        if not self.count:
            return
        told = self.first[:MOST_PROBLEMS]
        lines = "\n".join(f"  {problem}" for problem in told)
        more = f"\n  and {self.count - len(told):,} more" if self.count > len(told) else ""
        plural = "problem" if self.count == 1 else "problems"
        raise DataError(f"{self.name} has {self.count:,} {plural}; nothing was trained:\n{lines}{more}", self.first, self.count)


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, Any]]:
    """(number, object) of each line that is JSON."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"data {str(path)!r} cannot be read: {error.strerror}.") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                problems.add(number, Wrong("", f"is not UTF-8 (byte {error.start}); save the file as UTF-8."))
            except (ValueError, RecursionError) as error:
                problems.add(number, Wrong("", f"is not valid JSON ({error}); each line must be one JSON object."))


def _read_rows(lines: Iterable[tuple[int, Any]], problems: Problems) -> tuple[list[Row], str | None]:
    rows: list[Row] = []
    layout: str | None = None
    for number, value in lines:
        try:
            if not isinstance(value, Mapping):
                raise Wrong("", f"must be a JSON object, got {type(value).__name__}.")
            layout = layout or layout_of(value)
            rows.append(read_row(value, layout, number))
        except Wrong as wrong:
            problems.add(number, wrong)
    return rows, layout


def _encode(
    rows: Iterable[Row], encoder: Encoder, problems: Problems, longest: int, maximum: int | None
) -> tuple[list[Example], list[tuple[int, int]]]:
    """(examples, (line, tokens lost) of those that were cut)."""
    examples: list[Example] = []
    cut: list[tuple[int, int]] = []
    limit = longest if maximum is None else min(longest, maximum)
    for row in rows:
        try:
            for example in encoder.examples(row):
                short = _fitting(example, limit, asked=maximum is not None)
                lost = example.length - short.length
                if lost:
                    cut.append((row.line, lost))
                for one in (short, short.rejected):
                    if one is not None and not one.supervised:
                        reason = f"; the cut at {limit} tokens took them. Raise --max-length" if lost else ""
                        raise Wrong("", f"has no token to learn{reason}.")
                examples.append(short)
        except Wrong as wrong:
            problems.add(row.line, wrong)
    return examples, cut


def _fitting(example: Example, limit: int, *, asked: bool) -> Example:
    """The example itself, or its beginning where cutting was asked for. Raises Wrong."""
    rejected = None if example.rejected is None else _fitting(example.rejected, limit, asked=asked)
    if len(example.tokens) <= limit:
        return example if rejected is example.rejected else replace(example, rejected=rejected)
    if not asked:
        count = len(example.tokens)
        raise Wrong("", f"has {count:,} tokens, more than the model's {limit:,}; shorten it, or cut with --max-length.")
    prompt = min(example.prompt, limit)
    return replace(example, tokens=example.tokens[:limit], weights=example.weights[:limit], prompt=prompt, rejected=rejected)


def _notes(
    rows: Sequence[Row], examples: Sequence[Example], encoder: Encoder, cut: Sequence[tuple[int, int]], config: TrainingConfig
) -> Iterator[str]:
    unknown = Counter(name for row in rows for name in row.unknown)
    if unknown:
        yield f"Columns that are not used: {', '.join(sorted(unknown))}."
    if cut:
        lost = sum(count for _, count in cut)
        shown = ", ".join(str(line) for line, _ in cut[:10]) + (", ..." if len(cut) > 10 else "")
        yield f"Cut to {config.max_length:,} tokens: {len(cut):,} rows, {lost:,} tokens lost (lines {shown})."
    if len(examples) > len(rows):
        yield (
            f"{len(examples) - len(rows):,} sequences more than rows: the chat template writes earlier turns otherwise than "
            "they are generated, so such turns are learned one by one."
        )
    if encoder.unended:
        yield "The chat template ends a turn with no token of its own: the end-of-text token was added to each last turn."
    if encoder.strange_ends:
        names = ", ".join(repr(encoder.tokenizer.token_text(token)) for token in sorted(encoder.strange_ends))
        yield f"Turns end with {names}, at which a server does not stop unless generation_config.json names it."
    twice = sum(count - 1 for count in Counter(example.tokens for example in examples).values() if count > 1)
    if twice:
        yield f"{twice:,} rows appear more than once."


def shared_rows(training: Dataset, validation: Dataset) -> int:
    """Rows of the validation data that are in the training data too."""
    known = {example.tokens for example in training.examples}
    return sum(example.tokens in known for example in validation.examples)
