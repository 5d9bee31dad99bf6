"""What the README tells a newcomer to type is typed here, word for word."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
QUIRE = [sys.executable, "-m", "quire.cli"]


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of the embedded model, as `make serve` starts it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    server = subprocess.Popen([*QUIRE, "serve", "--port", str(number)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{number}/readyz", timeout=5):
                break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    yield number
    server.terminate()
    assert server.wait(timeout=60) == 0


def test_the_readme_has_what_is_tested_here() -> None:
    assert COMMANDS[0] == "make serve"
    assert sum(command.startswith("quire ") for command in COMMANDS) >= 6
    assert sum(command.startswith("curl ") for command in COMMANDS) == 1


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("quire ")])
def test_every_command_works(command: str) -> None:
    done = run([*QUIRE, *shlex.split(command)[1:]])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_curl_streams_an_answer(port: int) -> None:
    (command,) = [command for command in COMMANDS if command.startswith("curl ")]
    done = run(shlex.split(command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")))
    assert done.returncode == 0, done.stderr
    frames = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    assert len(frames) > 3
    assert '"role":"assistant"' in frames[0].replace(" ", "")


def test_the_console_is_at_the_printed_address(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
        assert page.headers.get_content_type() == "text/html"
        assert "Quire" in page.read().decode()


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_examples_run(code: str) -> None:
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "def add(a, b):" in done.stdout


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_drawn_house_is_the_house() -> None:
    drawing = next(block for language, block in BLOCKS if language == "text")
    drawn = set(re.findall(r"^  (\w+)(?:/|\.py)", drawing, flags=re.MULTILINE))
    rooms = {path.name for path in (ROOT / "quire").iterdir() if path.is_dir() and not path.name.startswith("_")}
    rooms = {room for room in rooms if any((ROOT / "quire" / room).iterdir())}
    assert rooms <= drawn
    assert drawn - rooms == {"assemble"}
