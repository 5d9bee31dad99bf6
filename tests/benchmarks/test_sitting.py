"""A whole sitting with quire-tiny on one thread: offline, through a real server, beside engines that fail in every way."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import page
from benchmarks.engines.checkpoints import CannotMake
from benchmarks.engines.lineup import Entry, Place, entries
from benchmarks.engines.roofline import Best, Limits
from benchmarks.engines.sitting import Plan, Sitting
from benchmarks.engines.workloads import Workload
from benchmarks.random_model import SHAPES
from quire.weights.hub import EMBEDDED
from tests.lora.making import save_adapter

SMALL = {
    "W1": Workload("W1", "one stream", "decode tokens/s", 1, 8, 4),
    "W2": Workload("W2", "one prompt", "prompt tokens/s", 1, 40, 1),
    "W3": Workload("W3", "requests", "output tokens/s", 3, 8, 4),
    "W4": Workload("W4", "shared", "output tokens/s", 3, 4, 4, shared=20),
    "W5": Workload("W5", "adapters", "output tokens/s", 3, 8, 4, adapters=True),
    "W6": Workload("W6", "server", "output tokens/s", 3, 8, 4, server=True),
}
ROOM = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 16 << 20}
LIMITS = Limits("12:00", reads={1 << 30: 1e10}, torch={"bfloat16": 1e12, "int8": 1e12})
# Answers like an engine, slowly where there are three prompts, wrongly where there is one long one.
STRANGE = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    time.sleep(60 if len(asked["prompts"]) == 3 else 0)
    count = asked["output"] - (len(asked["prompts"][0]) == 40)
    print(json.dumps({"seconds": 0.5, "tokens": [[1] * count] * len(asked["prompts"])}), flush=True)
"""
SILENT = "import time; time.sleep(60)"


class Tiny:
    """In place of `checkpoints.Work`: the embedded model is there, adapters of it are made, and nothing else can be."""

    shape = "0.5b"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, form: str) -> Path:
        return self._folder / "adapters" if form == "adapters" else EMBEDDED / "quire-tiny"

    def make(self, form: str) -> None:
        if form == "adapters" and not self.path(form).exists():
            for number in range(8):
                save_adapter(self.path(form) / str(number), EMBEDDED / "quire-tiny", number, r=16)
        if form.startswith("ov-"):
            raise CannotMake("no exporter")

    def weight_bytes(self, form: str) -> int:
        return 1 << 20


@dataclass(frozen=True)
class Here(Place):
    def installed(self, entry: Entry) -> bool:
        return entry.peer != "vllm"

    def worker(self, entry: Entry, workloads: tuple[str, ...] = ()) -> list[str]:
        scripts = {"strange": STRANGE, "broken": "raise SystemExit('it does not start')", "silent": SILENT}
        if entry.engine in scripts:
            return [sys.executable, "-c", scripts[entry.engine]]
        return super().worker(entry, workloads)

    def server(self, entry: Entry, port: int) -> list[str]:
        return [sys.executable, "-c", SILENT] if entry.engine == "silent" else super().server(entry, port)


def sit(tmp_path: Path, entered: list[Entry], plan: Plan, names: str) -> Sitting:
    place = Here(Tiny(tmp_path), None, 1, ROOM)  # type: ignore[arg-type]
    workloads = {name: SMALL[name] for name in names.split()}
    sitting = Sitting(place, entered, workloads, plan, tmp_path, ids=range(20, 200), measure_limits=lambda: LIMITS)
    sitting.run()
    return sitting


def shown(sitting: Sitting) -> str:
    facts: dict[str, Any] = {"shape": "0.5b", "time": "now", "processor": "p", "flags": {"avx2": True, "amx_tile": False}}
    facts |= {"threads": 1, "memory_gib": 1, "huge_pages": "madvise", "load_average": 0, "code": "c", "ops": "auto"}
    facts |= {"rounds": 1, "repeats": 1, "limit": 1.0}
    return page.page(facts, list(sitting.told.values()), SMALL, SHAPES["0.5b"], sitting.limits)


