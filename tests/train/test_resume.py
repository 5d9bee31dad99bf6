"""A run that is killed at any moment goes on to the same bytes; checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quire.errors import ConfigError
from quire.lora.adapter import TENSORS
from quire.lora.slots import Slots
from quire.models.decoder import CausalLM
from quire.train import checkpoint
from quire.train.config import TrainingConfig
from quire.train.report import METRICS
from quire.train.run import TrainingRun
from tests.train.making import examples, load, train

CONFIG = TrainingConfig(
    r=4, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=2, save_steps=2, eval_steps=3, lora_dropout=0.1,
    lr_scheduler_type="cosine", load_best_model_at_end=True, seed=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalLM:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def slots(model: CausalLM) -> Slots:
    return Slots(model)


def result(folder: Path) -> bytes:
    return (folder / TENSORS).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(model: CausalLM, slots: Slots, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = TrainingRun(model, slots, CONFIG, examples(), examples((15, 21), 9), folder)
    train(run)
    run.close()
    return folder


def resumed(model: CausalLM, slots: Slots, folder: Path, config: TrainingConfig = CONFIG) -> TrainingRun:
    return TrainingRun.resume(model, slots, config, examples(), examples((15, 21), 9), folder)


@pytest.mark.parametrize("steps", [1, 4, 11])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    model: CausalLM, slots: Slots, uninterrupted: Path, tmp_path: Path, steps: int
) -> None:
    first = TrainingRun(model, slots, CONFIG, examples(), examples((15, 21), 9), tmp_path)
    train(first, steps)
    first.close()
    second = resumed(model, slots, tmp_path)
    assert second.step == steps // 2 * 2
    train(second)
    second.close()
    assert result(tmp_path) == result(uninterrupted)
    lines, whole = ([json.loads(line) for line in (folder / METRICS).open()] for folder in (tmp_path, uninterrupted))
    changing = ("seconds", "tokens_per_second")
    assert [{k: v for k, v in line.items() if k not in changing} for line in lines] == [
        {k: v for k, v in line.items() if k not in changing} for line in whole
    ]


def test_pieces_that_were_dropped_amid_a_step_change_nothing(model: CausalLM, slots: Slots, uninterrupted: Path) -> None:
    run = TrainingRun(model, slots, CONFIG, examples(), examples((15, 21), 9))
    source = random.Random(3)
    while not run.finished:
        pieces = run.pieces()
        for _, _report in zip(range(source.randint(1, 40)), pieces, strict=False):
            pass
        pieces.close()
    read = (uninterrupted / "quire.json").read_text()
    assert run.adapter().digest in read
    run.close()


def test_a_damaged_checkpoint_is_passed_over(model: CausalLM, slots: Slots, uninterrupted: Path, tmp_path: Path) -> None:
    first = TrainingRun(model, slots, CONFIG, examples(), examples((15, 21), 9), tmp_path)
    train(first, 6)
    first.close()
    damaged = checkpoint.path_of(tmp_path, 6) / checkpoint.TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (tmp_path / f"{checkpoint.PARTIAL}8").mkdir()
    second = resumed(model, slots, tmp_path)
    assert second.step == 4
    assert not (tmp_path / f"{checkpoint.PARTIAL}8").exists()
    train(second)
    second.close()
    assert result(tmp_path) == result(uninterrupted)


def test_only_the_same_run_can_be_resumed(model: CausalLM, slots: Slots, uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.02 and was 0\.01"):
        resumed(model, slots, uninterrupted, replace(CONFIG, learning_rate=0.02))
    with pytest.raises(ConfigError, match="the training data is another"):
        TrainingRun.resume(model, slots, CONFIG, examples()[1:], examples((15, 21), 9), uninterrupted)
    other = resumed(model, slots, uninterrupted, replace(CONFIG, logging_steps=3))
    assert other.finished
    other.close()
    assert slots.take() == 0  # the refused ones gave theirs back
    slots.give_back(0)


def test_old_checkpoints_go_and_the_best_one_stays(uninterrupted: Path) -> None:
    kept = checkpoint.steps(uninterrupted)
    state = json.loads((checkpoint.path_of(uninterrupted, 12) / checkpoint.STATE).read_text())
    assert set(kept) >= {8, 10, 12}
    assert len(kept) <= CONFIG.save_total_limit + 1
    assert state["best"][1] in (3, 6, 9, 12)


RUN = """
import os, sys
from pathlib import Path
from quire.lora.slots import Slots
from tests.train.making import examples, load, train
from tests.train.test_resume import CONFIG
from quire.train.run import TrainingRun
model = load(Path(sys.argv[1]))
run = TrainingRun.resume(model, Slots(model), CONFIG, examples(), examples((15, 21), 9), Path(sys.argv[2]))
print("ready", run.step, flush=True)
train(run)
if run.finished:
    run.publish()
print("done", flush=True)
"""


def begin(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def kill_until_done(model: Path, folder: Path, kills: int, seed: int) -> list[int]:
    """Kill the run so many times at random moments after it is ready, then let it end; the steps that it resumed at."""
    source, found = random.Random(seed), []
    while True:
        process = begin([str(model), str(folder)])
        assert process.stdout is not None
        word, step = process.stdout.readline().split()
        assert word == "ready"
        found.append(int(step))
        if len(found) > kills:
            assert process.stdout.read().strip() == "done"
            process.wait(60)
            return found
        time.sleep(source.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()


def test_kill_dash_nine_at_random_instants(tiny_llama: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = kill_until_done(tiny_llama, folder, kills=2, seed=11)
    assert steps == sorted(steps)
    assert result(folder) == result(uninterrupted)
    assert not list(folder.glob(f"{checkpoint.PARTIAL}*"))
