"""Memory for adapters in the plan: as much as they take, and a way out when they are too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.config import EngineConfig
from quire.errors import DoesNotFit
from quire.models.config import read_model_config
from quire.plan.adapters import adapter_bytes
from quire.plan.memory import find_plan, make_plan
from tests.lora.making import LINEAR, random_adapter
from tests.plan.models import GIB, machine, shape


def test_as_much_as_an_adapter_on_every_linear_takes(tiny_llama: Path) -> None:
    adapter = random_adapter(tiny_llama, 1, r=16, targets=LINEAR)
    assert adapter_bytes(read_model_config(tiny_llama), 16) == adapter.bytes


def test_it_leaves_the_cache_that_much_less() -> None:
    config = {"model": "m", "max_model_len": 8192, "gpu_memory_utilization": 1.0, "max_num_seqs": 256}
    without = make_plan(EngineConfig(**config), shape(), GIB, machine(4 * GIB))
    with_them = make_plan(
        EngineConfig(**config, enable_lora=True, max_loras=2, max_cpu_loras=8), shape(), GIB, machine(4 * GIB)
    )
    assert without.adapter_bytes == 0
    assert with_them.adapter_bytes == 8 * adapter_bytes(shape(), 16)
    assert with_them.needed_bytes <= with_them.memory_budget
    lost = (without.num_blocks - with_them.num_blocks) * with_them.bytes_per_block
    assert abs(lost - with_them.adapter_bytes) <= with_them.bytes_per_block
    assert "adapters 2" in with_them.describe()[1]
    assert "adapters" not in without.describe()[1]


def test_too_many_are_refused_with_a_number_that_fits() -> None:
    config = EngineConfig("m", enable_lora=True, max_loras=2, max_cpu_loras=4000, max_lora_rank=64)
    with pytest.raises(DoesNotFit, match=r"4000 adapters of rank 64 .* GiB[\s\S]*--max-cpu-loras (\d+)") as found:
        make_plan(config, shape(), GIB, machine(8 * GIB))
    number = int(str(found.value).split("--max-cpu-loras ")[1].split()[0])
    for kept, fits in ((number, True), (number + 1, False)):
        plan = find_plan(
            EngineConfig("m", enable_lora=True, max_loras=2, max_cpu_loras=kept, max_lora_rank=64),
            shape(),
            GIB,
            machine(8 * GIB),
        )
        assert (plan is not None) == fits
