"""/v1/uploads through the real client: files in parts, whole, in order or not at all; and the permissions of checkpoints."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from quire.service import uploads
from quire.service.store import _FIRST, Store
from tests.server.running import RunningServer
from tests.server.test_files import LINE, client_of

MOST = 1_000_000
DATA = LINE * 5000


@pytest.fixture(scope="module")
def keyed(trainer_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("uploads")
    options: dict[str, Any] = {"api_key": ("one", "two"), "max_upload_bytes": 100_000, "max_parts_bytes": MOST}
    with RunningServer(trainer_engine, data_dir=str(folder), **options) as running:
        yield running
        running.application.fine_tuning.close()


@pytest.fixture
def client(keyed: RunningServer) -> OpenAI:
    return client_of(keyed)


def begun(client: OpenAI, size: int = len(DATA), **more: Any) -> Any:
    given = {"filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "application/jsonl", **more}
    return client.uploads.create(bytes=size, **given)


def held(server: RunningServer) -> list[Path]:
    return list((server.application.fine_tuning.folder / "uploads" / "blobs").iterdir())


def refused(ask: Any, *arguments: Any, **named: Any) -> tuple[int, str | None, str]:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(*arguments, **named)
    return caught.value.status_code, caught.value.param, caught.value.body["message"]  # type: ignore[index]


def test_a_file_larger_than_one_upload_comes_in_parts(keyed: RunningServer, client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    path.write_bytes(DATA)
    digest = hashlib.md5(DATA).hexdigest()
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=70_000, md5=digest
    )
    assert done.model_dump() == {
        "id": done.id, "object": "upload", "bytes": len(DATA), "created_at": done.created_at,
        "expires_at": done.created_at + 3600, "filename": "large.jsonl", "purpose": "fine-tune", "status": "completed",
        "file": client.files.retrieve(done.file.id).model_dump(),
    }  # fmt: skip
    assert (done.file.bytes, done.file.filename, done.file.status) == (len(DATA), "large.jsonl", "processed")
    assert client.files.content(done.file.id).read() == DATA
    assert not held(keyed)


def test_the_order_is_that_of_part_ids_and_what_is_not_named_is_left_out(keyed: RunningServer, client: OpenAI) -> None:
    made = begun(client, 12, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 7200})
    assert (made.status, made.file) == ("pending", None)
    first, second, again = (client.uploads.parts.create(made.id, data=data) for data in (b"hello ", b"world!", b"world!"))
    assert second.model_dump() == {
        "id": second.id, "object": "upload.part", "created_at": second.created_at, "upload_id": made.id,
    }  # fmt: skip
    assert len({part.id for part in (first, second, again)}) == 3
    done = client.uploads.complete(made.id, part_ids=[again.id, first.id])
    assert client.files.content(done.file.id).read() == b"world!hello "
    assert done.file.expires_at == done.file.created_at + 7200
    # A client whose answer was lost asks again.
    assert client.uploads.complete(made.id, part_ids=[again.id, first.id]).file.id == done.file.id
    assert refused(client.uploads.complete, made.id, part_ids=[first.id])[2] == "the upload is completed; it must be pending."
    assert refused(client.uploads.parts.create, made.id, data=b"more")[0] == 400
    assert refused(client.uploads.cancel, made.id)[0] == 400
    assert not held(keyed)


def test_cancelled_and_expired_uploads_free_their_parts(
    keyed: RunningServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = begun(client), begun(client)
    for upload in (made, other):
        client.uploads.parts.create(upload.id, data=LINE)
    assert len(held(keyed)) == 2
    assert client.uploads.cancel(made.id).status == "cancelled"
    assert client.uploads.cancel(made.id).status == "cancelled"
    assert len(held(keyed)) == 1
    later = other.expires_at + 1
    monkeypatch.setattr(keyed.application.fine_tuning.parts, "_clock", lambda: later)
    assert refused(client.uploads.parts.create, other.id, data=LINE) == (
        400, "upload_id", "the upload is expired; it must be pending.",
    )  # fmt: skip
    assert not held(keyed)


def test_what_is_refused(keyed: RunningServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, parameter in (
        ({"size": 0}, "bytes"),
        ({"size": MOST + 1}, "bytes"),
        ({"purpose": "nonsense"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "birth", "seconds": 3600}}, "expires_after.anchor"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ):
        assert refused(begun, client, **more)[:2] == (400, parameter)
    made = begun(client, 2 * len(LINE))
    part = client.uploads.parts.create(made.id, data=LINE)
    known = client.uploads.parts.create(made.id, data=LINE)
    for ids, said in (
        ([part.id], f"the parts must have the {2 * len(LINE)} bytes"),
        ([part.id, part.id], "part_ids must name each part once."),
        ([part.id, "part_of_another"], "part_ids[1] must be a part of this upload"),
    ):
        status, _, message = refused(client.uploads.complete, made.id, part_ids=ids)
        assert status == 400
        assert message.startswith(said)
    assert refused(client.uploads.complete, made.id, part_ids=[part.id, known.id], md5="0" * 32)[1] == "md5"
    assert refused(client.uploads.parts.create, made.id, data=b"")[1] == "data"
    assert "parts may have 2 times the" in refused(client.uploads.parts.create, made.id, data=LINE * 3)[2]
    assert len(held(keyed)) == 2, "a part that was refused is not kept"
    for ask in (client.uploads.cancel, client.uploads.complete, client.uploads.parts.create):
        named = {client.uploads.complete: {"part_ids": []}, client.uploads.parts.create: {"data": b"x"}}.get(ask, {})
        assert refused(ask, "upload_none", **named)[:2] == (404, "upload_id")
        assert refused(getattr_of(client_of(keyed, "two"), ask), made.id, **named)[0] == 404
    url, key = f"{keyed.url}/v1/uploads/{made.id}/parts", {"authorization": "Bearer one"}
    assert httpx.post(url, json={"data": "x"}, headers=key).status_code == 415
    assert httpx.post(url, files={"file": b"x"}, headers=key).json()["error"]["param"] == "file"
    monkeypatch.setattr("quire.server.routes.uploads.PART_BYTES", 10)
    assert httpx.post(url, files={"data": b"x" * 11}, headers=key).status_code == 413
    monkeypatch.setattr(uploads, "MOST_PARTS", 2)
    assert "may have 2 parts" in refused(client.uploads.parts.create, made.id, data=b"x")[2]
    monkeypatch.setattr(uploads, "MOST_PENDING", 1)
    assert refused(begun, client)[0] == 429
    assert client.uploads.complete(made.id, part_ids=[known.id, part.id]).status == "completed"


def getattr_of(client: OpenAI, ask: Any) -> Any:
    """The same method of another client."""
    owner = client.uploads.parts if ask.__name__ == "create" else client.uploads
    return getattr(owner, ask.__name__)


def test_what_is_no_json_lines_makes_no_file(keyed: RunningServer, client: OpenAI) -> None:
    before = len(list(client.files.list()))
    made = begun(client, 9)
    part = client.uploads.parts.create(made.id, data=b"not json\n")
    status, parameter, message = refused(client.uploads.complete, made.id, part_ids=[part.id])
    assert (status, parameter) == (400, "file")
    assert "Line 1 is not JSON" in message
    assert len(list(client.files.list())) == before
    assert not list((keyed.application.fine_tuning.folder / "tmp").iterdir())
    client.uploads.cancel(made.id)


def test_a_folder_of_the_layout_before_gets_the_new_tables(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "quire.sqlite3")
    connection.executescript(_FIRST + "PRAGMA user_version=1;")
    row = "('file-a', '', 'x', 1, 'a', 'user_data', 1, 'processed')"
    columns = "id, owner, sha256, bytes, filename, purpose, created_at, status"
    connection.execute(f"INSERT INTO files ({columns}) VALUES {row}")
    connection.commit()
    connection.close()
    for _ in range(2):
        store = Store(tmp_path)
        assert [file["id"] for file in store.read("SELECT id FROM files")] == ["file-a"]
        assert not store.read("SELECT * FROM uploads")
        assert store.read("PRAGMA user_version")[0][0] == 2
        store.close()


def test_permissions_are_recorded(keyed: RunningServer) -> None:
    name = "ft:tiny:quire:mine:abc:ckpt-step-3"
    house = keyed.application.fine_tuning
    owner = record_model(keyed, name)
    assert owner
    client = OpenAI(base_url=f"{keyed.url}/v1", api_key="one", admin_api_key="one", max_retries=0)
    kept = client.fine_tuning.checkpoints.permissions
    made = list(kept.create(name, project_ids=["proj_a", "proj_b"]))
    assert [(one.object, one.project_id) for one in made] == [("checkpoint.permission", p) for p in ("proj_a", "proj_b")]
    assert [one.id for one in kept.create(name, project_ids=["proj_a"])] == [made[0].id], "a project has one"
    kept.create(name, project_ids=["proj_c"])
    assert [one.project_id for one in kept.list(name, limit=2)] == ["proj_c", "proj_b", "proj_a"]
    assert [one.project_id for one in kept.list(name, order="ascending")] == ["proj_a", "proj_b", "proj_c"]
    assert [one.id for one in kept.list(name, project_id="proj_b")] == [made[1].id]
    gone = kept.delete(made[0].id, fine_tuned_model_checkpoint=name)
    assert (gone.id, gone.object, gone.deleted) == (made[0].id, "checkpoint.permission", True)
    assert refused(kept.delete, made[0].id, fine_tuned_model_checkpoint=name)[:2] == (404, "permission_id")
    assert refused(kept.list, "ft:none")[0] == 404
    other = OpenAI(base_url=f"{keyed.url}/v1", api_key="two", admin_api_key="two", max_retries=0)
    assert refused(other.fine_tuning.checkpoints.permissions.list, name)[0] == 404
    for projects, parameter in (([], "project_ids"), (["a", ""], "project_ids[1]"), (["a" * 65], "project_ids[0]")):
        assert refused(kept.create, name, project_ids=projects)[:2] == (400, parameter)
    assert refused(kept.list, name, order="up")[:2] == (400, "order")
    house.jobs.delete_model(name)
    assert refused(kept.list, name)[0] == 404


def record_model(server: RunningServer, name: str) -> str:
    """A model in the store, as a job of the first key would have left it. Returns its owner."""
    house = server.application.fine_tuning
    made = client_of(server).files.create(file=("a.jsonl", LINE), purpose="fine-tune")
    owner = house.files.held(made.id).owner
    columns = "name, owner, job, folder, step, created_at"
    values = (name, owner, "ftjob-a", "none", 3, 1)
    query = f"INSERT INTO models ({columns}) VALUES (?, ?, ?, ?, ?, ?)"
    house._store.write(lambda connection: connection.execute(query, values))
    return owner
