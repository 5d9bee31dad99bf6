"""The command line starts at once, without torch, and says what was meant."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from quire import __version__
from quire.cli.command import NOT_BUILT, SYNONYMS
from quire.cli.main import COMMANDS, OTHER_NAMES, group, run
from tests.cli.running import Quire, fresh

HEAVY = ("torch", "numpy", "rich", "fastapi", "uvicorn", "pydantic", "transformers", "tokenizers")
CODE = """
import sys
from quire.cli.main import run
code = run({words!r})
assert code == 0, code
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & set({heavy!r}))
assert not loaded, loaded
"""
# Measured at 0.2 s alone; the bound is for a machine that runs other tests beside this one.
SECONDS = 1.5


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["generate", "--help"],
        ["chat", "--help"],
        ["presets"],
        ["presets", "--json"],
        ["presets", "show", "chat"],
        ["presets", "explain", "--help"],
        ["plan", "--help"],
        ["doctor", "--help"],
        ["doctor", "--no-torch", "--help"],
        ["models", "--help"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    subprocess.run([sys.executable, "-c", CODE.format(words=words, heavy=HEAVY)], check=True, capture_output=True)


@pytest.mark.parametrize("words", [["plan", "quire-tiny"], ["presets", "explain"], ["models"]], ids=" ".join)
def test_planning_and_listing_need_no_torch(words: list[str]) -> None:
    subprocess.run(
        [sys.executable, "-c", CODE.format(words=words, heavy=("torch", "fastapi", "uvicorn"))], check=True, capture_output=True
    )


def test_help_is_quick() -> None:
    best = SECONDS
    for _ in range(5):
        start = time.monotonic()
        ran = fresh("--help")
        best = min(best, time.monotonic() - start)
    assert ran.code == 0
    assert all(name in ran.out for name in COMMANDS)
    assert best < SECONDS


def test_version(quire: Quire) -> None:
    assert quire("--version").out == f"quire {__version__}\n"


def test_no_command_shows_help(quire: Quire) -> None:
    ran = quire()
    assert "Commands:" in ran.out + ran.err


@pytest.mark.parametrize("words", [["srve"], ["generat", "x"], ["doctr"]])
def test_misspelled_command(quire: Quire, words: list[str]) -> None:
    ran = quire(*words)
    assert ran.code == 2
    assert "Did you mean" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("name, meant", OTHER_NAMES.items())
def test_other_tools_command_names(quire: Quire, name: str, meant: str) -> None:
    ran = quire(name)
    assert ran.code == 2
    assert f'Did you mean "{meant}"?' in ran.err


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--max-context-len", "--max-model-len"),
        ("--max_model_len", "--max-model-len"),
        ("--mem-fraction-static", "--gpu-memory-utilization"),
        ("--disable-prefix-caching", "--no-enable-prefix-caching"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--prt", "--port"),
    ],
)
def test_unknown_flag_of_serve(quire: Quire, flag: str, meant: str) -> None:
    ran = quire("serve", flag, "5")
    assert ran.code == 2
    assert f'Did you mean "{meant}"?' in ran.err


def test_vllm_flags_that_are_not_built_say_so(quire: Quire) -> None:
    ran = quire("serve", "--fully-sharded-loras")
    assert (ran.code, "does not do this yet" in ran.err) == (2, True)


def test_tables_name_flags_that_exist() -> None:
    commands = [group.get_command(None, name) for name in COMMANDS]  # type: ignore[arg-type]
    known = {name for c in commands if c for p in c.params for name in (*p.opts, *p.secondary_opts)}
    assert set(SYNONYMS.values()) <= known
    serve = {name for p in group.get_command(None, "serve").params for name in p.opts}  # type: ignore[union-attr,arg-type]
    assert not serve & (set(SYNONYMS) - {"--model"})
    assert not (serve & NOT_BUILT) - {"--trust-remote-code"}
    assert set(OTHER_NAMES.values()) <= set(COMMANDS)


def test_bug_is_one_line_and_a_trace_with_debug(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("some bug")

    monkeypatch.setattr("quire.cli.plan.read_model_config", broken)
    ran = quire("plan")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "RuntimeError: some bug" in ran.err
    assert "--debug" in ran.err
    with pytest.raises(RuntimeError, match="some bug"):
        run(["plan", "--debug"])


def test_interrupt_is_130(quire: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quire.cli.plan.read_model_config", interrupted)
    assert quire("plan").code == 130


def test_exit_codes_are_distinct(quire: Quire, tiny_llama: object) -> None:
    codes = {
        "usage": quire("serve", "--nope").code,
        "option": quire("plan", str(tiny_llama), "--block-size", "3").code,
        "memory": quire("plan", str(tiny_llama), "--memory", "10M").code,
        "model": quire("plan", "/no/such/folder").code,
        "request": quire("generate", "x", "--temperature", "9").code,
        "server": quire("generate", "x", "--url", "http://127.0.0.1:9").code,
    }
    assert codes == {"usage": 2, "option": 3, "memory": 4, "model": 5, "request": 6, "server": 7}


def test_docs_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "tools/cli_docs.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
