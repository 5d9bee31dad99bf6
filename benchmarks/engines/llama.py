"""llama.cpp as a process: how its server is started, asked and ended. Only the standard library."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

START_SECONDS, ANSWER_SECONDS = 120.0, 1200.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_command(binaries: Path, model: Path, port: int, threads: int, slots: int) -> list[str]:
    """One slot has room for the longest workload; 32 share room for all of theirs."""
    room = 4096 if slots == 1 else 40_960
    return [
        str(binaries / "llama-server"),
        *("-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads)),
        *("-np", str(slots), "-c", str(room), "-b", "2048", "-ub", "512", "-fa", "auto", "--no-webui", "--slots"),
        *("--threads-http", "40"),
    ]


class LlamaServer:
    """A running llama-server. Raises RuntimeError if it does not come up."""

    def __init__(self, binaries: Path, model: Path, threads: int, slots: int) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(server_command(binaries, model, port, threads, slots), stdout=sys.stderr)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(self._url + "/health", timeout=5).read()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise RuntimeError(f"llama-server did not start (code {self._process.returncode})") from None
                time.sleep(0.1)

    def complete(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, output), prompts))

    def _one(self, prompt: list[int], output: int) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": output,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            self._url + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            tokens: list[int] = json.load(response)["tokens"]
            return tokens

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def own_benchmark(binaries: Path, model: Path, threads: int, prompt: int, output: int, repeats: int) -> list[str]:
    """The command of llama-bench, which measures a prompt and (from an empty context) output, and prints JSON."""
    words = ("-p", prompt, "-n", output, "-r", repeats, "-t", threads, "-fa", 1, "-o", "json")
    return [str(binaries / "llama-bench"), "-m", str(model), *map(str, words)]
