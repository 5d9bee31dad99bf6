"""Memory for training in the plan: as much as a run takes, the cache that much smaller, and a way out when it is too much."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cli.serve import _with_adapters
from quire.config import EngineConfig
from quire.errors import ConfigError, DoesNotFit
from quire.models.config import read_model_config
from quire.plan import training
from quire.plan.memory import find_plan, make_plan
from quire.plan.training import training_bytes
from quire.service.job_request import MICRO_BATCH_TOKENS
from quire.train import loss
from quire.train.flat import FlatParameters
from tests.lora.making import LINEAR, random_adapter
from tests.plan.models import GIB, machine, shape


def test_as_much_as_the_numbers_of_a_run_take(tiny_llama: Path) -> None:
    flat = FlatParameters(random_adapter(tiny_llama, 1, r=16, targets=LINEAR).trained_further())
    held = sum(tensor.nbytes for tensor in (flat.values, flat.gradient, flat.first, flat.second))
    assert training_bytes(read_model_config(tiny_llama), 4, 16, 512).adapter == held


def test_what_the_torch_free_room_repeats_is_the_same() -> None:
    assert (training.MOST_LOGITS, training.MOST_ROWS) == (loss.MOST_LOGITS, loss.MOST_ROWS)
    assert training.PIECE_TOKENS == MICRO_BATCH_TOKENS


def test_it_leaves_the_cache_that_much_less() -> None:
    config = {"model": "m", "max_model_len": 8192, "gpu_memory_utilization": 1.0, "max_num_seqs": 256, "enable_lora": True}
    plans = [make_plan(EngineConfig(**config, training_jobs=n), shape(), GIB, machine(4 * GIB)) for n in (0, 1, 3)]
    without, one, three = plans
    each = training_bytes(shape(), 2, 16, training.PIECE_TOKENS)
    assert (without.training_bytes, one.training_bytes) == (0, each.total)
    assert three.training_bytes == each.total + 2 * each.adapter, "jobs that train together share their pieces"
    for plan in plans:
        assert plan.needed_bytes == plan.serving_bytes + plan.training_bytes <= plan.memory_budget
        lost = (without.num_blocks - plan.num_blocks) * plan.bytes_per_block
        assert abs(lost - plan.training_bytes) <= plan.bytes_per_block
        assert ("training " in plan.describe()[1]) == bool(plan.training_bytes)


def test_more_jobs_than_find_room_are_told_with_a_number_that_does() -> None:
    config = {"model": "m", "enable_lora": True, "max_lora_rank": 64, "training_jobs": 40}
    with pytest.raises(DoesNotFit, match=r"40 training jobs of rank 64[\s\S]*--training-jobs (\d+)") as found:
        make_plan(EngineConfig(**config), shape(), GIB, machine(8 * GIB))
    number = int(str(found.value).split("--training-jobs ")[1].split()[0])
    for jobs, fits in ((number, True), (number + 1, False)):
        plan = find_plan(EngineConfig(**{**config, "training_jobs": jobs}), shape(), GIB, machine(8 * GIB))
        assert (plan is not None) == fits


def test_a_server_that_trains_plans_for_as_many_as_train_together() -> None:
    nothing = dict.fromkeys(("enable_lora", "max_loras", "max_cpu_loras", "preset", "gpu_memory_utilization", "data_dir"))
    given = {**nothing, "enable_fine_tuning": True, "max_training_jobs": None, "training_jobs": None}
    assert _with_adapters(given)["training_jobs"] == 1
    assert _with_adapters({**given, "max_training_jobs": 3})["training_jobs"] == 3
    assert _with_adapters({**given, "training_jobs": 0})["training_jobs"] == 0
    with pytest.raises(ConfigError, match="training_jobs needs enable_lora"):
        EngineConfig("m", training_jobs=1)
