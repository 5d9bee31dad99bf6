"""Fine-tuning jobs through the real client on a tiny model: from files to a model that answers, and all that can go wrong."""

from __future__ import annotations

import csv
import io
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from safetensors.torch import load_file

from quire.plan.hardware import Hardware
from tests.server.running import RunningServer, wait_for

ENDED = ("succeeded", "failed", "cancelled")


def rows(count: int, first: int = 0) -> bytes:
    """Chats of a few tokens."""
    made = (
        {"messages": [{"role": "user", "content": f"say {place}"}, {"role": "assistant", "content": f"fox {place % 3}"}]}
        for place in range(first, first + count)
    )
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def pairs(count: int) -> bytes:
    """Preferred and other answers."""
    made = (
        {
            "input": {"messages": [{"role": "user", "content": f"say {place}"}]},
            "preferred_output": [{"role": "assistant", "content": "the fox"}],
            "non_preferred_output": [{"role": "assistant", "content": "the dog"}],
        }
        for place in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in made).encode()


@pytest.fixture(scope="module")
def training(trainer_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("jobs")
    with RunningServer(
        trainer_engine, data_dir=str(folder), api_key=("one", "two"), served_model_name=("tiny",), max_training_jobs=2
    ) as running:
        yield running
        running.application.fine_tuning.close()


@pytest.fixture(scope="module")
def client(training: RunningServer) -> OpenAI:
    return client_of(training)


def client_of(server: RunningServer, key: str = "one") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def upload(client: OpenAI, data: bytes) -> str:
    return client.files.create(file=("rows.jsonl", io.BytesIO(data)), purpose="fine-tune").id


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def start(client: OpenAI, data: bytes | None = None, lora: dict[str, Any] | None = None, **more: Any) -> Any:
    """A job of 3 steps an epoch, 2 epochs, unless said otherwise."""
    more.setdefault("method", supervised(n_epochs=2, batch_size=4))
    file = upload(client, rows(12) if data is None else data)
    extra = {"lora": {"r": 4, **(lora or {})}}
    return client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body=extra, **more)


def until(client: OpenAI, job: Any, *statuses: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in (statuses or ENDED):
            return job
        assert job.status not in ENDED, (job.status, job.error)
        assert time.monotonic() < deadline, job.status
        time.sleep(0.02)


def messages(client: OpenAI, job: Any) -> list[str]:
    """What was told, oldest first."""
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=7)][::-1]


def weights(server: RunningServer, job: Any) -> bytes:
    folder = server.application.fine_tuning.folder / "adapters" / job.id / "final"
    return (folder / "adapter_model.safetensors").read_bytes()


def chat(client: OpenAI, model: str, content: str = "say 1") -> Any:
    asked = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model=model,
        messages=asked,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        seed=1,  # type: ignore[arg-type]
    )


