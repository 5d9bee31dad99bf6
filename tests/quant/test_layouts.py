"""Each published layout, written bit by bit in the test, is read as the numbers that were written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quire.errors import ModelError
from quire.ops.reference.packed import dense_values
from quire.ops.weights import Fp8Weight, Int4Weight, Int8Weight
from quire.quant.scheme import Form, Scheme, parse
from quire.quant.stored import read
from tests.quant import packers

OUTPUTS, INPUTS, SIZE = 24, 128, 32
AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "desc_act": False, "sym": False}
CT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": SIZE, "symmetric": False},
        }
    },
}
INT8 = Scheme("compressed-tensors", Form("int8"), "quantized")
FP8 = Scheme("fp8", Form("fp8"), "quantized")


def test_awq() -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    weight = read("m", packers.awq(numbers, zeros, scales), parse(AWQ), OUTPUTS, INPUTS)
    assert isinstance(weight, Int4Weight)
    assert weight.order is None
    assert torch.equal(dense_values(weight), packers.dense(numbers, zeros, scales, packers.natural(INPUTS, SIZE)))


@pytest.mark.parametrize("version", [1, 2])
def test_gptq(version: int) -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE, seed=version)
    of_input = packers.natural(INPUTS, SIZE)
    parts = packers.gptq(numbers, zeros, scales, of_input, version=version)
    config = {**GPTQ, "checkpoint_format": "gptq_v2"} if version == 2 else GPTQ
    weight = read("m", parts, parse(config), OUTPUTS, INPUTS)
    assert isinstance(weight, Int4Weight)
    assert weight.order is None
    assert torch.equal(dense_values(weight), packers.dense(numbers, zeros, scales, of_input))
    del parts["g_idx"]  # older files have none
    assert torch.equal(dense_values(read("m", parts, parse(config), OUTPUTS, INPUTS)), dense_values(weight))


@pytest.mark.parametrize("layout", ["gptq", "pack-quantized"])
def test_act_order(layout: str) -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    of_input = np.random.default_rng(5).permutation(packers.natural(INPUTS, SIZE))
    if layout == "gptq":
        parts, config = packers.gptq(numbers, zeros, scales, of_input), {**GPTQ, "desc_act": True}
    else:
        parts, config = packers.pack_quantized(numbers, zeros, scales, of_input), CT4
    weight = read("m", parts, parse(config), OUTPUTS, INPUTS)
    assert isinstance(weight, Int4Weight)
    assert weight.order is not None
    assert torch.equal(dense_values(weight), packers.dense(numbers, zeros, scales, of_input))


def test_groups_of_other_sizes_than_said_are_refused() -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    of_input = packers.natural(INPUTS, SIZE)
    of_input[0] = 1
    with pytest.raises(ModelError, match=r"m\.g_idx must put 32 inputs into each of 4 groups"):
        read("m", packers.gptq(numbers, zeros, scales, of_input), parse(GPTQ), OUTPUTS, INPUTS)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(symmetric: bool) -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    zeros = np.full_like(zeros, 8) if symmetric else zeros
    parts = packers.pack_quantized(numbers, None if symmetric else zeros, scales)
    weight = read("m", parts, parse(CT4), OUTPUTS, INPUTS)
    assert torch.equal(dense_values(weight), packers.dense(numbers, zeros, scales, packers.natural(INPUTS, SIZE)))


def test_one_group_a_row() -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, INPUTS)
    for config, parts in (
        ({**AWQ, "group_size": -1}, packers.awq(numbers, zeros, scales)),
        ({**GPTQ, "group_size": -1}, packers.gptq(numbers, zeros, scales, packers.natural(INPUTS, INPUTS))),
    ):
        weight = read("m", parts, parse(config), OUTPUTS, INPUTS)
        assert torch.equal(dense_values(weight), packers.dense(numbers, zeros, scales, packers.natural(INPUTS, INPUTS)))


@pytest.mark.parametrize("shape", [(), (1,), (OUTPUTS,), (OUTPUTS, 1)])
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
def test_eight_bits(scheme: Scheme, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.randint(-128, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    if scheme is FP8:
        values = torch.randn(OUTPUTS, INPUTS).to(torch.float8_e4m3fn)
    scales = torch.rand(shape, dtype=torch.bfloat16)
    weight = read("m", {"weight": values, "weight_scale": scales}, scheme, OUTPUTS, INPUTS)
    assert isinstance(weight, Int8Weight if scheme is INT8 else Fp8Weight)
    expected = values.float() * (scales.float().view(-1, 1) if shape else scales.float())
    assert torch.equal(dense_values(weight), expected)
    assert torch.equal(
        dense_values(read("m", {"weight": values, "weight_scale_inv": scales}, scheme, OUTPUTS, INPUTS)), expected
    )


def test_missing_and_misshapen_parts_are_named() -> None:
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    parts = packers.awq(numbers, zeros, scales)
    with pytest.raises(ModelError, match="layer has no qzeros, which awq weights need"):
        read("layer", {name: part for name, part in parts.items() if name != "qzeros"}, parse(AWQ), OUTPUTS, INPUTS)
    with pytest.raises(ModelError, match=r"layer\.qweight has shape \[128, 3\], the configuration says \[256, 3\]"):
        read("layer", parts, parse(AWQ), OUTPUTS, 2 * INPUTS)
    with pytest.raises(ModelError, match="groups of 32 and words of 8 do not divide"):
        read("layer", parts, parse(AWQ), OUTPUTS, INPUTS + 8)
    with pytest.raises(ModelError, match=r"weight has type torch\.int8, fp8 says"):
        read("m", {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.ones(1)}, FP8, 8, 8)


def test_compressed_tensors_own_packer_writes_what_is_read() -> None:
    """The package that defines the format, as the reference."""
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    del package
    numbers, zeros, scales = packers.random_weight(OUTPUTS, INPUTS, SIZE)
    parts = packers.pack_quantized(numbers, zeros, scales)
    assert torch.equal(pack_to_int32(torch.tensor(numbers - 8, dtype=torch.int8), 4), parts["weight_packed"])
    zero_points = torch.tensor(zeros - 8, dtype=torch.int8)
    assert torch.equal(pack_to_int32(zero_points, 4, packed_dim=0), parts["weight_zero_point"])
