"""The native row kernels on every instruction set that this machine can run: against float64, against the reference's bits
where a formula has one meaning only, and row by row. Their outputs are poisoned with NaN before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from quire.ops import cpu, reference
from quire.ops.cpu import library, rows
from tests.ops.shapes import CHUNKS, borders, threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 3, 16, 63, 80, 130, 896)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


@pytest.fixture(params=library.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(best)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else 77, dtype=dtype)

    monkeypatch.setattr(rows.torch, "empty", empty)
    monkeypatch.setattr(rows.torch, "empty_like", lambda x, **_: empty(*x.shape, dtype=x.dtype))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: Tensor, exact: Tensor, steps: float = 1.0, floor: float = 1e-6) -> None:
    """Within `steps` roundings of the type, and `floor`, of the value; NaN nowhere."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - exact).abs()
    assert (error <= exact.abs() * (steps * eps + floor) + floor).all(), error.max()


def assert_exact_by_row(compute: Callable[[Tensor], Tensor], count: int) -> None:
    """compute(numbers of rows): any rows, in any order, by any number of threads."""
    every = torch.arange(count)
    with threads(1):
        expected = compute(every)
    for number in (1, 2):
        with threads(number):
            assert torch.equal(compute(every), expected)
            for chunks in CHUNKS[::2]:
                for start, end in borders(count, chunks):
                    assert torch.equal(compute(every[start:end]), expected[start:end])
            order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
            assert torch.equal(compute(order), expected[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_norms(size: int, dtype: torch.dtype) -> None:
    x = random(37, size, dtype=dtype) * 3 + 0.5
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    for kind in (dtype, torch.float32):
        weight, bias = (random(size, seed=n, dtype=kind) for n in (1, 2))
        root = (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_near(cpu.rms_norm(x, weight, 1e-5, 1.0), wide / root * (1 + weight.double()), floor=2e-6)
        exact = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        assert_near(cpu.layer_norm(x, weight, bias, 1e-3), exact * weight.double() + bias.double(), floor=1e-5)
        assert_near(cpu.layer_norm(x, None, None, 1e-3), exact, floor=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_row_by_row(dtype: torch.dtype) -> None:
    for size in (77, 896):
        x, weight = random(131, size + 3, dtype=dtype)[:, :size], random(size, seed=1, dtype=dtype)
        assert_exact_by_row(lambda n: cpu.rms_norm(x[n], weight, 1e-6), len(x))  # noqa: B023
        assert_exact_by_row(lambda n: cpu.layer_norm(x[n], weight, weight, 1e-6), len(x))  # noqa: B023
        assert torch.equal(cpu.rms_norm(x, weight, 1e-6), cpu.rms_norm(x.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half,size", [(1, 2), (3, 14), (6, 12), (16, 80), (32, 64), (64, 128)])
def test_rope_is_the_reference_to_the_bit(half: int, size: int, dtype: torch.dtype) -> None:
    angles = random(50, half) * 100
    wide = random(50, 5, size + 1, dtype=dtype)
    cos, sin = torch.cos(angles), torch.sin(angles)
    for x in (wide[..., :size], wide[:, 1:3, :size], wide[..., :size].contiguous()):
        assert torch.equal(cpu.rope(x, cos, sin), reference.rope(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(kind: str, dtype: torch.dtype) -> None:
    x = torch.cat([random(61, 77) * 3, torch.linspace(-120, 120, 10 * 77).view(10, 77)]).to(dtype)
    most = 1e3 if dtype == torch.float16 else 1e30
    edges = torch.tensor([0.0, -0.0, 88.0, 89.0, -88.0, -89.0, most, -most, 0.625, -0.625, 1.303, -1.303, 5.6]).to(dtype)
    x = torch.cat([x, edges.repeat(77).view(13, 77)])
    exact = KINDS[kind](x.double())
    assert_near(cpu.activation(x, kind), exact, floor=1e-6)
    other = random(*x.shape, seed=1, dtype=dtype)
    assert_near(cpu.gated_activation(x, other, kind), exact * other.double(), floor=1e-6)


def test_activations_of_what_is_not_finite() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan]])
    for kind in KINDS:
        got, expected = cpu.activation(x, kind), reference.activation(x, kind)
        assert torch.equal(got.isnan(), expected.isnan()), kind
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)), kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_row_by_row(kind: str, dtype: torch.dtype) -> None:
    for size in (1, 77, 1024):
        both = random(131, 2 * size, dtype=dtype) * 4
        gate, up = both[:, :size], both[:, size:]
        assert_exact_by_row(lambda n: cpu.gated_activation(gate[n], up[n], kind), len(both))  # noqa: B023
        assert torch.equal(cpu.gated_activation(gate, up, kind), cpu.gated_activation(gate.contiguous(), up, kind))
        assert torch.equal(cpu.activation(gate, kind)[:, -1:], cpu.activation(gate[:, -1:], kind))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_embedding(dtype: torch.dtype) -> None:
    table = (random(300, 45) * 9).to(dtype)
    ids = torch.randint(0, 300, (700,), generator=torch.Generator().manual_seed(1))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(cpu.embedding(ids, table[:, :33]), table[ids, :33])
    assert torch.equal(cpu.embedding(ids[:6].view(2, 3), table), table[ids[:6]].view(2, 3, 45))
    with pytest.raises(AssertionError):
        cpu.embedding(torch.tensor([300]), table)


def test_gradients_are_those_of_the_reference() -> None:
    """The forward pass is the kernel's also where gradients are wanted."""
    x, weight, bias = random(9, 20), random(20, seed=1), random(20, seed=2)
    cases = [  # what has kernels of its own stands below
        (lambda o, x, w: o.rms_norm(x, w, 1e-6, 1.0), (x, weight)),
        (lambda o, x, w, b: o.layer_norm(x, w, b, 1e-6), (x, weight, bias)),
        (lambda o, w: o.rms_norm(x, w, 1e-6, 0.0), (weight,)),
        (lambda o, x: o.embedding(torch.tensor([1, 1, 3]), x), (x,)),
    ]
    for function, tensors in cases:
        gradients = []
        for module in (cpu, reference):
            leaves = [t.clone().requires_grad_() for t in tensors]
            out = function(module, *leaves)
            gradients.append(torch.autograd.grad(out, leaves, random(*out.shape, seed=5)))
            if module is cpu:
                assert torch.equal(out, function(cpu, *tensors))
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.equal(ours, theirs)


def exact_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """In float64, by torch."""
    leaves = [t.double().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy.double())


def assert_gradients(
    compute: Callable[..., Tensor], exact: Callable[..., Tensor], tensors: tuple[Tensor, ...], floor: float = 3e-6
) -> None:
    """compute(*tensors) on the kernels against exact(*tensors); alone, apart, and by any number of threads."""
    dy = random(*compute(*tensors).shape, seed=9, dtype=tensors[0].dtype)

    def gradients(rows: Tensor) -> list[Tensor]:
        leaves = [t[rows].requires_grad_() for t in tensors]
        return list(torch.autograd.grad(compute(*leaves, rows=rows), leaves, dy[rows]))

    every = torch.arange(len(dy))
    with threads(1):
        found = gradients(every)
    for got, expected in zip(found, exact_gradients(exact, tensors, dy), strict=True):
        assert_near(got, expected, floor=floor)
    for count in (1, 2):
        with threads(count):
            for rows in (every, every.flip(0), every[5:6], every[::3]):
                assert all(torch.equal(one, all_of[rows]) for one, all_of in zip(gradients(rows), found, strict=True))
    leaf = tensors[0].detach().clone().requires_grad_()
    out = compute(leaf, *tensors[1:])
    spread = torch.autograd.grad(out.sum(), leaf)[0]  # dy of one number, all strides 0
    leaf = tensors[0].detach().clone().requires_grad_()
    assert torch.equal(spread, torch.autograd.grad(compute(leaf, *tensors[1:]), leaf, torch.ones_like(out))[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 80, 896])
def test_gradients_of_norms(size: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(19, size, dtype=dtype) * 3 + 0.5, random(size, seed=1, dtype=dtype), random(size, seed=2)
    wide = weight.double()

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + wide)

    def layer(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt()

    floor = 3e-5 if size > 1 else 1e-3  # of one number nothing is left but the rounding of a difference
    assert_gradients(lambda x, rows=None: cpu.rms_norm(x, weight, 1e-3, 1.0), rms, (x,), floor)
    assert_gradients(lambda x, rows=None: cpu.layer_norm(x, None, None, 1e-2), layer, (x,), floor)
    assert_gradients(lambda x, rows=None: cpu.layer_norm(x, weight, bias, 1e-2), lambda x: layer(x) * wide, (x,), floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_activations(kind: str, dtype: torch.dtype) -> None:
    for size in (1, 77):
        x = torch.cat([random(23, size) * 3, torch.linspace(-60, 60, 4 * size).view(4, size)]).to(dtype)
        up = random(27, size, seed=3, dtype=dtype)
        assert_gradients(lambda x, rows=None: cpu.activation(x, kind), KINDS[kind], (x,))
        assert_gradients(lambda x, u, rows=None: cpu.gated_activation(x, u, kind), lambda x, u: KINDS[kind](x) * u, (x, up))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_activations_far_out(kind: str) -> None:
    x = torch.tensor([[-1e30, -3e4, -1e3, -200.0, 200.0, 1e3, 3e4, 1e30]]).requires_grad_()
    gradient = torch.autograd.grad(cpu.activation(x, kind).sum(), x)[0]
    assert torch.equal(gradient, (x > 0).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rope(dtype: torch.dtype) -> None:
    for half, size in ((3, 14), (32, 64)):
        angles = random(19, half) * 100
        cos, sin = torch.cos(angles), torch.sin(angles)
        every = torch.arange(19)

        def turned(x: Tensor, rows: Tensor = every) -> Tensor:
            return cpu.rope(x, cos[rows], sin[rows])  # noqa: B023

        def exact(x: Tensor) -> Tensor:
            first, second, c, s = x[..., :half], x[..., half : 2 * half], cos.double()[:, None], sin.double()[:, None]  # noqa: B023
            return torch.cat([first * c - second * s, second * c + first * s, x[..., 2 * half :]], -1)  # noqa: B023

        assert_gradients(turned, exact, (random(19, 3, size, dtype=dtype),))


def test_fused_instruction_sets_agree_to_the_bit(isa: str) -> None:
    if isa == "generic":
        pytest.skip("rounds between multiply and add")
    x, weight = random(20, 300) * 3, random(300, seed=1)

    def compute() -> list[Tensor]:
        return [
            *(cpu.activation(x, kind) for kind in KINDS),
            cpu.rms_norm(x, weight, 1e-6),
            cpu.layer_norm(x, weight, weight, 1e-6),
        ]

    got = compute()
    library.set_isa(library.isas()[0])
    assert all(torch.equal(ours, best) for ours, best in zip(got, compute(), strict=True))
