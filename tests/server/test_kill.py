"""`kill -9`, as a process meets it: what was acknowledged is there after it, and an interrupted job ends as if it were not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.running import wait_for

PROGRAM = """
import json, sys
given = json.loads(sys.argv[1])
from quire.config import EngineConfig
from quire.server.app import serve
from quire.server.options import ServerOptions
from quire.service import trainer
trainer.SAVE_SECONDS = given["save_seconds"]
serve(EngineConfig(model=given["model"], dtype="float32", num_gpu_blocks_override=64, enable_lora=True, max_loras=2),
      ServerOptions(port=given["port"], data_dir=given["data"], served_model_name=("tiny",)))
"""
LINE = '{{"messages": [{{"role": "user", "content": "say {0}"}}, {{"role": "assistant", "content": "fox {1}"}}]}}\n'


class Server:
    """A server over `data` that can be killed and started again. living: those that are to be killed whatever happens."""

    def __init__(self, model: Path, data: Path, port: int, living: list[subprocess.Popen[bytes]]) -> None:
        given = {"model": str(model), "data": str(data), "port": port, "save_seconds": 0.3}
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=30)
        self._log = (data.parent / "log.txt").open("a")
        command = [sys.executable, "-c", PROGRAM, json.dumps(given)]
        self.process = subprocess.Popen(command, stderr=self._log, cwd=Path(__file__).parents[2], env={**os.environ})
        living.append(self.process)
        wait_for(lambda: self._ready() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, (data.parent / "log.txt").read_text()

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self._log.close()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def begin(tiny_llama: Path, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Starts a server over tmp_path/data."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    living: list[subprocess.Popen[bytes]] = []
    yield lambda: Server(tiny_llama, tmp_path / "data", port, living)
    for process in living:
        if process.poll() is None:
            process.kill()
            process.wait(30)


def rows(count: int) -> bytes:
    return "".join(LINE.format(place, place % 3) for place in range(count)).encode()


def start(client: OpenAI) -> Any:
    file = client.files.create(file=("rows.jsonl", io.BytesIO(rows(16))), purpose="fine-tune")
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 16, "batch_size": 4}}}
    return client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=5,
        method=method,
        extra_body={"lora": {"r": 4}},  # type: ignore[arg-type]
    )


def steps(client: OpenAI, job: Any) -> list[int]:
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]  # type: ignore[index]


def ended(client: OpenAI, job: Any) -> Any:
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"), 90)
    return client.fine_tuning.jobs.retrieve(job.id)


def upload_until_dead(client: OpenAI, acknowledged: dict[str, str]) -> None:
    """Files of growing size, one after the other, until the server is gone."""
    for number in range(10_000):
        data = LINE.format(number, "a").encode() * (1 << number % 14)
        try:
            made = client.files.create(file=("rows.jsonl", io.BytesIO(data)), purpose="fine-tune")
        except (openai.APIConnectionError, openai.APIStatusError):
            return
        acknowledged[made.id] = hashlib.sha256(data).hexdigest()


def test_parts_that_were_acknowledged_survive(begin: Callable[[], Server], tmp_path: Path) -> None:
    data = rows(3000)
    pieces = [data[start : start + 20_000] for start in range(0, len(data), 20_000)]
    server = begin()
    asked: Any = {"bytes": len(data), "filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl"}
    made = server.client.uploads.create(**asked)
    parts = [server.client.uploads.parts.create(made.id, data=piece).id for piece in pieces[:4]]
    server.kill()
    (tmp_path / "data" / "uploads" / "blobs" / "part_without_a_row").write_bytes(b"half done")

    server = begin()
    assert {path.name for path in (tmp_path / "data" / "uploads" / "blobs").iterdir()} == set(parts)
    parts += [server.client.uploads.parts.create(made.id, data=piece).id for piece in pieces[4:]]
    done = server.client.uploads.complete(made.id, part_ids=parts)
    server.kill()

    server = begin()
    assert server.client.files.content(done.file.id).read() == data
    assert not list((tmp_path / "data" / "uploads" / "blobs").iterdir())
    assert server.client.uploads.complete(made.id, part_ids=parts).file.id == done.file.id
    assert server.terminate() == 0


def test_killed_in_the_middle_of_everything(begin: Callable[[], Server], tmp_path: Path) -> None:
    data = tmp_path / "data"
    acknowledged: dict[str, str] = {}
    server = begin()
    job = start(server.client)
    uploading = threading.Thread(target=upload_until_dead, args=(server.client, acknowledged))
    uploading.start()
    wait_for(lambda: len(steps(server.client, job)) >= 6, 60)
    told = steps(server.client, job)
    server.kill()
    uploading.join(60)
    assert acknowledged

    server = begin()
    found = {file.id: file for file in server.client.files.list()}
    assert set(acknowledged) <= set(found), "no acknowledged file is lost"
    for id, digest in acknowledged.items():
        assert hashlib.sha256(server.client.files.content(id).read()).hexdigest() == digest
    assert not list((data / "tmp").iterdir()), "half of an upload is nothing"
    assert {path.name for path in (data / "blobs").iterdir()} >= set(acknowledged.values())
    assert steps(server.client, job)[: len(told)] == told, "nor is an event"
    resumed = ended(server.client, job)
    assert resumed.status == "succeeded", resumed.error
    assert steps(server.client, job) == list(range(1, 65)), "each step is told once"
    straight = ended(server.client, start(server.client))
    weights = [data / "adapters" / one.id / "final" / "adapter_model.safetensors" for one in (resumed, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "as if nothing had happened"

    asked: Any = {"model": resumed.fine_tuned_model, "messages": [{"role": "user", "content": "say 1"}], "max_tokens": 4}
    answer = server.client.chat.completions.create(**asked, temperature=0).choices[0].message.content
    assert server.terminate() == 0
    server = begin()
    assert server.client.chat.completions.create(**asked, temperature=0).choices[0].message.content == answer
    assert server.client.models.retrieve(resumed.fine_tuned_model).id == resumed.fine_tuned_model
    assert server.terminate() == 0