def test_from_files_to_a_model_that_answers(training: RunningServer, client: OpenAI) -> None:
    before = chat(client, "tiny").choices[0].message.content
    held_out = upload(client, rows(5, 100))
    job = start(
        client,
        rows(20),
        {"sample_steps": 25},
        validation_file=held_out,
        suffix="my-fox",
        seed=7,
        metadata={"team": "foxes"},
        method=supervised(n_epochs=10, batch_size=4, learning_rate_multiplier=20),
    )
    assert job.status in ("validating_files", "queued", "running")
    first = job.model_dump()
    assert first["object"] == "fine_tuning.job"
    assert (first["seed"], first["metadata"], first["error"]) == (7, {"team": "foxes"}, None)
    for name in ("finished_at", "fine_tuned_model", "trained_tokens"):
        assert first[name] is None
    job = until(client, job)
    assert job.status == "succeeded", job.error
    name = job.fine_tuned_model
    assert name.startswith("ft:tiny:quire:my-fox:")
    assert len(name.rsplit(":", 1)[1]) == 8
    answer = chat(client, name)
    assert answer.model == name
    assert answer.choices[0].message.content.startswith("fox")
    assert chat(client, "tiny").choices[0].message.content == before, "the base answers as before"
    assert job.hyperparameters.n_epochs == 10
    assert job.method.supervised.hyperparameters.batch_size == 4
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.lora["parity"]["max"] == job.lora["parity"]["mean"] == 0.0, "training and serving are one model"
    assert job.lora["parity"]["tokens"] > 0

    told = messages(client, job)
    assert told[0] == f"Created fine-tuning job: {job.id}"
    assert told[1] == f"Validating training file: {job.training_file} and validation file: {held_out}"
    at = [told.index(text) for text in ("Files validated, moving job to queued state", "Fine-tuning job started")]
    assert at == sorted(at)
    steps = [text for text in told if text.startswith("Step ")]
    assert len(steps) == 50
    assert "validation loss=" in steps[4]
    assert "full validation loss=" in steps[-1]
    assert told[-2:] == [f"New fine-tuned model created: {name}", "The job has successfully completed"]
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    assert metrics[0].data["step"] == metrics[0].data["total_steps"] == 50  # type: ignore[index]
    assert {"train_loss", "train_mean_token_accuracy", "full_valid_loss"} <= set(metrics[0].data)  # type: ignore[arg-type]
    sampled = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.message.startswith("Samples at")]
    assert [event.data["step"] for event in sampled] == [50, 25]  # type: ignore[index]
    assert sampled[0].data["samples"][0]["answer"].startswith("fox")  # type: ignore[index]

    (result,) = job.result_files
    assert client.files.retrieve(result).purpose == "fine-tune-results"
    table = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
    assert [int(line["step"]) for line in table] == list(range(1, 51))
    assert list(table[0])[:5] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert float(table[-1]["valid_loss"]) < float(table[4]["valid_loss"])
    assert float(table[-1]["parity_max_abs_logprob_difference"]) == 0.0

    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [one.step_number for one in found] == [45, 40, 35], "the last three, newest first"
    for one in found:
        assert one.fine_tuned_model_checkpoint == f"{name}:ckpt-step-{one.step_number}"
        assert one.metrics.full_valid_loss is not None
        assert chat(client, one.fine_tuned_model_checkpoint).model == one.fine_tuned_model_checkpoint
    listed = [model.id for model in client.models.list()]
    assert name in listed
    assert not [other for other in listed if other.endswith(":sample")]
    assert client.models.retrieve(name).id == name
    assert client.models.delete(name).deleted is True
    for ask in (client.models.retrieve, client.models.delete, lambda model: chat(client, model)):
        with pytest.raises(openai.NotFoundError):
            ask(name)
    assert not (training.application.fine_tuning.folder / "adapters" / job.id / "final").exists()


def test_other_keys_see_nothing(training: RunningServer, client: OpenAI) -> None:
    job = until(client, start(client))
    other = client_of(training, "two")
    assert job.id not in [one.id for one in other.fine_tuning.jobs.list()]
    asks = other.fine_tuning.jobs
    for ask in (asks.retrieve, asks.cancel, asks.pause, asks.resume, asks.list_events, asks.checkpoints.list):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(job.id)
        fault = caught.value
        assert (fault.code, fault.param, fault.type) == ("fine_tune_not_found", "fine_tune_id", "invalid_request_error")
        assert fault.body["message"] == f"Could not find fine tune: {job.id}"  # type: ignore[index]
    assert job.fine_tuned_model not in [model.id for model in other.models.list()]
    for use in (other.models.retrieve, other.models.delete, lambda model: chat(other, model)):
        with pytest.raises(openai.NotFoundError):
            use(job.fine_tuned_model)
    with httpx.Client(base_url=training.url, headers={"authorization": "Bearer two"}) as door:
        name = job.fine_tuned_model
        assert job.fine_tuned_model not in door.get("/v1/adapters").text
        for answer in (
            door.get(f"/v1/adapters/{name}"),
            door.delete(f"/v1/adapters/{name}"),
            door.post("/v1/unload_lora_adapter", json={"lora_name": name}),
            door.post("/tokenize", json={"model": name, "prompt": "a"}),
        ):
            assert answer.status_code == 404
    with pytest.raises(openai.BadRequestError) as refused:
        other.fine_tuning.jobs.create(model="tiny", training_file=job.training_file)
    assert refused.value.param == "training_file"
    assert chat(client, job.fine_tuned_model).model == job.fine_tuned_model


