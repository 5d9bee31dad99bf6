"""`quire train` and `quire.train` as people use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import quire
from quire.cli.main import run
from quire.errors import ConfigError, DataError, DoesNotFit
from quire.lora.adapter import CONFIG, TENSORS
from quire.train import door
from quire.train.config import TrainingConfig
from quire.train.schedule import Order, rate, shuffled
from tests.conftest import write_model

WORDS = ("red", "blue", "nine", "tree", "house", "fox")
FEW = ["--r", "4", "--learning-rate", "1e-2", "--per-device-train-batch-size", "4", "--threads", "1"]


def rows(count: int = 12) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        words = [WORDS[(number * 5 + place * (number + 1)) % len(WORDS)] for place in range(3)]
        answer = " ".join(reversed(words))
        turns = [{"role": "user", "content": f"{number}: {' '.join(words)}"}, {"role": "assistant", "content": answer}]
        made.append({"messages": turns})
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


def test_the_folder_is_pefts_and_has_its_metrics(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    arguments = ["train", str(tiny_llama), "--data", str(data), "--output", str(output), "--max-steps", "6", *FEW]
    assert run([*arguments, "--validation-split", "0.2", "--eval-steps", "2", "--sample-steps", "3"]) == 0
    assert {CONFIG, TENSORS, "metrics.jsonl", "loss.svg", "samples.jsonl", "checkpoint-6"} <= {p.name for p in output.iterdir()}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4, 6]
    assert ElementTree.parse(output / "loss.svg").getroot().tag.endswith("svg")
    samples = [json.loads(line) for line in (output / "samples.jsonl").open()]
    assert {sample["step"] for sample in samples} == {3, 6}
    assert all(sample["prompt"].endswith("<|assistant|>") for sample in samples)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = base(torch.tensor([[5, 6, 7]])).logits
    loaded = peft.PeftModel.from_pretrained(base, output)
    assert not torch.equal(loaded(torch.tensor([[5, 6, 7]])).logits, before)


def test_python_takes_rows_and_the_names_of_tutorials(tiny_llama: Path, tmp_path: Path) -> None:
    done = quire.train(
        str(tiny_llama),
        rows(),
        tmp_path / "adapter",
        validation=rows(3),
        num_train_epochs=2,
        learning_rate=1e-2,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        lr_scheduler_type="linear",
        warmup_ratio=0.1,
        report_to="none",
        bf16=True,
        show=False,
    )
    assert done.finished
    assert done.steps == 4
    assert done.validation_loss is not None
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["target_modules"]) == (4, ["q_proj", "v_proj"])
    assert quire.train is not None and callable(quire.train)  # noqa: PT018 - the room of that name can be called as well


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    def arguments(folder: str) -> list[str]:
        return ["train", str(tiny_llama), "--data", str(data), "--output", str(tmp_path / folder), "--max-steps", "60", *FEW]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quire.cli", *arguments("stopped"), "--save-steps", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "--resume" in rest
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.rpartition("-")[2]) < 60
    assert run([*arguments("stopped"), "--save-steps", "1000"]) == 3  # it would mix with what is there
    assert run([*arguments("stopped"), "--save-steps", "1000", "--resume"]) == 0
    assert run([*arguments("whole"), "--save-steps", "1000"]) == 0
    assert (tmp_path / "stopped" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()


def test_a_dry_run_tells_what_it_will_cost(tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tiny_llama), "--data", str(data), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for words in ("12 rows (messages)", "Learned tokens of a row", "trainable params:", "6 steps", "Peak memory"):
        assert words in shown
    assert run(["train", str(tiny_llama), "--data", str(data), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 6
    assert facts["seconds"] > 0
    assert facts["trainable"] == 3 * 16 * (4 * 64 + 64 + 64 + 32 + 32 + 3 * (64 + 96))


def test_preview_marks_what_is_learned(tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(tiny_llama), "--data", str(data), "--preview"]) == 0
    assert "<|assistant|>«" in capsys.readouterr().out


def test_bad_data_and_options_end_before_anything_is_loaded(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text('{"messages": []}\n{"messages": 3}\n', encoding="utf-8")
    base = ["train", str(tiny_llama), "--data", str(data), "--output", str(tmp_path / "out")]
    assert run(base) == 8
    assert "line 2: messages must be a list" in capsys.readouterr().err
    assert run([*base, "--r", "0"]) == 3
    assert run([*base, "--lr-scheduler-type", "cosin"]) == 3
    assert 'Did you mean "cosine"' in capsys.readouterr().err
    assert run([*base, "--lr", "1"]) == 2
    assert "--learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_targets_that_are_not_there_are_named(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="q_proj"):
        quire.train(str(tiny_llama), data, tmp_path / "out", target_modules=["q_porj"], show=False)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_quantized_base_trains_an_adapter_in_float32(tmp_path: Path, quantization: str) -> None:
    folder = write_model(tmp_path / "model", intermediate_size=128)
    done = quire.train(
        str(folder), rows(), tmp_path / "out", quantization=quantization, max_steps=12, learning_rate=1e-2, r=4, show=False
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert done.finished
    assert losses[-1] < 0.8 * losses[0]


def test_a_bfloat16_base_trains(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", torch_dtype="bfloat16")
    quire.train(str(folder), rows(), tmp_path / "out", max_steps=12, learning_rate=1e-2, r=4, show=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert losses[-1] < 0.8 * losses[0]


def test_early_stopping_keeps_the_best(tiny_llama: Path, tmp_path: Path) -> None:
    done = quire.train(
        str(tiny_llama),
        rows(),
        tmp_path / "out",
        validation=rows(30)[20:],
        max_steps=60,
        learning_rate=5e-2,
        eval_steps=2,
        early_stopping_patience=2,
        r=4,
        show=False,
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    checked = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert done.steps < 60
    assert done.validation_loss == pytest.approx(min(checked))
    assert len(checked) - checked.index(min(checked)) == 3


def test_what_does_not_fit_is_refused_before_loading(tiny_llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = door.probe()
    monkeypatch.setattr(door, "probe", lambda: type(small)(1, 1 << 30, 32 << 20))
    with pytest.raises(DoesNotFit, match="Ways out"):
        door.estimated(door.prepare(str(tiny_llama), data))


def test_other_trainers_names(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "num_train_epochs"'):
        TrainingConfig.of(epochs=3)
    with pytest.raises(ConfigError, match="fp16=True is not possible"):
        TrainingConfig.of(fp16=True)
    with pytest.raises(ConfigError, match="give --r"):
        TrainingConfig.of(lora={"r": 3})
    assert TrainingConfig.of(packing=True, max_steps=-1, gradient_checkpointing=True).gradient_checkpointing == "on"
    with pytest.raises(DataError):
        door.prepare(str(tiny_llama), [])


def test_the_order_visits_every_row_once_an_epoch() -> None:
    order = Order(10, TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2))
    assert (order.steps_per_epoch, order.total_steps) == (3, 6)
    for epoch in (0, 1):
        seen = [row for step in range(3) for row in order.step(3 * epoch + step)]
        assert sorted(seen) == list(range(10))
    assert shuffled(10, 0, 0) != shuffled(10, 0, 1) != shuffled(10, 1, 1)
    assert shuffled(5, 0, 0) == [4, 2, 3, 0, 1] or sorted(shuffled(5, 0, 0)) == list(range(5))


def test_rates() -> None:
    flat = TrainingConfig(learning_rate=1.0, lr_scheduler_type="constant")
    assert [rate(flat, step, 4) for step in range(4)] == [1.0] * 4
    line = TrainingConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=1)
    assert [rate(line, step, 5) for step in range(5)] == [0.5, 1.0, 0.75, 0.5, 0.25]
    wave = TrainingConfig(learning_rate=1.0, lr_scheduler_type="cosine")
    assert [round(rate(wave, step, 4), 4) for step in (0, 2)] == [1.0, 0.5]
    assert TrainingConfig().warmup(1000) == 20
    assert TrainingConfig(warmup_ratio=0.25).warmup(10) == 3
