"""What a job's request becomes: "auto", the run's settings, and the record of its limits and expiry in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.errors import InvalidRequest, NotFound, TooManyRequests
from quire.service.blobs import Blobs
from quire.service.files import Files
from quire.service.job_request import job_request, resolved, training_config
from quire.service.jobs import Event, Jobs
from quire.service.store import Store
from quire.train.config import TrainingConfig

BODY = {"model": "m", "training_file": "file-1"}


class Clock:
    """Seconds that a test moves."""

    now = 1_000_000

    def __call__(self) -> int:
        return self.now


class House:
    """Store, files and jobs over one folder."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.store = Store(folder)
        self.files = Files(self.store, Blobs(folder), clock)
        self.jobs = Jobs(self.store, self.files, 2, clock)

    def upload(self, data: bytes, **more: Any) -> Any:
        upload = self.files.begin()
        upload.write(data)
        return self.files.create("me", upload, "rows.jsonl", "fine-tune", **more)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, Clock())
    yield made
    made.store.close()


@pytest.mark.parametrize("rows, batch, epochs", [(10, 1, 3), (1000, 2, 3), (10_000, 20, 3), (20_000, 32, 2), (100_000, 32, 1)])
def test_auto(rows: int, batch: int, epochs: int) -> None:
    found = resolved(job_request(BODY).hyperparameters, rows)
    assert found == {"n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}


def test_settings_of_the_run() -> None:
    request = job_request(
        {
            **BODY,
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "learning_rate_multiplier": 0.5}}},
            "hyperparameters": {"n_epochs": 9},
            "lora": {"r": 4, "layers_to_transform": [1], "learning_rate": 1e-3, "use_rslora": True},
        }
    )
    config = training_config(request, resolved(request.hyperparameters, 10), 7)
    assert (config.method, config.beta, config.learning_rate, config.seed) == ("dpo", 0.3, 5e-4, 7)
    assert config.num_train_epochs == 3, "the older field is not looked at beside method"
    assert config.lora_config().layers_to_transform == (1,)
    assert TrainingConfig(**config.as_dict()) == config, "it is kept as JSON and read back"


def test_unfinished_jobs_are_bounded(house: House) -> None:
    file = house.upload(b'{"a": 1}\n')
    request = job_request({**BODY, "training_file": file.id})
    first = house.jobs.create("me", request, "m", "digest")
    house.jobs.create("me", request, "m", "digest")
    with pytest.raises(TooManyRequests):
        house.jobs.create("me", request, "m", "digest")
    house.jobs.cancel("me", first.id)
    house.jobs.create("me", request, "m", "digest")


def test_a_change_and_its_events_are_one(house: House) -> None:
    file = house.upload(b'{"a": 1}\n')
    job = house.jobs.create("me", job_request({**BODY, "training_file": file.id}), "m", "digest")

    def broken(connection: Any) -> None:
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        house.jobs.move(job.id, ("validating_files",), "queued", {"x": 1}, [Event("never seen")], also=broken)
    after = house.jobs.get("me", job.id)
    assert (after.status, after.facts) == ("validating_files", job.facts)
    assert not house.jobs.move(job.id, ("running",), "succeeded", {}, [Event("never seen")]), "not from here"
    assert "never seen" not in [row["message"] for row in house.jobs.events(after, after=None, limit=10).items]
    for _ in range(2):
        house.jobs.tell(job.id, Event("Step 1/2", data={"step": 1}, step=1))
    assert house.jobs.steps_told(job.id) == [{"step": 1}], "a step is told once"


def test_expiry_and_equal_contents(house: House, tmp_path: Path) -> None:
    clock = house.files._clock
    kept, gone = house.upload(b'{"a": 1}\n'), house.upload(b'{"a": 1}\n', expires_after=3600)
    other = house.upload(b'{"a": 2}\n', expires_after=3600)
    clock.now += 3600  # type: ignore[attr-defined]
    for record in (gone, other):
        with pytest.raises(NotFound):
            house.files.get("me", record.id)
    house.files.sweep()
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {kept.sha256}
    assert b"".join(house.files.content(kept)) == b'{"a": 1}\n'


def test_a_lost_content_is_said_at_start(house: House, tmp_path: Path) -> None:
    record = house.upload(b'{"a": 1}\n')
    (tmp_path / "blobs" / record.sha256).unlink()
    again = Files(house.store, Blobs(tmp_path), Clock())
    assert again.get("me", record.id).status == "error"


def test_names_are_no_paths(house: House) -> None:
    upload = house.files.begin()
    upload.write(b"x")
    assert house.files.create("me", upload, "..\\..\\a/b\x1b[2J\n.txt", "user_data").filename == "b[2J.txt"
    with pytest.raises(InvalidRequest):
        house.files.create("me", house.files.begin(), "x", "fine-tune-results")
