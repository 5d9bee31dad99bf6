"""The chunked loss over the head: the log-probabilities are those of serving, the gradients those of the whole computation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire import ops
from quire.ops import cpu, loss, plain, reference
from quire.ops.reference.packed import dense_values
from quire.ops.weights import DenseWeight
from quire.sampling.logprobs import token_logprobs
from tests.ops.shapes import threads
from tests.ops.test_native_linear import random, weight_of

ROWS, WIDTH, VOCABULARY = 50, 64, 300


@pytest.fixture(params=[cpu, reference, plain], ids=["cpu", "reference", "plain"], autouse=True)
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "selected", lambda: request.param)
    monkeypatch.setattr(loss, "chunk_rows", lambda _: 17)


def whole(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None) -> Tensor:
    """The loss in float64."""
    logits = hidden @ head.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return -(weights.double() * torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]).sum()


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))
    weights = random(ROWS, seed=2).abs()
    weights[5] = 0
    return random(ROWS, WIDTH).to(dtype), targets, weights


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("form", ["tensor", "float32", "int4", "fp8"])
def test_loss_and_gradients(form: str, softcap: float | None) -> None:
    hidden, targets, weights = case()
    stored = weight_of("float32" if form == "tensor" else form, VOCABULARY, WIDTH)
    wide = dense_values(stored).double().requires_grad_()
    exact = hidden.double().requires_grad_()
    expected = whole(exact, wide, targets, weights, softcap)
    head = stored.values.clone().requires_grad_() if form == "tensor" else ops.pack(stored)
    hidden.requires_grad_()
    total, logprobs = ops.head_loss(hidden, head, targets, weights, softcap=softcap)
    rounded = 3e-2 if form == "int4" else 1e-5  # whose products round x to integers
    assert torch.allclose(total.double(), expected, rtol=rounded)
    assert not logprobs.requires_grad
    (3 * total).backward()
    (3 * expected).backward()
    far = 0.3 if form == "int4" else 1e-4
    assert (hidden.grad.double() - exact.grad).norm() <= far * exact.grad.norm()
    assert not hidden.grad[5].any()
    if form == "tensor":
        assert (head.grad.double() - wide.grad).norm() <= far * wide.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_probabilities_are_those_of_serving(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, targets, weights = case(dtype)
    packed = ops.pack(DenseWeight(random(VOCABULARY, WIDTH, seed=4).to(dtype)))
    for count in (1, 2):
        with threads(count):
            logprobs = ops.head_loss(hidden, packed, targets, weights, softcap=softcap)[1]
            for row in range(0, ROWS, 7):
                logits = ops.packed_linear(hidden[row : row + 1], packed).float()
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                assert logprobs[row].item() == token_logprobs(logits, targets[row : row + 1], [0])[0].logprob


def test_chunks_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, weights = case(torch.bfloat16)
    packed, found = ops.pack(DenseWeight(random(VOCABULARY, WIDTH, seed=4).to(torch.bfloat16))), []
    for size, count in ((17, 1), (17, 2), (1, 1), (16, 2), (100, 1)):
        monkeypatch.setattr(loss, "chunk_rows", lambda _, size=size: size)
        with threads(count):
            leaf = hidden.clone().requires_grad_()
            total, logprobs = ops.head_loss(leaf, packed, targets, weights)
            total.backward()
            found.append((logprobs, leaf.grad))
    if ops.selected() is not cpu:  # torch's own products carry no such promise
        found = found[:1]
    for logprobs, grad in found[1:]:
        assert torch.equal(logprobs, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_no_rows_and_no_gradients() -> None:
    hidden, targets, weights = case()
    packed = ops.pack(DenseWeight(random(VOCABULARY, WIDTH, seed=4)))
    total, logprobs = ops.head_loss(hidden[:0], packed, targets[:0], weights[:0])
    assert total == 0
    assert logprobs.shape == (0,)
    assert not ops.head_loss(hidden, packed, targets, weights)[0].requires_grad
