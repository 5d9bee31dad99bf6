"""What is started is ended, with everything that it started itself."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.engines.processes import Failed, OneInterruption, Running, TooSlow, descendants

ECHO = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"child": child.pid}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    time.sleep(asked.get("sleep", 0))
    print(json.dumps(asked), flush=True)
"""


def running(tmp_path: Path, script: str = ECHO) -> Running:
    return Running([sys.executable, "-c", script], {"SEEN": "yes"}, tmp_path, tmp_path / "log", pipes=True)


def soon() -> float:
    return time.monotonic() + 30


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_questions_answers_and_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        child = process.answer(soon())["child"]
        assert process.ask({"a": [1]}, soon()) == {"a": [1]}
        assert child in descendants(process.process.pid)
        assert process.peak_mib() >= 5
    assert gone(child)
    assert gone(process.process.pid)


def test_a_deadline_and_an_interruption_leave_nothing(tmp_path: Path) -> None:
    begin = time.monotonic()
    with running(tmp_path) as process:
        child = process.answer(soon())["child"]
        with pytest.raises(TooSlow):
            process.ask({"sleep": 60}, time.monotonic() + 0.2)
        process.close(0.0)
    assert gone(child)
    assert time.monotonic() - begin < 20
    process = running(tmp_path)
    child = process.answer(soon())["child"]
    process.__exit__(KeyboardInterrupt)
    assert gone(child)


def test_a_child_whose_parent_has_ended_is_found(tmp_path: Path) -> None:
    orphan = "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(c.pid)"
    script = f"import json, subprocess, sys, time\nout = subprocess.run([sys.executable, '-c', {orphan!r}], stdout=-1).stdout\n"
    script = script.replace("stdout=-1", "stdout=subprocess.PIPE").replace("print(c.pid)", "print(c.pid, flush=True)")
    script = script.replace("time.sleep(60)']", "time.sleep(60)'], stdout=subprocess.DEVNULL")
    script += "print(json.dumps({'child': int(out)}), flush=True)\nsys.stdin.read()\n"
    with running(tmp_path, script) as process:
        child = process.answer(soon())["child"]
        assert child not in descendants(process.process.pid)
    assert gone(child)


def test_a_second_signal_does_not_cut_off_cleaning_up() -> None:
    handler = OneInterruption()
    with pytest.raises(KeyboardInterrupt):
        handler(2, None)
    handler(15, None)
    handler(2, None)


def test_last_words(tmp_path: Path) -> None:
    with running(tmp_path, "import sys; print('first'); sys.exit('what is wrong')") as process:
        with pytest.raises(ValueError):
            process.answer(soon())  # it is no JSON
        with pytest.raises(Failed, match="what is wrong"):
            process.ask({}, soon())


def test_an_error_is_an_exception_here(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        process.answer(soon())
        with pytest.raises(Failed, match="no memory") as caught:
            process.ask({"error": "no memory", "kind": "OSError"}, soon())
        assert caught.value.kind == "OSError"


def test_whole_output(tmp_path: Path) -> None:
    with running(tmp_path, "import os; print(os.environ['SEEN'], os.getpgid(0))") as process:
        words = process.whole_output(soon()).split()
    assert words == ["yes", str(process.process.pid)]
    assert process.process.pid != os.getpgid(0)
