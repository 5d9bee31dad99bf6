"""What each operation means: compared with float64 on random data, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quire import ops
from tests.ops.shapes import ATTENTION, LINEAR, AttentionShape, exact_attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Largest difference, as a share of the largest value."""
    assert got.dtype == torch.float32
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("inputs,outputs", LINEAR)
def test_linear(inputs: int, outputs: int) -> None:
    x, weight, bias = random(50, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
    assert_close(ops.linear(x, weight, bias), x.double() @ weight.double().t() + bias)


def test_embedding() -> None:
    table = random(11, 5)
    assert torch.equal(ops.embedding(torch.tensor([3, 0, 10, 3]), table), table[[3, 0, 10, 3]])


def test_norms() -> None:
    x, weight, bias = random(9, 77), random(77, seed=1), random(77, seed=2)
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(ops.rms_norm(x, weight, 1e-5, 1.0), wide / root * (1 + weight.double()))
    expected = torch.nn.functional.layer_norm(wide, (77,), weight.double(), bias.double(), 1e-5)
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected)
    assert_close(ops.layer_norm(x, None, None, 1e-5), torch.nn.functional.layer_norm(wide, (77,), eps=1e-5))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(kind: str) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }
    x = torch.cat([random(4, 33) * 3, torch.tensor([[-200.0, -50.0, 0.0, 50.0, 200.0] + [1.0] * 28])])
    assert_close(ops.activation(x, kind), functions[kind](x.double()))
    assert_close(ops.gated_activation(x, x.flip(1), kind), functions[kind](x.double()) * x.double().flip(1))


def test_rope() -> None:
    """Pairs (i, i + R/2) as complex numbers, turned by the angle; what is past R passes through."""
    x, angles = random(6, 2, 14), random(6, 5, seed=1) * 100
    out = ops.rope(x, torch.cos(angles), torch.sin(angles))
    turned = torch.complex(x[..., :5].double(), x[..., 5:10].double()) * torch.polar(
        torch.ones(6, 1, 5, dtype=torch.float64), angles.double()[:, None]
    )
    assert_close(out[..., :10], torch.cat([turned.real, turned.imag], -1))
    assert torch.equal(out[..., 10:], x[..., 10:])


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_packed_attention(shape: AttentionShape) -> None:
    starts = (0, 1, 40, 331)
    q = random(331, shape.heads, shape.size)
    k, v = (random(331, shape.kv_heads, shape.size, seed=n) for n in (1, 2))
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    expected = [
        exact_attention(*(t[start:end].double() for t in (q, k, v)), shape)
        for start, end in pairwise(starts)
    ]
    assert_close(ops.packed_attention(q, k, v, starts, **options), torch.cat(expected))


def test_write_kv_touches_its_slots_only() -> None:
    keys, values = torch.zeros(4, 8, 2, 3), torch.zeros(4, 8, 2, 3)
    k, v = random(3, 2, 3), random(3, 2, 3, seed=1)
    ops.write_kv(keys, values, k, v, torch.tensor([31, 8, 9]))
    assert torch.equal(keys[3, 7], k[0])
    assert torch.equal(values[1, :2], v[1:])
    assert int(keys.count_nonzero()) == k.numel()


def test_gradients_of_linear() -> None:
    x, weight, bias = (t.requires_grad_() for t in (random(37, 13), random(7, 13, seed=1), random(7, seed=2)))
    grad = random(37, 7, seed=3)
    got = torch.autograd.grad(ops.linear(x, weight, bias), (x, weight, bias), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(wide[0] @ wide[1].t() + wide[2], wide, grad.double())
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (True, False, True)])
def test_linear_computes_only_the_gradients_that_are_wanted(needed: tuple[bool, bool, bool]) -> None:
    """LoRA training freezes the weights: their gradients must cost nothing."""
    tensors = [t.requires_grad_(n) for t, n in zip((random(5, 3), random(4, 3), random(4)), needed, strict=True)]
    ops.linear(*tensors).sum().backward()
    assert tuple(t.grad is not None for t in tensors) == needed


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_gradients_of_packed_attention(shape: AttentionShape) -> None:
    starts = (0, 1, 40, 190)
    tensors = [random(190, shape.heads, shape.size).requires_grad_()]
    tensors += [random(190, shape.kv_heads, shape.size, seed=n).requires_grad_() for n in (1, 2)]
    grad = random(190, shape.heads, shape.size, seed=3)
    options = {"scale": shape.size**-0.5, "window": shape.window, "softcap": shape.softcap}
    got = torch.autograd.grad(ops.packed_attention(*tensors, starts, **options), tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out = torch.cat(
        [
            exact_attention(*(t[start:end] for t in wide), shape)
            for start, end in pairwise(starts)
        ]
    )
    for ours, theirs in zip(got, torch.autograd.grad(out, wide, grad.double()), strict=True):
        assert_close(ours, theirs, 1e-5)


def test_training_and_serving_compute_the_same_bits() -> None:
    """With gradients on or off: the forward pass is the same."""
    x, weight = random(21, 48), random(30, 48, seed=1)
    q, k, v = random(21, 4, 12), random(21, 2, 12, seed=1), random(21, 2, 12, seed=2)
    expected = ops.linear(x, weight), ops.packed_attention(q, k, v, (0, 9, 21), scale=0.3)
    got = (
        ops.linear(x.requires_grad_(), weight.requires_grad_()),
        ops.packed_attention(q.requires_grad_(), k, v, (0, 9, 21), scale=0.3),
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.requires_grad
        assert torch.equal(ours, theirs)