def test_quire_through_every_workload(tmp_path: Path) -> None:
    ours = Entry("quire-bf16", "16-bit", None, "quire", "bf16", tuple(SMALL), {"dtype": "bfloat16"})
    sitting = sit(tmp_path, [ours], Plan(1, 2, 120.0), " ".join(SMALL))
    told = sitting.told["quire-bf16"]
    for name in ("W1", "W2", "W3", "W4", "W6"):
        assert told.cells[name].problem is None
        assert len(told.cells[name].runs) == 2
        assert told.cells[name].rate(SMALL[name]) > 0
    assert told.cells["W5"].runs
    assert [run.tokens for run in told.cells["W6"].runs] == [12, 12]
    assert told.cells["W6"].median("ttft_ms") > 0
    assert len(told.first_tokens) == 24
    assert told.weight_bytes > 1 << 20
    assert len(told.load_seconds) == len(told.start_seconds) == 1
    assert min(told.peak_mib) > 50
    assert len(sitting.limits) == 2
    text = shown(sitting)
    assert "not there: amx_tile" in text
    (row,) = [row for row in page.summary([told], SMALL, SHAPES["0.5b"], Best((LIMITS,))) if row["workload"] == "W3"]
    assert row["quire"] > 0
    assert row["peer"] is None
    json.dumps(told.as_dict(SMALL))


def test_engines_that_fail_take_nothing_with_them(tmp_path: Path) -> None:
    entered = [
        Entry("vllm-bf16", "16-bit", "vllm", "vllm", "bf16", ("W1",)),
        Entry("openvino-int8", "8-bit", "openvino", "openvino", "ov-int8", ("W1",)),
        Entry("broken", "16-bit", None, "broken", "bf16", ("W1", "W3")),
        Entry("strange", "16-bit", None, "strange", "bf16", ("W3", "W2", "W1")),
    ]
    sitting = sit(tmp_path, entered, Plan(2, 1, 1.5), "W1 W2 W3")
    told = sitting.told
    assert told["vllm-bf16"].cells["W1"].problem == "not installed"
    assert told["openvino-int8"].cells["W1"].problem == "no exporter"
    assert "it does not start" in told["broken"].cells["W3"].problem
    cells = told["strange"].cells
    assert cells["W3"].problem == "did not finish within 2 s"
    assert cells["W2"].problem == "Failed: gave [0] tokens instead of 1" or "gave [0] tokens" in cells["W2"].problem
    assert [run.round for run in cells["W1"].runs] == [0, 1]
    text = shown(sitting)
    assert "- vllm-bf16: not installed" in text
    assert "strange W3: did not finish" in text
    assert "| vllm-bf16 | 0.32.0 | - | not installed |" in text


def test_an_engine_that_does_not_load_is_not_said_to_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.engines.sitting.LOAD_SECONDS", 1.0)
    silent = Entry("silent", "16-bit", None, "silent", "bf16", ("W1", "W3", "W6"))
    told = sit(tmp_path, [silent], Plan(1, 1, 50.0), "W1 W3 W6").told["silent"]
    assert {name: cell.problem for name, cell in told.cells.items()} == dict.fromkeys(
        ("W1", "W3", "W6"), "did not load within 1 s"
    )


def test_a_workload_that_was_not_come_to_is_a_dash(tmp_path: Path) -> None:
    strange = Entry("strange", "16-bit", None, "strange", "bf16", ("W1",))
    sitting = sit(tmp_path, [strange], Plan(1, 1, 9.0), "W1")
    sitting.told["strange"].cell("W4")  # as an interruption leaves it
    assert "none, see below" not in shown(sitting)


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    strange = Entry("strange", "16-bit", None, "strange", "bf16", ("W1",))
    place = Here(Tiny(tmp_path), None, 1, ROOM)  # type: ignore[arg-type]

    def interrupt() -> None:
        raise KeyboardInterrupt

    sitting = Sitting(
        place, [strange], SMALL, Plan(3, 1, 9.0), tmp_path, after_turn=interrupt, measure_limits=lambda: LIMITS
    )
    with pytest.raises(KeyboardInterrupt):
        sitting.run()
    assert len(sitting.told["strange"].cells["W1"].runs) == 1
    assert "| strange |" in shown(sitting)


def test_everybody_is_in_the_list() -> None:
    listed = list(entries())
    assert len({entry.name for entry in listed}) == len(listed)
    for kind in page.KINDS:
        assert {entry.engine for entry in listed if entry.kind == kind} >= {"quire", "vllm", "openvino", "llama.cpp"}
    assert {name for entry in listed if entry.name == "quire-bf16" for name in entry.workloads} == set(SMALL)


def test_no_host_and_no_folder_in_commands_of_servers() -> None:
    place = Here(Tiny(Path("work")), Path("/peers"), 2)  # type: ignore[arg-type]
    vllm = next(entry for entry in entries() if entry.name == "vllm-bf16")
    assert "vllm.entrypoints.openai.api_server" in place.server(vllm, 1)
    assert place.environment(vllm)["VLLM_CPU_OMP_THREADS_BIND"].startswith("0")
