"""/v1/files through the real client: upload, list, read, delete; what is refused, and whose files are seen."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.running import RunningServer

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def keyed(trainer_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("files")
    with RunningServer(trainer_engine, data_dir=str(folder), api_key=("one", "two"), max_upload_bytes=100_000) as running:
        yield running
        running.application.fine_tuning.close()


def client_of(server: RunningServer, key: str = "one") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def upload(client: OpenAI, data: bytes = LINE, name: str = "rows.jsonl", **more: Any) -> Any:
    return client.files.create(file=(name, io.BytesIO(data)), purpose=more.pop("purpose", "fine-tune"), **more)


def test_upload_read_list_delete(keyed: RunningServer) -> None:
    client = client_of(keyed)
    data = LINE * 500
    made = upload(client, data)
    assert made.id.startswith("file-")
    raw = made.model_dump()
    assert raw == {
        "id": made.id, "object": "file", "bytes": len(data), "created_at": made.created_at, "expires_at": None,
        "filename": "rows.jsonl", "purpose": "fine-tune", "status": "processed", "status_details": None,
    }  # fmt: skip
    assert client.files.wait_for_processing(made.id, poll_interval=0.01).status == "processed"
    assert client.files.content(made.id).read() == data
    assert client.files.retrieve(made.id).model_dump() == raw
    assert made.id in [file.id for file in client.files.list()]
    gone = client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(made.id)
        fault = caught.value
        assert (fault.type, fault.param, fault.code) == ("invalid_request_error", "id", None)
        assert fault.body["message"] == f"No such File object: {made.id}"  # type: ignore[index]


def test_pages_in_both_orders_also_while_deleting(keyed: RunningServer) -> None:
    client = client_of(keyed)
    ids = [upload(client, LINE * (n + 1), purpose="user_data").id for n in range(5)]
    found = [file.id for file in client.files.list(limit=2, purpose="user_data", order="asc")]
    assert found == ids
    assert [file.id for file in client.files.list(limit=3, purpose="user_data")] == ids[::-1]
    page = httpx.get(f"{keyed.url}/v1/files?limit=2&purpose=user_data", headers={"authorization": "Bearer one"}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    seen = []
    for file in client.files.list(limit=2, purpose="user_data"):
        client.files.delete(file.id)
        seen.append(file.id)
    assert seen == ids[::-1], "a deleted file still marks its place"
    assert not list(client.files.list(purpose="user_data"))


def test_another_key_sees_nothing(keyed: RunningServer) -> None:
    mine, other = client_of(keyed), client_of(keyed, "two")
    made = upload(mine)
    same = upload(other)
    assert made.id not in [file.id for file in other.files.list()]
    for ask in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        other.files.list(after=made.id)
    assert caught.value.param == "after"
    other.files.delete(same.id)
    assert mine.files.content(made.id).read() == LINE, "equal contents of two keys are freed one by one"


@pytest.mark.parametrize(
    "data, said",
    [
        (b"not json\n", "Line 1 is not JSON"),
        (LINE + b"[1]\n" + LINE + b"3\n", "Line 2 is not a dictionary but list. Line 4 is not a dictionary"),
        (LINE + b"\n" + LINE, "Line 2 is empty"),
        (b'{"a": "\xff"}\n', "Line 1 is not UTF-8"),
        (b"[" * 100_000, "Line 1 is"),
        (b"x\n" * 30, "And 20 more."),
    ],
)
def test_not_json_lines(keyed: RunningServer, data: bytes, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client_of(keyed), data[:99_000])
    assert caught.value.type == "invalid_request_error"
    message = caught.value.body["message"]  # type: ignore[index]
    assert message.startswith("Expected file to have JSONL format, where every line is a valid JSON dictionary.")
    assert said in message


def test_what_else_is_refused(keyed: RunningServer) -> None:
    client = client_of(keyed)
    before = len(list(client.files.list()))
    for more, parameter in (
        ({"purpose": "nonsense"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 10}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "yesterday", "seconds": 3600}}, "expires_after.anchor"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            upload(client, **more)
        assert caught.value.param == parameter
    with pytest.raises(openai.BadRequestError, match="empty"):
        upload(client, b"")
    for query, parameter in (("limit=0", "limit"), ("limit=10001", "limit"), ("order=up", "order"), ("after=x", "after")):
        answer = httpx.get(f"{keyed.url}/v1/files?{query}", headers={"authorization": "Bearer one"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, parameter)
    kept = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert kept.expires_at == kept.created_at + 3600
    assert len(list(client.files.list())) == before + 1, "nothing of what was refused is kept"
    assert not list((keyed.application.fine_tuning.folder / "tmp").iterdir())


def test_too_large_and_wrong_forms(keyed: RunningServer) -> None:
    key = {"authorization": "Bearer one"}
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client_of(keyed), LINE * 2000)
    assert caught.value.status_code == 413
    url = f"{keyed.url}/v1/files"
    assert httpx.post(url, json={"purpose": "fine-tune"}, headers=key).status_code == 415
    form = {**key, "content-type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../etc/passwd"\r\n\r\n'
    purpose = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data'
    whole = head + b"data\r\n--a not a border" + purpose + b"\r\n--b--\r\n"
    for content in (b"", b"nonsense", head, whole[:-8], whole.replace(b"purpose", b"file"), b"--b\r\nX: y\r\n\r\n\r\n--b--"):
        answer = httpx.post(url, content=content, headers=form)
        assert answer.status_code == 400, (content, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"

    def slowly() -> Iterator[bytes]:
        for place in range(len(whole)):
            yield whole[place : place + 1]

    made = httpx.post(url, content=slowly(), headers=form).json()
    assert made["filename"] == "passwd", "a name is no path"
    assert httpx.get(f"{url}/{made['id']}/content", headers=key).content == b"data\r\n--a not a border"


def test_a_server_without_fine_tuning_says_so(server: RunningServer) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client_of(server).files.list()
    assert caught.value.code == "training_not_available"
    assert "--enable-fine-tuning" in str(caught.value)


def test_foreign_pages_cannot_upload(trainer_engine: Any, tmp_path: Path) -> None:
    with RunningServer(trainer_engine, data_dir=str(tmp_path), insecure=True) as running:
        form = {"content-type": "multipart/form-data; boundary=b", "origin": "http://evil.example"}
        assert httpx.post(f"{running.url}/v1/files", content=b"", headers=form).status_code == 403
        running.application.fine_tuning.close()
