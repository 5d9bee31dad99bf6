"""The journey of docs/journey.md: its data set, a short run of it, and that the page's commands exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sqlite3
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from quire.cli.main import run
from quire.datasets import sql

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "journey.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/sql_journey.py as a module."""
    spec = importlib.util.spec_from_file_location("sql_journey", ROOT / "examples" / "sql_journey.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_held_out_content_is_ever_trained_on() -> None:
    trained = {one.content for one in islice(sql.examples(0, held_out=False), 3000)}
    judged = list(islice(sql.examples(0, held_out=True), 500))
    assert not trained & {one.content for one in judged}
    # Nothing of it is foreign: each word of a held-out question was seen in some other combination.
    words = {word for one in islice(sql.examples(0, held_out=False), 6000) for word in re.findall(r"\w+", one.question)}
    assert {word for one in judged for word in re.findall(r"\w+", one.question)} <= words


def test_queries_are_right_sql_for_their_schema() -> None:
    """SQLite understands each one, and finds its table and columns where the schema says that they are."""
    for one in islice(sql.examples(1, held_out=False), 300):
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE {one.schema}")
            database.execute(one.query).fetchall()
        name, columns = one.schema.rstrip(")").split("(")
        named = re.findall(r"[a-z_]+", re.sub(r"'[^']*'", "", one.query))
        assert set(named) <= {name, *columns.split(", ")}, one


def test_the_same_seed_writes_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "50", "--held-out", "20"]
    for name, seed in (("first", "3"), ("second", "3"), ("third", "4")):
        assert run(["data", "sql", "--output", str(tmp_path / name), "--seed", seed, *words]) == 0
    read = {name: (tmp_path / name / "train.jsonl").read_bytes() for name in ("first", "second", "third")}
    assert read["first"] == read["second"] != read["third"]
    assert len(read["first"].splitlines()) == 50
    row = json.loads(read["first"].splitlines()[0])
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    capsys.readouterr()
    assert run(["data", "sql", "--output", str(tmp_path / "no"), "--tables", "car"]) == 3
    assert 'Did you mean "cars"?' in capsys.readouterr().err
    assert run(["data", "sql", "--output", str(tmp_path / "no"), "--rows", "0"]) == 3
    assert not (tmp_path / "no").exists()


def test_held_out_questions_come_to_be_answered(example: ModuleType, tmp_path: Path) -> None:
    """A fifteenth of the journey's training, on one table: 0 of 40 before, 8 when this was written (36 s of processor time)."""
    options = {"learning_rate": 4e-3, "sample_steps": 25, "eval_steps": 1000, "threads": 1}
    found = example.journey(tmp_path, 1200, 40, tables=["employees"], **options)
    assert found["base"] == 0
    assert found["adapter"] >= 0.1
    assert abs(found["merged"] - found["adapter"]) <= 0.1
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_page_names_commands_that_exist() -> None:
    """Each command of the page, with its options, as far as --help or a dry run goes."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if "quire " in line]
    named = [words for words in commands if words[0] == "quire"]
    assert {words[1] for words in named} == {"data", "train", "serve", "merge"}
    for words in named:
        assert run([*words[1:], "--help"]) == 0, words
