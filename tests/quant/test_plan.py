"""Plans with quantized weights: smaller, offered as a way out, and refused for the same reasons as loading."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quire.cli.main import run
from quire.config import EngineConfig
from quire.errors import ConfigError, DoesNotFit, ModelError
from quire.models.config import read_model_config
from quire.plan.exits import diagnose
from quire.plan.memory import find_plan, make_plan
from quire.quant.sizes import WeightSizes, dense_sizes
from quire.weights.files import weight_sizes
from tests.plan.models import GIB, machine, shape
from tests.quant.checkpoints import CONFIGS, configured, quantized
from tests.quant.test_at_load import resident
from tests.quant.test_checkpoints import load

MODEL = shape()


def sizes() -> WeightSizes:
    """Of the planner's test model, as a checkpoint's headers would give them."""
    width, inner, layers = MODEL.hidden_size, MODEL.intermediate_size, range(MODEL.num_layers)
    keys = MODEL.num_kv_heads * MODEL.head_dim
    shapes = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
    shapes |= {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    tensors = [(f"model.layers.{n}.x.{name}.weight", size, "BF16") for n in layers for name, size in shapes.items()]
    tensors += [(name, (MODEL.vocab_size, width), "BF16") for name in ("model.embed_tokens.weight", "lm_head.weight")]
    return dense_sizes(tensors, tied=False)


def test_weights_shrink_as_they_should() -> None:
    config, space = EngineConfig("m"), machine(8 * GIB)
    dense = make_plan(config, MODEL, sizes(), space).weight_bytes
    share = {
        kind: make_plan(replace(config, quantization=kind), MODEL, sizes(), space).weight_bytes / dense
        for kind in ("int8", "int4", "fp8")
    }
    # The token table stays; for fp8 the head too.
    assert 0.5 < share["int8"] < share["fp8"] < 0.62
    assert 0.25 < share["int4"] < 0.4


def test_a_model_that_does_not_fit_may_fit_quantized() -> None:
    config, space = EngineConfig("m", max_model_len=256, max_num_seqs=1, max_num_batched_tokens=128), machine(GIB * 3 // 4)
    with pytest.raises(DoesNotFit, match="--quantization int8"):
        make_plan(config, MODEL, sizes(), space)
    ways = [way for way in diagnose(config, MODEL, sizes(), space).exits if "quantization" in way.options]
    assert [way.options for way in ways] == [{"quantization": "int8"}]
    assert find_plan(replace(config, quantization="int8"), MODEL, sizes(), space) is not None


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.usefixtures("reference_ops")
def test_stored_checkpoints_are_counted_from_headers(kind: str, tmp_path: Path) -> None:
    stored, _ = quantized(kind, tmp_path)
    assert weight_sizes(stored, read_model_config(stored)).as_stored.bytes_as(4) == resident(load(stored))


def test_the_command_plans_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, plain = quantized("awq", tmp_path)
    assert run(["plan", str(plain), "--quantization", "int4", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)["weight_bytes"]
    assert run(["plan", str(plain), "--json"]) == 0
    assert small < 0.6 * json.loads(capsys.readouterr().out)["weight_bytes"]
    assert run(["plan", str(stored), "--quantization", "int8"]) == 3
    assert "must be 'awq' or not given" in capsys.readouterr().err
    assert run(["plan", str(configured(stored, bits=2))]) == 5
    assert "quantization_config.bits must be 4, got 2" in capsys.readouterr().err


def test_wishes_are_checked_by_the_planner() -> None:
    with pytest.raises(ConfigError, match="needs a checkpoint that was stored so"):
        make_plan(EngineConfig("m", quantization="gptq"), MODEL, sizes(), machine(8 * GIB))
    with pytest.raises(ModelError, match="quant_method must be one of"):
        make_plan(EngineConfig("m"), shape(quantization_config={"quant_method": "hqq"}), GIB, machine(8 * GIB))


def test_planning_quantized_weights_imports_no_torch(tmp_path: Path) -> None:
    stored, plain = quantized("gptq", tmp_path)
    code = (
        "import sys; from quire.cli.main import run; run(['plan', sys.argv[1]]); run(['plan', sys.argv[2], '-q', 'int4']);"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(stored), str(plain)], check=True, capture_output=True)
