"""A server as a process of its own: loading, ready, draining, stopped; and starts that must fail with one clear line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from quire.errors import ConfigError
from quire.server.listening import listen
from quire.server.options import ServerOptions
from tests.server.frames import stream
from tests.server.running import wait_for

# What the command line does, with a pause in loading and in every step, so that a test can act meanwhile.
PROGRAM = """
import json, sys, time
given = json.loads(sys.argv[1])
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.server.options import ServerOptions
from quire.server.app import serve
import quire.service.application as serving

load = serving.load_engine

def slowly(config):
    time.sleep(given["load_seconds"])
    engine = load(config)
    step = engine._engine.step
    def paced():
        if engine._engine.has_work():
            time.sleep(given["step_seconds"])
            if given["die_at"] and engine._engine.steps >= given["die_at"]:
                raise SystemExit("a made-up fault")
        return step()
    engine._engine.step = paced
    return engine

serving.load_engine = slowly
try:
    serve(EngineConfig(model=given["model"], dtype="float32", num_gpu_blocks_override=96),
          ServerOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in given["options"].items()}))
except QuireError as error:
    print(f"quire: {error}", file=sys.stderr)
    sys.exit(1)
"""


class Process:
    """The server in a process; its log is collected."""

    def __init__(
        self, model: Path | str, *, load_seconds: float = 0, step_seconds: float = 0.0, die_at: int = 0, **options: Any
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "model": str(model),
            "load_seconds": load_seconds,
            "step_seconds": step_seconds,
            "die_at": die_at,
            "options": {"port": self.port, **options},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(given)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def status(self, path: str) -> int:
        try:
            return httpx.get(self.url + path, timeout=2).status_code
        except httpx.TransportError:
            return 0

    def until_ready(self) -> None:
        wait_for(lambda: self.status("/readyz") == 200 or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self, seconds: float = 30) -> int:
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=5)
        return code


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


@pytest.fixture
def started(tiny_llama: Path) -> Iterator[Any]:
    processes: list[Process] = []

    def start(model: Path | str = tiny_llama, **given: Any) -> Process:
        processes.append(Process(model, **given))
        return processes[-1]

    yield start
    for process in processes:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def ask(process: Process, **changes: Any) -> httpx.Response:
    body = {"prompt": "the quick", "max_tokens": 40, "ignore_eos": True, "temperature": 0, **changes}
    return httpx.post(f"{process.url}/v1/completions", json=body, timeout=60)


def test_health_while_loading_then_ready_then_a_drain_that_finishes_everything(started: Any) -> None:
    process = started(load_seconds=1.5, step_seconds=0.03)
    wait_for(lambda: process.status("/livez") == 200, 30)
    loading = httpx.get(f"{process.url}/readyz")
    assert loading.status_code == 503
    assert loading.json()["status"] == "loading"
    early = ask(process)
    assert early.status_code == 503
    assert early.headers["retry-after"]
    assert early.json()["error"]["message"] == "the model is still loading."
    assert process.status("/v1/models") == 503
    process.until_ready()
    expected = ask(process).json()["choices"][0]["text"]
    with ThreadPoolExecutor(6) as pool, httpx.Client(base_url=process.url, timeout=60) as client:
        whole = [pool.submit(ask, process) for _ in range(3)]
        body = {"prompt": "the quick", "max_tokens": 40, "ignore_eos": True, "temperature": 0}
        streamed = pool.submit(stream, client, "/v1/completions", body)
        time.sleep(0.4)
        process.terminate()
        wait_for(lambda: process.status("/readyz") == 503, 5)
        assert httpx.get(f"{process.url}/readyz").json()["status"] == "draining"
        assert process.status("/livez") == 200
        late = ask(process)
        assert late.status_code == 503
        assert late.json()["error"]["message"] == "the server is shutting down."
        assert [answer.result().json()["choices"][0]["text"] for answer in whole] == [expected] * 3
        events = streamed.result()
        assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert process.end() == 0
    assert "ready:" in process.log
    assert "curl -N" in process.log
    assert "capacity:" in process.log


def test_drain_grace_still_takes_requests(started: Any) -> None:
    process = started(drain_grace=1.5)
    process.until_ready()
    process.terminate()
    wait_for(lambda: process.status("/readyz") == 503, 5)
    assert ask(process).status_code == 200
    assert process.end() == 0


def test_what_is_not_finished_in_time_gets_an_explicit_error(started: Any) -> None:
    process = started(step_seconds=0.05, shutdown_timeout=0.5)
    process.until_ready()
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=process.url, timeout=60) as client:
        whole = pool.submit(ask, process, max_tokens=400)
        asked = {"prompt": "fox", "max_tokens": 400, "ignore_eos": True}
        streamed = pool.submit(stream, client, "/v1/completions", asked)
        time.sleep(0.8)
        process.terminate()
        assert whole.result().status_code == 503
        assert "shutting down" in whole.result().json()["error"]["message"]
        assert "shutting down" in streamed.result()[-1]["error"]["message"]
    assert process.end() == 0


def test_a_second_signal_does_not_wait(started: Any) -> None:
    process = started(step_seconds=0.05, shutdown_timeout=60.0)
    process.until_ready()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, process, max_tokens=400)
        time.sleep(0.5)
        process.terminate()
        time.sleep(0.3)
        process.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.end() == 0
        assert time.monotonic() - began < 8
        assert asked.result().status_code == 503


def test_a_signal_while_loading(started: Any) -> None:
    process = started(load_seconds=30)
    wait_for(lambda: process.status("/livez") == 200, 30)
    process.terminate()
    assert process.end(10) == 0


def test_a_dead_engine_ends_the_server(started: Any) -> None:
    process = started(die_at=10)
    process.until_ready()
    answer = ask(process)
    assert answer.status_code == 503
    wait_for(lambda: process.status("/livez") in (503, 0), 5)
    assert process.end() == 1
    assert "the engine has died" in process.log


def test_a_corrupt_model_stops_the_start_with_one_line(started: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    process = started(tmp_path)
    assert process.end() == 1
    assert process.log.count("quire: ") == 1
    assert "Traceback" not in process.log


def test_a_busy_port_is_said_clearly(started: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            listen(ServerOptions(port=port))
    with pytest.raises(ConfigError, match="is not an address of this machine"):
        listen(ServerOptions(host="no-such-host.invalid", insecure=True))


def test_a_unix_socket(started: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "quire.sock")
    process = started(uds=path)

    def reachable() -> bool:
        if not Path(path).exists():
            return False
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://quire") as client:
            return client.get("/readyz").status_code == 200

    wait_for(reachable, 60)
    assert Path(path).stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="in use by another process"):
        listen(ServerOptions(uds=path))
    process.terminate()
    assert process.end() == 0
    assert not Path(path).exists()


def test_building_the_application_starts_nothing() -> None:
    code = (
        "import sys, threading; from quire.server.app import build_app; from quire.server.options import ServerOptions; "
        "build_app(None, ServerOptions()); assert 'torch' not in sys.modules; assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