@pytest.mark.parametrize(
    "more, parameter, code",
    [
        ({"model": "gpt-4o-mini"}, "model", "model_not_available"),
        ({"training_file": "file-none"}, "training_file", None),
        ({"validation_file": "file-none"}, "validation_file", None),
        ({"method": supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs", None),
        ({"method": supervised(epochs=3)}, "method.supervised.hyperparameters.epochs", None),
        ({"method": supervised(batch_size=257)}, "method.supervised.hyperparameters.batch_size", None),
        (
            {"method": supervised(learning_rate_multiplier=-1)},
            "method.supervised.hyperparameters.learning_rate_multiplier",
            None,
        ),
        ({"method": {"type": "reinforcement"}}, "method.type", None),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", None),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", None),
        ({"suffix": "a:b"}, "suffix", None),
        ({"suffix": "x" * 65}, "suffix", None),
        ({"seed": -1}, "seed", None),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", None),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", None),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", None),
        ({"extra_body": {"lora": {"rank": 4}}}, "lora.rank", None),
        ({"extra_body": {"lora": {"r": 0}}}, "lora.r", None),
        ({"extra_body": {"lora": {"r": 32}}}, "lora.r", None),
        ({"extra_body": {"lora": {"learning_rate": "fast"}}}, "lora.learning_rate", None),
        ({"extra_body": {"lora": {"seed": 3}}}, "lora.seed", None),
        ({"extra_body": {"lora": {"save_steps": 0}}}, "lora.save_steps", None),
        ({"extra_body": {"colour": "red"}}, "colour", None),
    ],
)
def test_what_cannot_be_asked(client: OpenAI, more: dict[str, Any], parameter: str, code: str | None) -> None:
    before = len(list(client.fine_tuning.jobs.list()))
    asked = {"model": "tiny", "training_file": upload(client, rows(10)), **more}
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**asked)
    fault = caught.value
    assert (fault.param, fault.code, fault.type) == (parameter, code, "invalid_request_error")
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_what_never_fits_is_refused_with_the_numbers(
    training: RunningServer, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = training.application.engine.plan.serving_bytes
    monkeypatch.setattr("quire.service.room.probe", lambda: Hardware(1, serving + 1000, 0))
    with pytest.raises(openai.BadRequestError) as caught:
        start(client, lora={"modules_to_save": ["lm_head"]})
    assert (caught.value.param, caught.value.code) == ("lora.r", "out_of_memory")
    message = caught.value.body["message"]  # type: ignore[index]
    assert re.search(r"needs at least [\d.]+ MiB: [\d.]+ \w+ for [\d,]+ trainable numbers.* has 1000 B", message), message


def test_bad_files_are_failed_jobs_with_every_bad_line(client: OpenAI) -> None:
    bad = rows(10).splitlines(keepends=True)
    bad[2] = b'{"messages": [{"content": "no role"}]}\n'
    bad[6] = b'{"messages": [{"role": "user", "content": "nobody answers"}]}\n'
    bad[8] = b'{"messages": []}\n'
    cases = [
        (rows(7), "invalid_n_examples", ["Training file has 7 example(s), but must have at least 10 examples"]),
        (
            b"".join(bad),
            "invalid_training_file",
            ["The job failed due to an invalid training file. Invalid file format.", "Line 3", "role", "Line 7", "Line 9"],
        ),
        (b'{"question": "a", "answer": "b"}\n' * 10, "invalid_training_file", ["Line 1", "prompt"]),
        (
            pairs(10),
            "invalid_training_file",
            [
                "is in the fine-tune-preference format",
                "is not using 'dpo' as the training method (provided method=supervised).",
            ],
        ),
    ]
    started = [(start(client, data), code, said) for data, code, said in cases]
    for job, code, said in started:
        job = until(client, job)
        assert job.status == "failed"
        assert (job.error.code, job.error.param) == (code, "training_file")
        for text in said:
            assert text in job.error.message
        assert job.finished_at is not None
        events = list(client.fine_tuning.jobs.list_events(job.id))
        assert events[0].level == "error"
        assert events[0].message == job.error.message
    twenty_five = start(client, b'{"messages": []}\n' * 25)
    failed = until(client, twenty_five)
    assert all(f"Line {number}:" in failed.error.message for number in range(1, 26))
    job = start(client, validation_file=upload(client, b"{}\n"))
    assert until(client, job).error.code == "invalid_validation_file"


def test_dpo_and_the_older_field(client: OpenAI) -> None:
    dpo = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 5, "beta": 0.2}}}
    job = start(client, pairs(10), method=dpo)
    older = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows(10)), hyperparameters={"n_epochs": 1}, extra_body={"lora": {"r": 2}}
    )
    job, older = until(client, job), until(client, older)
    assert (job.status, older.status) == ("succeeded", "succeeded"), (job.error, older.error)
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert job.lora["parity"]["max"] == 0.0
    assert (older.hyperparameters.n_epochs, older.hyperparameters.batch_size) == (1, 1), "auto became numbers"


