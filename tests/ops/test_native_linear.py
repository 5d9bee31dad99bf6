"""The native products with packed weights, against float64 and against the meaning of each form, on every instruction set
that this machine can run; and their contract: a row's bits depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quire.ops import cpu, reference
from quire.ops.cpu import library
from quire.ops.reference.packed import dense_values
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, Weight
from tests.ops.shapes import threads

ROWS = 131
SHAPES = [(64, 128), (33, 72), (1, 8), (100, 896), (96, 1032), (32, 2080)]
FORMS = ["float32", "bfloat16", "float16", "int8", "int4", "int4 in order", "fp8"]


@pytest.fixture(params=library.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(form: str, outputs: int, inputs: int) -> Weight:
    values = random(outputs, inputs, seed=1)
    most = values.abs().amax(1)
    match form:
        case "int8":
            return Int8Weight(torch.round(values / most[:, None] * 127).to(torch.int8), most / 127)
        case "fp8":
            return Fp8Weight((values / most[:, None] * 448).to(torch.float8_e4m3fn), most / 448)
        case "int4" | "int4 in order":
            size, groups = 32, inputs // 32
            generator = torch.Generator().manual_seed(2)
            return Int4Weight(
                torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, generator=generator),
                random(outputs, groups, seed=3).abs(),
                torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, generator=generator),
                size,
                torch.randperm(inputs, generator=generator) if form == "int4 in order" else None,
            )
    return DenseWeight(values.to(getattr(torch, form)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs,inputs", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product(isa: str, form: str, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    if "int4" in form:
        inputs = -(-inputs // 32) * 32  # whole groups
    weight, bias = weight_of(form, outputs, inputs), random(outputs, seed=4).to(dtype)
    packed = cpu.pack(weight)
    x = random(ROWS, inputs).to(dtype)
    product = cpu.packed_linear(x, packed, bias)
    if isinstance(weight, (Int8Weight, Int4Weight)):  # x becomes integers, as the form says
        expected = reference.packed_linear(x.float(), weight, bias.float()).double()
        bound = 1e-6 * expected.abs().max()
    else:
        wide = dense_values(weight).double()
        expected = x.double() @ wide.t() + bias.double()
        bound = 2.0**-24 * inputs**0.5 * 4 * (x.double().abs() @ wide.abs().t() + bias.double().abs())
    rounding = {torch.float32: 0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] * expected.abs()
    assert ((product.double() - expected).abs() <= bound + rounding).all()

    for count in (1, 2):
        with threads(count):
            assert torch.equal(cpu.packed_linear(x, packed, bias), product)
            for size in (1, 2, 3, 5, 12, 13, 50):
                parts = [cpu.packed_linear(part, packed, bias) for part in x.split(size)]
                assert torch.equal(torch.cat(parts), product), f"{size} rows at a time, {count} threads"


@pytest.mark.parametrize("form", FORMS)
def test_rows(isa: str, form: str) -> None:
    weight = weight_of(form, 100, 96)
    ids = torch.tensor([0, 99, 31, 32, 99])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = dense_values(weight)[ids].to(dtype)
        assert torch.equal(cpu.packed_rows(ids, cpu.pack(weight), dtype), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_that_fuses_gives_the_same_bits(form: str, dtype: torch.dtype) -> None:
    """All but those that sum pairs of bfloat16 inputs: AMX in its tiles, and AVX512_BF16."""
    best, weight, x = library.isa(), weight_of(form, 100, 896), random(17, 896).to(dtype)
    packed, results = cpu.pack(weight), {}
    for name in library.isas():
        library.set_isa(name)
        results[name] = cpu.packed_linear(x, packed)
    library.set_isa(best)
    paired = dtype == torch.bfloat16 and form in ("bfloat16", "fp8")
    differ = () if "int" in form else ("generic", "amx", "amx-emulated", "avx512_bf16") if paired else ("generic",)
    fused = [result for name, result in results.items() if name not in differ]
    assert len(fused) > 1 or len(results) < 3
    assert all(torch.equal(result, fused[0]) for result in fused)


def test_known_products(isa: str) -> None:
    assert library.right(isa)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [129, 500])
def test_blocks_of_many_rows(isa: str, form: str, rows: int) -> None:
    """More rows, outputs and inputs than one block of any kernel holds, by several weights at once."""
    weights = [cpu.pack(weight_of(form, outputs, 1120)) for outputs in (330, 40)]
    x = random(rows, 1120).to(torch.bfloat16)
    products = cpu.packed_linears(x, weights, [None, None])
    for weight, product in zip(weights, products, strict=True):
        for size in (1, 40, 150):
            part = slice(rows - size, rows)
            assert torch.equal(cpu.packed_linear(x[part], weight), product[part])
    with threads(2):
        again = cpu.packed_linears(x, weights, [None, None])
    assert all(map(torch.equal, products, again))


def test_all_256_fp8_values(isa: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = Fp8Weight(values[:, None].expand(256, 4).contiguous(), torch.ones(256))
    product = cpu.packed_linear(torch.tensor([[1.0, 0, 0, 0]]), cpu.pack(weight))[0]
    assert torch.equal(product.isnan(), values.float().isnan())
    assert torch.equal(product.nan_to_num(7), values.float().nan_to_num(7))


def test_rows_of_x_may_lie_apart(isa: str) -> None:
    packed, wide = cpu.pack(weight_of("bfloat16", 40, 64)), random(9, 200)
    for x in (wide[:, 10:74], wide[::2, :64], wide.t()[:64].t()):
        assert torch.equal(cpu.packed_linear(x, packed), cpu.packed_linear(x.contiguous(), packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_beyond_the_result(isa: str, dtype: torch.dtype) -> None:
    """Outputs that do not fill a panel: what lies behind them stays as it was."""
    packed, x = cpu.pack(DenseWeight(random(33, 16).to(dtype))), random(4, 16).to(dtype)
    room = torch.full((4, 40), float("nan"), dtype=dtype)
    library.call("linear", packed.struct, library.TYPES[dtype], 4, x.data_ptr(), 16, None, room.data_ptr(), 40)
    assert not room[:, :33].isnan().any()
    assert room[:, 33:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    packed, x = cpu.pack(weight_of("bfloat16", 40, 61)), random(5, 61).to(dtype)
    clean = cpu.packed_linear(x, packed)
    x[2, 3], x[3, 1] = float("nan"), float("inf")
    product = cpu.packed_linear(x, packed)
    assert product[2].isnan().all()
    assert not product[3].isfinite().any()
    assert torch.equal(product[[0, 1, 4]], clean[[0, 1, 4]])
