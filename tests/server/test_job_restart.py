"""A server that is stopped as it should be while a job trains, and started again over the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.train import checkpoint
from tests.server.running import RunningServer, wait_for
from tests.server.test_fine_tuning import client_of, messages, start, supervised, until, weights


def test_a_stopped_job_goes_on_to_the_same_bytes(trainer_engine: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data_dir": str(tmp_path), "served_model_name": ("tiny",)}
    epochs = 40  # so many steps that it is still training when it is told to stop
    method = supervised(n_epochs=epochs, batch_size=4)
    with RunningServer(trainer_engine, **options) as running:
        client = client_of(running)
        straight = until(client, start(client, method=method, seed=9))
        job = start(client, method=method, seed=9)
        wait_for(lambda: any(text.startswith("Step 4/") for text in messages(client, job)), 60)
        waiting = start(client, method=method, seed=9)
        running.application.fine_tuning.close()
    kept = checkpoint.steps(tmp_path / "jobs" / job.id)
    assert kept, "it stopped with a checkpoint"
    assert max(kept) >= 4

    with RunningServer(trainer_engine, **options) as running:
        client = client_of(running)
        assert client.models.retrieve(straight.fine_tuned_model).id == straight.fine_tuned_model
        done = until(client, job)
        assert done.status == "succeeded", done.error
        told = messages(client, job)
        assert "The server was restarted; the job goes on from its last checkpoint" in told
        assert f"Fine-tuning job goes on after step {max(kept)}" in told
        steps = [text.split("/")[0] for text in told if text.startswith("Step ")]
        assert steps == [f"Step {number}" for number in range(1, 3 * epochs + 1)], "each step is told once"
        assert weights(running, done) == weights(running, straight)
        assert until(client, waiting).status == "succeeded", "who waited in the line still does"
        running.application.fine_tuning.close()