def test_lists_by_page_and_metadata(training: RunningServer) -> None:
    client = client_of(training, "two")
    marks = [{"a": "1"}, {"a": "1", "b": "2"}, None, {"a": "2"}]
    ids = [start(client, metadata=mark).id for mark in marks]
    found = client.fine_tuning.jobs
    assert [job.id for job in found.list(limit=2)] == ids[::-1]
    assert [job.id for job in found.list(metadata={"a": "1"})] == [ids[1], ids[0]]
    assert [job.id for job in found.list(metadata={"a": "1", "b": "2"})] == [ids[1]]
    headers = {"authorization": "Bearer two"}
    bare = httpx.get(f"{training.url}/v1/fine_tuning/jobs?metadata=null", headers=headers).json()
    assert [job["id"] for job in bare["data"]] == [ids[2]]
    for query in ("limit=0", "after=ftjob-none", "colour=red"):
        answer = httpx.get(f"{training.url}/v1/fine_tuning/jobs?{query}", headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, query.partition("=")[0])
    for id in ids:
        until(client, found.retrieve(id))


def test_cancel_pause_resume(training: RunningServer, client: OpenAI) -> None:
    lora, method = {"r": 2, "learning_rate": 1e-3}, supervised(n_epochs=30, batch_size=4)
    jobs, engine = client.fine_tuning.jobs, training.application.engine
    straight = until(client, start(client, lora=lora, method=method, seed=3))
    job = start(client, lora=lora, method=method, seed=3)
    until(client, job, "running")
    wait_for(lambda: any(text.startswith("Step 3/") for text in messages(client, job)), 30)
    assert jobs.pause(job.id).status == "paused"
    wait_for(lambda: not training.application.fine_tuning.training, 30)
    resting = messages(client, job)
    assert resting[-1] == "Fine-tuning job paused" or resting[-1].startswith("Step")
    time.sleep(0.2)
    assert messages(client, job) == resting, "a paused job does nothing"
    with pytest.raises(openai.BadRequestError, match="paused"):
        jobs.pause(job.id)
    assert jobs.resume(job.id).status in ("queued", "running")
    done = until(client, job)
    assert done.status == "succeeded"
    assert weights(training, done) == weights(training, straight), "a pause changes nothing"
    steps = [text for text in messages(client, job) if text.startswith("Step ")]
    assert [text.split("/")[0] for text in steps] == [f"Step {n}" for n in range(1, 91)], "each step is told once"

    other = start(client, lora=lora, method=method)
    until(client, other, "running")
    assert jobs.cancel(other.id).status == "cancelled"
    wait_for(lambda: not training.application.fine_tuning.training, 30)
    ended = jobs.retrieve(other.id)
    assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)
    assert ended.finished_at is not None
    for ask in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            ask(other.id)
    assert not (training.application.fine_tuning.folder / "jobs" / other.id).exists()
    assert engine.heartbeat().alive


