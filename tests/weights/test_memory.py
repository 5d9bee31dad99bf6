"""Starting takes little more memory than the weights: measured in a process of its own, on a model of 0.1 billion numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quire.models.config import parse_model_config
from quire.models.registry import build_model
from quire.ops.select import selected
from tests.conftest import CONFIG, write_tokenizer

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "torch_dtype": "bfloat16",
}
PEAK = """
import json, sys
from quire import LLM, SamplingParams

def resident(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) << 10

def started(folder, **options):
    llm = LLM(folder, num_gpu_blocks_override=64, max_model_len=512, max_num_batched_tokens=64, **options)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), use_tqdm=False)
    return llm.plan

small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
started(small, **options)  # code, and its memory
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
plan = started(large, **options)
print(json.dumps({"peak": resident("VmHWM") - before, "weights": plan.weight_bytes, "kv": plan.kv_bytes}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    config = {**CONFIG, **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = build_model(parse_model_config(config))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    weights = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    _read_anew(folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def _read_anew(path: Path) -> None:
    """As after a restart of the machine: what is read ahead comes in large blocks, which are mapped as a whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 24):
            pass


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not tell the peak"),
    pytest.mark.skipif(selected().__name__ != "quire.ops.cpu", reason="the reference makes packed weights dense to multiply"),
]


def _measured(small: Path, large: Path, options: dict) -> dict[str, int]:
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large), json.dumps(options)],
        check=True, capture_output=True, text=True, env={**os.environ, "QUIRE_OPS": "cpu"},
    )  # fmt: skip
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    assert found["weights"] > 50 << 20
    return found


def _little(found: dict[str, int]) -> bool:
    return found["peak"] <= found["weights"] * 1.1 + found["kv"]


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "kv_cache_dtype": "int8"}], ids=str)
def test_peak_is_at_most_the_weights_and_a_tenth(large: Path, tiny_llama: Path, options: dict) -> None:
    # The least of up to three: a library's pages that the system took away before and brings back meanwhile only add.
    measured = []
    for _ in range(3):
        measured.append(_measured(tiny_llama, large, options))
        if _little(measured[-1]):
            return
    raise AssertionError(measured)


def test_keeping_packed_weights_and_taking_them_needs_no_more(large: Path, tiny_llama: Path, tmp_path: Path) -> None:
    measured = []
    for number in range(3):
        options = {"packed_cache": str(tmp_path / str(number))}
        measured += [_measured(tiny_llama, large, options) for _ in range(2)]
        assert len(list((tmp_path / str(number)).glob("*.packed"))) == 2  # the small model's, and this one's
        if _little(measured[-2]) and _little(measured[-1]):
            return
    raise AssertionError(measured)
