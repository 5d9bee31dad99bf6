"""The clients that people really use, unchanged, against a real server: openai, langchain-openai and llama-index."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from tests.server.running import RunningServer, at_rest, slow_steps, wait_for

KEY = "key-of-this-test"
MODEL = "tiny"
USER: list[Any] = [{"role": "user", "content": "the quick brown fox"}]
EXTRA = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_llama: Path) -> Iterator[RunningServer]:
    engine = AsyncEngine.from_config(EngineConfig(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=128))
    with RunningServer(engine, served_model_name=(MODEL,), api_key=(KEY,), max_num_queued_reqs=16) as running:
        yield running
    engine.shutdown()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    given = {"model": MODEL, "messages": USER, "max_tokens": 8, "seed": 1, "extra_body": EXTRA, **changes}
    return client.chat.completions.create(**given)


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.content) == 8
    assert answer.usage.completion_tokens == 16


def test_openai_chat_stream(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 8
    # The client's own helper puts the stream together again.
    with (
        client.chat.completions.stream(model=MODEL, messages=USER, max_tokens=8, seed=1, extra_body=EXTRA) as stream,
        pytest.raises(openai.LengthFinishReasonError) as cut,
    ):
        stream.get_final_completion()
    assert cut.value.completion.choices[0].message.content == whole


def test_openai_completions(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "temperature": 0, "extra_body": EXTRA}
    answer = client.completions.create(prompt=["the quick", "fox"], logprobs=2, echo=True, **given)
    assert len(answer.choices) == 2
    assert answer.choices[1].text.startswith("fox")
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(prompt="fox", stream=True, **given)
    assert "fox" + "".join(chunk.choices[0].text for chunk in stream) == answer.choices[1].text


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "quire"


def test_openai_async(server: RunningServer) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            given: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "seed": 1, "messages": USER, "extra_body": EXTRA}
            answers = await asyncio.gather(*(client.chat.completions.create(**given) for _ in range(8)))
            texts = {answer.choices[0].message.content for answer in answers}
            assert len(texts) == 1, "the same request has the same answer"
            parts = [
                chunk.choices[0].delta.content or ""
                async for chunk in await client.chat.completions.create(stream=True, **given)
            ]
            assert {"".join(parts)} == texts

    asyncio.run(run())


def test_openai_cancelling_a_stream_or_a_call_ends_the_work(server: RunningServer, client: openai.OpenAI) -> None:
    with slow_steps(server.application.engine, 0.02):
        stream = chat(client, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
        wait_for(lambda: at_rest(server), 3)

        async def run() -> None:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as patient:
                call = asyncio.create_task(
                    patient.chat.completions.create(model=MODEL, messages=USER, max_tokens=400, extra_body=EXTRA)
                )
                await asyncio.sleep(0.3)
                assert server.application.admission.samples == 1
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)

        asyncio.run(run())
        wait_for(lambda: at_rest(server), 3)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(
                model=MODEL, messages=USER, max_tokens=400, extra_body=EXTRA
            )
        wait_for(lambda: at_rest(server), 3)


@pytest.mark.parametrize(
    ("changes", "kind", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors(client: openai.OpenAI, changes: dict[str, Any], kind: Any, param: str, stream: bool) -> None:
    with pytest.raises(kind) as caught:
        chat(client, stream=stream, **changes)
    error = caught.value
    assert error.param == param
    assert error.body["code"] == error.status_code
    assert error.body["message"]
    assert error.request_id
    assert chat(client).choices


def test_openai_wrong_key(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            chat(client)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_openai_does_not_repeat_what_will_fail_again(server: RunningServer) -> None:
    """With retries on, a wrong request is still sent once."""

    def counted() -> float:
        labels = {"endpoint": "/v1/chat/completions", "status": "400"}
        return server.application.engine.metrics._registry.get_sample_value("quire:http_requests_total", labels) or 0

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=2) as client:
        before = counted()
        with pytest.raises(openai.BadRequestError):
            chat(client, temperature=5)
        wait_for(lambda: counted() > before)  # the server counts once the answer is out
        assert counted() == before + 1


def test_openai_overload_is_waited_out(server: RunningServer) -> None:
    """More requests at once than the server takes: a client with retries gets every answer."""

    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=10) as client:
            given: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": USER, "extra_body": EXTRA}
            return await asyncio.gather(*(client.chat.completions.create(**given) for _ in range(24)))

    with slow_steps(server.application.engine, 0.005):
        assert len(asyncio.run(run())) == 24
    assert server.application.engine.metrics.value("vllm:admission_rejections_total", reason="queued_requests") > 0


def langchain(server: RunningServer, **changes: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "seed": 1, "max_retries": 0, "extra_body": EXTRA}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, **{**given, **changes})


def test_langchain(server: RunningServer) -> None:
    messages = [SystemMessage("be brief"), HumanMessage("the quick brown fox")]
    model = langchain(server)
    answer = model.invoke(messages)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream(messages)) == answer.content
    assert [reply.content for reply in model.batch([messages] * 3)] == [answer.content] * 3
    assert asyncio.run(model.ainvoke(messages)).content == answer.content
    again = model.invoke([*messages, answer, HumanMessage("go on")])
    assert again.content, "an answer that comes back as history is no unknown field"
    with pytest.raises(openai.BadRequestError):
        langchain(server, temperature=3).invoke(messages)


def llama_index(server: RunningServer, **changes: Any) -> OpenAILike:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "context_window": 512, "max_retries": 0, "temperature": 0.0}
    extra = {"extra_body": EXTRA}
    return OpenAILike(api_base=f"{server.url}/v1", api_key=KEY, additional_kwargs=extra, **{**given, **changes})


def test_llama_index_completion(server: RunningServer) -> None:
    model = llama_index(server, is_chat_model=False)
    answer = model.complete("the quick brown")
    assert answer.text
    assert "".join(part.delta or "" for part in model.stream_complete("the quick brown")) == answer.text
    assert asyncio.run(model.acomplete("the quick brown")).text == answer.text


def test_llama_index_chat(server: RunningServer) -> None:
    model = llama_index(server, is_chat_model=True)
    messages = [ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="fox")]
    answer = model.chat(messages)
    assert answer.message.content
    assert "".join(part.delta or "" for part in model.stream_chat(messages)) == answer.message.content
    assert model.complete("the quick brown").text


def test_nothing_is_left_behind(server: RunningServer) -> None:
    wait_for(lambda: at_rest(server))
