"""generate and chat: against a local engine, a server that speaks OpenAI's dialect, and one that misbehaves."""

from __future__ import annotations

import http.server
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from quire.cli.answer import Answer
from quire.cli.chat import Conversation
from quire.cli.remote import RemoteModel
from quire.errors import ConfigError, InvalidRequest, Unavailable
from quire.service.requests import TextRequest
from tests.cli.running import Quire, fresh


class Echo:
    """A speaker that repeats the last message word by word."""

    name = "echo"

    def __init__(self) -> None:
        self.requests: list[TextRequest] = []
        self.stop_after: int | None = None

    def stream(self, request: TextRequest, answer: Answer) -> Iterator[str]:
        self.requests.append(request)
        for count, word in enumerate(request.messages[-1]["content"].split(" ")):
            if count == self.stop_after:
                raise KeyboardInterrupt
            answer.add(word + " ")
            answer.tokens += 1
            yield word + " "
        answer.finish_reason = "stop"
        answer.end()

    def close(self) -> None: ...


@pytest.fixture
def talk() -> Conversation:
    return Conversation(Echo(), {"max_tokens": 5}, None, "Be brief.")


def test_conversation_keeps_its_messages(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.say("one two")
    talk.say("three")
    sent = talk.speaker.requests[-1].messages  # type: ignore[attr-defined]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert capsys.readouterr().out == "one two \nthree \n"
    talk.command("/reset")
    talk.say("four")
    assert len(talk.speaker.requests[-1].messages) == 2  # type: ignore[attr-defined]


def test_ctrl_c_stops_the_answer_not_the_conversation(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.speaker.stop_after = 2  # type: ignore[attr-defined]
    talk.say("one two three four")
    assert capsys.readouterr().out == "one two  [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "one two "}


def test_set(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.command("/set temperature 0.5")
    talk.command("/set top-k 3")
    talk.command("/set stop END")
    assert talk.sampling == {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "stop": ["END"]}
    talk.command("/set temperature default")
    assert "temperature" not in talk.sampling
    for wrong in ("/set temperature 7", "/set temprature 1", "/set max_tokens 0", "/set top_k many", "/set ignore_eos maybe"):
        with pytest.raises(InvalidRequest):
            talk.command(wrong)
    assert talk.sampling == {"max_tokens": 5, "top_k": 3, "stop": ["END"]}


def test_preset_system_stats_and_leaving(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.command("/preset translation")
    talk.command("/system off")
    talk.say("x")
    assert talk.speaker.requests[-1].preset == "summarize"  # type: ignore[attr-defined]
    assert len(talk.speaker.requests[-1].messages) == 1  # type: ignore[attr-defined]
    talk.command("/stats")
    assert "all: 1 answers, 1 tokens written" in capsys.readouterr().out
    with pytest.raises(InvalidRequest, match='Did you mean "stats"'):
        talk.command("/stat")
    assert talk.command("/help") is True
    assert talk.command("/exit") is False


class Handler(http.server.BaseHTTPRequestHandler):
    """Just enough of the dialect; `seen` keeps the bodies, `answer_with` replaces the answer."""

    seen: ClassVar[list[dict[str, Any]]] = []
    answer_with: ClassVar[tuple[int, bytes] | None] = None

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "remote-model"}]}).encode())

    def do_POST(self) -> None:
        type(self).seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.answer_with is not None:
            self._send(*self.answer_with)
            return
        chat = self.path.endswith("chat/completions")
        events = [{"choices": [{"delta": {"role": "assistant"}, "text": ""}]}]
        events += [{"choices": [{"delta": {"content": word}, "text": word}]} for word in ("Grü", "ße")]
        events += [{"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]}]
        events += [{"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + [": still here\n\n", "data: [DONE]\n\n"]
        assert chat or self.path == "/v1/completions"
        self._send(200, "".join(lines).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Handler, "seen", [])
    monkeypatch.setattr(Handler, "answer_with", None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_generate_from_a_url(quire: Quire, url: str, suffix: str) -> None:
    ran = quire("generate", "Hallo", "--url", url + suffix, "--temperature", "0.5", "--preset", "chat")
    assert (ran.code, ran.out) == (0, "Grüße\n")
    assert "prompt 4 tokens" in ran.err
    body = Handler.seen[0]
    assert (body["model"], body["prompt"], body["temperature"], body["preset"]) == ("remote-model", "Hallo", 0.5, "chat")


def test_generate_as_json(quire: Quire, url: str) -> None:
    facts = json.loads(quire("generate", "Hallo", "--url", url, "--json", "--system", "Be kind.").out)
    assert (facts["text"], facts["completion_tokens"], facts["finish_reason"]) == ("Grüße", 2, "stop")
    assert [message["role"] for message in Handler.seen[0]["messages"]] == ["system", "user"]


def test_chat_from_a_pipe(url: str) -> None:
    ran = fresh("chat", "--url", url, input='hello\n/stats\n"""a\nb"""\n/nope\n')
    assert ran.code == 0
    assert ran.out.startswith("Grüße\nlast: prompt 4 tokens")
    assert "no command /nope" in ran.err
    assert [body["messages"][-1]["content"] for body in Handler.seen] == ["hello", "a\nb"]


@pytest.mark.parametrize(
    "status, kind", [(400, InvalidRequest), (404, InvalidRequest), (401, ConfigError), (503, Unavailable), (429, Unavailable)]
)
def test_errors_of_the_server(url: str, status: int, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "answer_with", (status, b'{"error": {"message": "what is wrong"}}'))
    with pytest.raises(kind, match="what is wrong"):
        list(RemoteModel(url).stream(TextRequest("x", prompts=("a",)), Answer()))


def test_error_in_mid_stream(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "answer_with", (200, b'data: {"error": {"message": "broke"}}\n\ndata: [DONE]\n\n'))
    with pytest.raises(Unavailable, match="broke"):
        list(RemoteModel(url).stream(TextRequest("x", prompts=("a",)), Answer()))


def test_no_server_and_no_url() -> None:
    with pytest.raises(Unavailable, match=r"no server at http://127\.0\.0\.1:9"):
        RemoteModel("127.0.0.1:9")
    with pytest.raises(ConfigError, match="--url must be"):
        RemoteModel("ftp://x")


ENGINE = ("--num-gpu-blocks-override", "64", "--max-num-batched-tokens", "64", "--dtype", "float32")


def test_generate_here(quire: Quire, tiny_llama: Path) -> None:
    words = ("generate", "the quick", "-m", str(tiny_llama), *ENGINE, "--max-tokens", "12", "--ignore-eos")
    plain = quire(*words, "--seed", "3", "--temperature", "0.8")
    facts = json.loads(quire(*words, "--seed", "3", "--temperature", "0.8", "--json").out)
    assert plain.code == 0
    assert plain.out == facts["text"] + "\n"
    assert (facts["completion_tokens"], facts["finish_reason"]) == (12, "length")
    greedy = json.loads(quire(*words, "--preset", "code", "--json").out)
    again = json.loads(quire(*words, "--temperature", "0", "--json").out)
    assert greedy["text"] == again["text"]


def test_default_length_gives_way_to_the_room_that_is_left(quire: Quire, tiny_llama: Path) -> None:
    prompt = "x y z " * 80
    facts = json.loads(quire("generate", prompt, "-m", str(tiny_llama), *ENGINE, "--ignore-eos", "--json").out)
    assert facts["completion_tokens"] == min(256, 512 - facts["prompt_tokens"]) < 256


def test_prompt_that_is_too_long(quire: Quire, tiny_llama: Path) -> None:
    ran = quire("generate", "x y z " * 500, "-m", str(tiny_llama), *ENGINE)
    assert (ran.code, "maximum context length is 512" in ran.err) == (6, True)


def test_chat_here(tiny_llama: Path) -> None:
    ran = fresh("chat", str(tiny_llama), *ENGINE, "--max-tokens", "4", "--ignore-eos", input="hello\nand\n/stats\n")
    assert ran.code == 0, ran.err
    assert "all: 2 answers, 8 tokens written" in ran.out


def test_ctrl_c_in_a_real_process(tiny_llama: Path) -> None:
    """One signal stops the answer, and the same process answers the next message."""
    command = [sys.executable, "-u", "-m", "quire.cli", "chat", str(tiny_llama), *ENGINE, "--ignore-eos"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what runs in the background with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"/set min_tokens 300\nhello\n")
    process.stdin.flush()
    process.stdout.readline()  # the value that was set
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    shown = b""
    while b"[stopped]" not in shown and time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1)[0]:
            shown += process.stdout.read1()
    assert b"[stopped]" in shown
    out, _ = process.communicate(b"/set min_tokens default\n/set max_tokens 2\nagain\n/stats\n", timeout=60)
    assert b"all: 2 answers" in out
    assert process.returncode == 0