def test_together_as_alone(training: RunningServer, client: OpenAI) -> None:
    """Two jobs of different ranks and rates share the batches and learn what each learns alone."""
    kinds = [({"r": 2, "learning_rate": 1e-3}, 11), ({"r": 8, "target_modules": ["q_proj", "v_proj"]}, 12)]
    method = supervised(n_epochs=2, batch_size=4)
    alone = [until(client, start(client, lora=lora, method=method, seed=seed)) for lora, seed in kinds]
    both = [start(client, lora=lora, method=method, seed=seed) for lora, seed in kinds]
    both = [until(client, job) for job in both]
    assert [weights(training, job) for job in both] == [weights(training, job) for job in alone]


def test_one_jobs_fault_ends_one_job(training: RunningServer, client: OpenAI) -> None:
    method = supervised(n_epochs=3, batch_size=4)
    alone = until(client, start(client, method=method, seed=21))
    well, wild = start(client, method=method, seed=21), start(client, method=method, lora={"learning_rate": 1e36})
    well, wild = until(client, well), until(client, wild)
    assert well.status == "succeeded", well.error
    assert weights(training, well) == weights(training, alone)
    assert (wild.status, wild.error.code) == ("failed", "training_failed")
    assert "learning" in wild.error.message
    assert training.application.engine.heartbeat().alive
    assert until(client, start(client)).status == "succeeded", "and the next one trains"


def test_a_deleted_file_is_kept_for_its_job(training: RunningServer, client: OpenAI) -> None:
    job = start(client, rows(12, 5000))  # a content that no other test has
    client.files.delete(job.training_file)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(job.training_file)
    assert until(client, job).status == "succeeded"
    wait_for(lambda: training.application.fine_tuning.files.held(job.training_file).sha256 == "")


def test_serving_during_training_changes_no_answer(training: RunningServer, client: OpenAI) -> None:
    asked = [f"say {n}" for n in range(4)]

    def answers(model: str) -> list[Any]:
        return [chat(client, model, text).choices[0].model_dump() for text in asked]

    tuned = until(client, start(client)).fine_tuned_model
    before = [answers("tiny"), answers(tuned)]
    job = start(client, rows(20), method=supervised(n_epochs=12, batch_size=4))
    until(client, job, "running")
    rounds = 0
    while client.fine_tuning.jobs.retrieve(job.id).status == "running" and rounds < 3:
        assert [answers("tiny"), answers(tuned)] == before
        rounds += 1
    assert rounds, "training was over before anything was asked"
    assert until(client, job).status == "succeeded"


def test_a_folder_belongs_to_one_server(trainer_engine: Any, training: RunningServer) -> None:
    with pytest.raises(Exception, match="in use by another server"):
        RunningServer(trainer_engine, data_dir=str(training.application.fine_tuning.folder))


def test_the_adapter_is_pefts(training: RunningServer, client: OpenAI) -> None:
    job = until(client, start(client, lora={"target_modules": ["q_proj"]}))
    folder = training.application.fine_tuning.folder / "adapters" / job.id / "final"
    names = set(load_file(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
