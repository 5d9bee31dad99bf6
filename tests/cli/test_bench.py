"""quire bench: the engine in this process, a real server, and servers that misbehave."""

from __future__ import annotations

import asyncio
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from quire.cli.bench_http import Server
from quire.errors import ConfigError
from tests.cli.running import Quire, fresh

ENGINE = ("--num-gpu-blocks-override", "64", "--max-num-batched-tokens", "64", "--dtype", "float32", "--disable-tqdm")
CHUNKS = 4


class Handler(http.server.BaseHTTPRequestHandler):
    """Streams CHUNKS events with pauses between them. `answer_with` replaces the answer, `seen` keeps bodies."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[dict[str, Any]]] = []
    connections: ClassVar[set[Any]] = set()
    answer_with: ClassVar[tuple[int, bytes] | None] = None
    pause: ClassVar[float] = 0.01

    def do_GET(self) -> None:
        self._whole(200, json.dumps({"data": [{"id": "remote-model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body)
        type(self).connections.add(self.client_address)
        if self.answer_with is not None:
            self._whole(*self.answer_with)
            return
        chat = self.path.endswith("chat/completions")
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if chat else []
        words = [{"delta": {"content": "w"}} if chat else {"text": "w"} for _ in range(CHUNKS)]
        events += [{"choices": [word]} for word in words]
        events.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": CHUNKS + 1}})
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
            time.sleep(self.pause)
        self._chunk(b": a comment\n\ndata: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        # An event may lie in two chunks.
        half = len(data) // 2
        for part in (data[:half], data[half:]) if half else (data,):
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.flush()

    def _whole(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("seen", []), ("connections", set()), ("answer_with", None), ("pause", 0.01)):
        monkeypatch.setattr(Handler, name, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def bench(quire: Quire, url: str, *words: str) -> Any:
    given = ("--base-url", url, "--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4")
    return quire("bench", "serve", *given, "--disable-tqdm", *words)


def test_serve_against_a_server_of_known_times(quire: Quire, url: str, tmp_path: Path) -> None:
    words = "--percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99 --goodput ttft:5000 tpot:5000 --save-result"
    words += " --save-detailed --result-filename r.json --max-concurrency 2 --metadata machine=mine --temperature 0.5"
    ran = bench(quire, url, *words.split(), "--num-warmups", "1", "--result-dir", str(tmp_path))
    assert (ran.code, "Successful requests:                    6" in ran.out) == (0, True)
    assert "Mean E2EL (ms):" in ran.out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (saved["completed"], saved["failed"], saved["num_prompts"], saved["model_id"]) == (6, 0, 6, "remote-model")
    assert (saved["total_input_tokens"], saved["total_output_tokens"]) == (54, 30)
    assert (saved["request_rate"], saved["max_concurrency"], saved["machine"]) == ("inf", 2, "mine")
    assert saved["request_goodput"] == pytest.approx(saved["request_throughput"])
    assert saved["max_concurrent_requests"] == 2
    assert [len(gaps) for gaps in saved["itls"]] == [CHUNKS - 1] * 6
    assert saved["mean_e2el_ms"] >= 1e3 * (CHUNKS - 1) * Handler.pause
    assert {"mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "p99_tpot_ms"} <= set(saved)
    assert len(Handler.seen) == 7
    body = Handler.seen[-1]
    assert (len(body["prompt"]), body["max_tokens"], body["ignore_eos"], body["temperature"]) == (5, 4, True, 0.5)
    # Two at a time need two connections, which are used again.
    assert len(Handler.connections) == 2


def test_serve_chat_and_rate(quire: Quire, url: str) -> None:
    ran = bench(quire, url, "--backend", "openai-chat", "--request-rate", "50", "--burstiness", "2", "--extra-body", '{"x": 1}')
    assert ran.code == 0
    assert "Request rate configured (RPS):          50.00" in ran.out
    assert "Total generated tokens:                 30" in ran.out
    assert len(Handler.seen[0]["messages"][0]["content"].split()) == 5
    assert Handler.seen[0]["x"] == 1


def test_some_requests_fail(quire: Quire, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "answer_with", (503, b'{"error": {"message": "is full"}}'))
    ran = bench(quire, url)
    assert (ran.code, "none of 6 requests was answered: HTTP 503: is full" in ran.err) == (7, True)
    monkeypatch.setattr(Handler, "answer_with", (200, b'data: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n'))
    assert "broke" in bench(quire, url).err
    monkeypatch.setattr(Handler, "answer_with", (200, b"data: [DONE]\n\n"))
    assert "the stream held no text" in bench(quire, url).err


def test_no_server(quire: Quire) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ran = bench(quire, f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (ran.code, "no server at" in ran.err, ran.err.count("\n")) == (7, True, 1)
    assert bench(quire, "ftp://x").code == 3
    with pytest.raises(ConfigError, match="--base-url must be"):
        Server("ftp://x")


def test_a_connection_that_was_closed_while_idle_is_replaced(url: str) -> None:
    async def twice() -> list[str]:
        server = Server(url + "/v1")
        names = await server.models()
        for _, writer in server._idle:
            writer.close()
        names += await server.models()
        await server.close()
        return names

    assert asyncio.run(twice()) == ["remote-model"] * 2


@pytest.mark.parametrize(
    "words, code",
    [
        (("--goodput", "ttft"), 3),
        (("--request-rate", "0"), 3),
        (("--burstiness", "-1"), 3),
        (("--num-prompts", "0"), 2),
        (("--dataset-name", "custom"), 3),
        (("--metadata", "x"), 3),
        (("--percentile-metrics", "x"), 3),
        (("--rate", "1"), 2),
    ],
    ids=str,
)
def test_wrong_flags(quire: Quire, words: tuple[str, ...], code: int) -> None:
    ran = quire("bench", "serve", *words)
    assert (ran.code, ran.err.count("\n")) == (code, 1)


def test_unknown_kind_of_benchmark(quire: Quire) -> None:
    assert 'Did you mean "latency"?' in quire("bench", "latencies").err


def test_latency_here(quire: Quire, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    words = ["--input-len", "6", "--output-len", "3", "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1"]
    ran = quire("bench", "latency", "--model", str(tiny_llama), *ENGINE, *words, "--output-json", str(path))
    assert ran.code == 0, ran.err
    saved = json.loads(path.read_text())
    assert len(saved["latencies"]) == 3
    assert saved["avg_latency"] == pytest.approx(sum(saved["latencies"]) / 3)
    assert set(saved["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert f"Avg latency: {saved['avg_latency']:.4f} seconds" in ran.out


def test_throughput_here(quire: Quire, tiny_llama: Path, tmp_path: Path) -> None:
    path, prompts = tmp_path / "throughput.json", tmp_path / "prompts.jsonl"
    words = ("bench", "throughput", "--model", str(tiny_llama), *ENGINE, "--num-prompts", "3", "--output-len", "4")
    ran = quire(*words, "--input-len", "10", "--prefix-len", "6", "--output-json", str(path))
    assert ran.code == 0, ran.err
    saved = json.loads(path.read_text())
    assert (saved["num_requests"], saved["total_num_tokens"]) == (3, 3 * (16 + 4))
    assert saved["tokens_per_second"] == pytest.approx(saved["total_num_tokens"] / saved["elapsed_time"])
    assert "Total num output tokens:  12" in ran.out
    prompts.write_text('{"prompt": "the fox"}\n{"prompt": "the dog", "output_tokens": 2}\n')
    ran = quire(*words, "--dataset-name", "custom", "--dataset-path", str(prompts))
    assert (ran.code, "Total num output tokens:  1" in ran.out) == (0, True)


def test_help_is_light() -> None:
    code = "import sys\nfrom quire.cli.main import run\nrun(['bench', 'serve', '--help'])\n"
    code += "sys.exit(bool({'torch', 'numpy', 'rich', 'fastapi', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    assert "latency" in fresh("bench", "--help").out


def test_ctrl_c_is_clean(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "pause", 5.0)
    process = subprocess.Popen(
        [sys.executable, "-m", "quire.cli", "bench", "serve", "--base-url", url, "--num-prompts", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what runs in the background with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(Handler.seen) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"error: interrupted.")
