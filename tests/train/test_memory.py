"""Which layers are computed twice follows from the room that there is, and the files that tell of a run are whole."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quire.lora.slots import Slots
from quire.plan.hardware import Hardware
from quire.train import memory
from quire.train.config import TrainingConfig
from quire.train.report import METRICS, Journal, StepReport, loss_picture
from quire.train.run import TrainingRun
from tests.train.making import examples, load


@pytest.mark.parametrize(
    ("kind", "free", "recomputed"), [("on", 1 << 40, 3), ("off", 0, 0), ("auto", 1 << 40, 0), ("auto", 0, 3), ("auto", None, 1)]
)
def test_layers_are_computed_twice_where_there_is_no_room(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, kind: str, free: int | None, recomputed: int
) -> None:
    model = load(tiny_llama)
    run = TrainingRun(model, Slots(model), TrainingConfig(r=4, gradient_checkpointing=kind), examples())
    one = memory.activation_bytes(model.config, 4, 4) * 100
    room = int(2.5 * one / memory.SHARE) if free is None else free
    monkeypatch.setattr(memory, "probe", lambda: Hardware(1, 1 << 41, room))
    assert memory.recomputed_layers(model, [run], 100) == recomputed
    run.close()


def report(step: int, loss: float, **more: float) -> StepReport:
    return StepReport(step, 9, 1.0, loss, 0.5, 1e-3, 1.0, 10, 5, 0.1, **more)


def test_a_journal_begins_again_where_the_run_does(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    for step in (1, 2, 3):
        first.line(report(step, 3.0 - step))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the machine stopped here
    again = Journal(tmp_path, step=2)
    again.line(report(3, 0.5))
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert len(lines) == 3
    assert '"loss": 0.5' in lines[-1]
    again.draw()
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag.endswith("svg")


def test_pictures_of_few_points_and_of_none() -> None:
    for training, validation in (([], []), ([(1, 2.0)], []), ([(1, 2.0), (2, 1.0)], [(2, 1.5)])):
        root = ElementTree.fromstring(loss_picture(training, validation))
        assert len(root.findall(".//{*}circle")) == len(validation)
