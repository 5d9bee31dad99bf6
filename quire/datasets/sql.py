"""Text to SQL: a table's schema and a question in English, answered with one query.

What is held out is decided by the question's content (table, columns, values), not by its wording: a content that is held out
is never asked in training, in any words and under any schema.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from quire.datasets.sql_tables import TABLES, Numbers, Table, Words
from quire.errors import ConfigError, did_you_mean

# One content in so many is held out.
HELD_OUT_EVERY = 10
MOST_ROWS = 100_000
NAMES = tuple(table.name for table in TABLES)
FUNCTIONS = (("AVG", "average"), ("MAX", "highest"), ("MIN", "lowest"), ("SUM", "total"))


@dataclass(frozen=True)
class Example:
    """content: what is asked, without wording and without the names that the schema gives."""

    schema: str
    question: str
    query: str
    content: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.content.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """As one line of training data."""
        return {
            "messages": [
                {"role": "user", "content": f"{self.schema}\n{self.question}"},
                {"role": "assistant", "content": self.query},
            ]
        }


def write(
    folder: Path, rows: int = 16_000, held_out: int = 200, seed: int = 0, tables: Sequence[str] = NAMES
) -> tuple[Path, Path]:
    """train.jsonl and held_out.jsonl in `folder`, each whole or not there. Raises ConfigError."""
    for name, value in (("rows", rows), ("held_out", held_out)):
        if not 1 <= value <= MOST_ROWS:
            raise ConfigError(f"{name} must be from 1 to {MOST_ROWS}, got {value}.")
    for name in tables:
        if name not in NAMES:
            raise ConfigError(f"tables has {name!r}.{did_you_mean(name, NAMES)} There are {', '.join(NAMES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, count, kept in zip(paths, (rows, held_out), (False, True), strict=True):
        made = islice(examples(seed, held_out=kept, tables=tables), count)
        _write(path, "".join(json.dumps(one.messages()) + "\n" for one in made))
    return paths


def _write(path: Path, text: str) -> None:
    handle, working = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(working).chmod(0o644)
        os.replace(working, path)
    except BaseException:
        Path(working).unlink(missing_ok=True)
        raise


def examples(seed: int, *, held_out: bool, tables: Sequence[str] = NAMES) -> Iterator[Example]:
    """Without end, no schema with a question twice; those of the other half are left out."""
    random = Random(f"sql {seed} {held_out}")
    chosen = [table for table in TABLES if table.name in tables]
    seen: set[tuple[str, str]] = set()
    while True:
        example = _example(random, chosen)
        key = (example.schema, example.question)
        if example.held_out == held_out and key not in seen:
            seen.add(key)
            yield example


def _example(random: Random, tables: Sequence[Table]) -> Example:
    table = random.choice(tables)
    called = {column.noun: random.choice(column.names) for column in (*table.words, *table.numbers)}
    label = random.choice([name for name in table.names if name not in called.values()])
    columns = list(called.values())
    random.shuffle(columns)
    schema = f"{table.name}({', '.join([label, *columns])})"
    shape = random.choice((_which, _which, _count, _value, _order, _group))
    question, query, content = shape(random, table, called, label)
    return Example(schema, question, query + ";", f"{table.name} {content}")


def _conditions(random: Random, table: Table, called: dict[str, str], most: int) -> tuple[str, str, str]:
    """(the table's rows in words, WHERE ... , content) with one condition up to `most`: text first, then a number."""
    kinds = random.choice(("words", "numbers", "both")[: 2 if most == 1 else 3])
    before = after = ""
    clauses: list[str] = []
    content: list[str] = []
    if kinds != "numbers":
        words = random.choice(table.words)
        value = random.choice(words.values)
        text = words.phrase.format(value)
        before, after = (f"{text} ", "") if words.before else ("", f" {text}")
        clauses.append(f"{called[words.noun]} = '{value}'")
        content.append(f"{words.noun} {value}")
    if kinds != "words":
        numbers = random.choice(table.numbers)
        value, more = str(random.randrange(10, 100)), random.random() < 0.5
        after += " " + (numbers.more if more else numbers.less).format(value)
        clauses.append(f"{called[numbers.noun]} {'>' if more else '<'} {value}")
        content.append(f"{numbers.noun} {more} {value}")
    return f"{before}{table.name}{after}", " WHERE " + " AND ".join(clauses), " ".join(content)


def _which(random: Random, table: Table, called: dict[str, str], label: str) -> tuple[str, str, str]:
    rows, where, content = _conditions(random, table, called, 2)
    words = random.choice(("Which are the {}?", "Show all {}.", "List the {}.", "Which {} are there?"))
    return words.format(rows), f"SELECT {label} FROM {table.name}{where}", content


def _count(random: Random, table: Table, called: dict[str, str], label: str) -> tuple[str, str, str]:
    rows, where, content = _conditions(random, table, called, 2)
    words = random.choice(("How many {} are there?", "Count the {}.", "What is the number of {}?"))
    return words.format(rows), f"SELECT COUNT(*) FROM {table.name}{where}", content


def _value(random: Random, table: Table, called: dict[str, str], label: str) -> tuple[str, str, str]:
    """One column, as it is or brought together by a function, of some rows."""
    rows, where, content = _conditions(random, table, called, 1)
    if random.random() < 0.5:
        column: Words | Numbers = random.choice((*table.words, *table.numbers))
        words = random.choice(("What is the {} of the {}?", "Give me the {} of the {}."))
        query = f"SELECT {called[column.noun]} FROM {table.name}{where}"
        return words.format(column.noun, rows), query, f"{column.noun} {content}"
    numbers = random.choice(table.numbers)
    function, word = random.choice(FUNCTIONS)
    words = random.choice(("What is the {} {} of the {}?", "Find the {} {} of the {}."))
    query = f"SELECT {function}({called[numbers.noun]}) FROM {table.name}{where}"
    return words.format(word, numbers.noun, rows), query, f"{numbers.noun} {content}"


def _order(random: Random, table: Table, called: dict[str, str], label: str) -> tuple[str, str, str]:
    numbers = random.choice(table.numbers)
    count, (direction, word) = random.randrange(2, 10), random.choice((("DESC", "highest"), ("ASC", "lowest")))
    words = random.choice(("Which {count} {table} have the {word} {noun}?", "Show the {count} {table} with the {word} {noun}."))
    question = words.format(count=count, table=table.name, word=word, noun=numbers.noun)
    query = f"SELECT {label} FROM {table.name} ORDER BY {called[numbers.noun]} {direction} LIMIT {count}"
    return question, query, f"{numbers.noun} {direction} {count}"


def _group(random: Random, table: Table, called: dict[str, str], label: str) -> tuple[str, str, str]:
    column = random.choice(table.words)
    kind = random.randrange(3)
    if kind == 0:
        question, wanted, content = f"How many {table.name} are there for each {column.noun}?", "COUNT(*)", "count"
    else:
        numbers = random.choice(table.numbers)
        function, word = random.choice(FUNCTIONS)
        question = f"What is the {word} {numbers.noun} of {table.name} for each {column.noun}?"
        wanted, content = f"{function}({called[numbers.noun]})", f"{function} {numbers.noun}"
    name = called[column.noun]
    return question, f"SELECT {name}, {wanted} FROM {table.name} GROUP BY {name}", f"{column.noun} {content}"
