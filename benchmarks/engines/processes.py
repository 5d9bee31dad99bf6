"""Processes that are started, watched and ended with everything they started themselves.

Every process leads a group of its own, so that Ctrl-C reaches this program alone, which then ends exactly what it began.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import ENVIRONMENT

GRACE_SECONDS, LEAST_GRACE = 15.0, 2.0
MIB = 1024


class TooSlow(Exception):
    """A deadline has passed; the message, if there is one, says which."""


class Failed(Exception):
    """The process said that it cannot, or ended. kind: the name of the exception on its side."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class OneInterruption:
    """A signal handler that interrupts once: a second signal must not cut off the cleaning up that the first began."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, number: int, frame: object) -> None:
        if not self.happened:
            self.happened = True
            raise KeyboardInterrupt


class Running:
    """A started command. `log`: where its standard error (and, without `pipes`, its output) goes."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path, *, pipes: bool = False
    ) -> None:
        self.began = time.monotonic()
        self._log, self._peak_kib, self._buffer = log, 0, b""
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**ENVIRONMENT, **environment},
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else file,
                stderr=file,
                start_new_session=True,
            )
        # Forgotten children (an engine's workers) keep this group or can be found below the process while it lives.
        self._family: set[tuple[int, str]] = set()
        self._meet()

    def ask(self, question: Any, deadline: float) -> dict[str, Any]:
        """Send one line of JSON and wait for the answer. Raises TooSlow and Failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise Failed(f"the process has ended: {self.last_words()}") from None
        return self.answer(deadline)

    def whole_output(self, deadline: float) -> str:
        """Everything that it prints until it ends well. Raises TooSlow and Failed."""
        try:
            output, _ = self.process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TooSlow from None
        if self.process.returncode:
            raise Failed(f"the process has ended: {self.last_words()}")
        return output.decode(errors="replace")

    def answer(self, deadline: float) -> dict[str, Any]:
        """The next line of JSON."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TooSlow
            if select.select([descriptor], [], [], min(left, 1.0))[0]:
                piece = os.read(descriptor, 1 << 20)
                if not piece:
                    raise Failed(f"the process has ended: {self.last_words()}")
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise Failed(values["error"], values.get("kind", ""))
        return values

    def peak_mib(self) -> int:
        """The most memory that the process and its living descendants held, each at its own peak (shared pages count twice)."""
        self._meet()
        self._peak_kib = max(self._peak_kib, sum(_peak_kib(pid) for pid, _ in self._living()))
        return self._peak_kib // MIB

    def last_words(self) -> str:
        """The end of its log, for a message."""
        with suppress(OSError):
            text = self._log.read_bytes()[-4000:].decode(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return " | ".join(lines[-3:])[:400]
        return "no log"

    def close(self, grace: float = GRACE_SECONDS) -> None:
        """End it and everything below it: by closing its input, where it has `grace` seconds, by asking, then by force."""
        self._meet()
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            self._wait(grace)
        for number, seconds in ((signal.SIGTERM, max(grace, LEAST_GRACE)), (signal.SIGKILL, GRACE_SECONDS)):
            if self.process.returncode is None:
                self._meet()
            left = self._living()
            if not left:
                break
            for pid, _ in left:
                with suppress(OSError):
                    os.kill(pid, number)
            self._wait(seconds)
        self._wait(GRACE_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _meet(self) -> None:
        """Remember who is there now; by number and birth, as a number may be given again to somebody else."""
        found = ((pid, _birth(pid)) for pid in {self.process.pid, *descendants(self.process.pid), *members(self.process.pid)})
        self._family |= {(pid, birth) for pid, birth in found if birth is not None}

    def _living(self) -> set[tuple[int, str]]:
        return {(pid, birth) for pid, birth in self._family if _birth(pid) == birth}

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not self._living():
                return
            time.sleep(0.05)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, error: type[BaseException] | None, *_rest: object) -> None:
        # What was interrupted is in the middle of something and would not look at its input.
        self.close(GRACE_SECONDS if error is None else 0.0)


def _everybody() -> list[tuple[int, int, int]]:
    """(number, parent, group) of every process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                # The name in brackets may hold spaces: parent and group are the second and third field after it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found.append((int(entry.name), int(fields[1]), int(fields[2])))
    return found


def members(group: int) -> set[int]:
    """The processes of a group, also those whose parents have ended."""
    return {pid for pid, _, own in _everybody() if own == group}


def descendants(pid: int) -> set[int]:
    """Everything that was started below a process and is still linked to it."""
    children: dict[int, list[int]] = {}
    for number, parent, _ in _everybody():
        children.setdefault(parent, []).append(number)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def _peak_kib(pid: int) -> int:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    return 0


def _birth(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None once it has ended."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] not in "ZX" else None
    return None
