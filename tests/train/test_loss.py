"""The head and its loss: the log-probabilities of serving to the bit, the gradients of the formula, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.models.decoder import CausalLM
from quire.sampling import score
from quire.train import loss
from tests.ops.shapes import threads
from tests.parity.conftest import folder_of  # noqa: F401 - a fixture
from tests.train.making import load

ROWS = 40


Case = tuple[CausalLM, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", params=[("llama-llama3", "float32"), ("llama-llama3", "bfloat16"), ("gemma2", "float32")])
def case(request: pytest.FixtureRequest, folder_of: Callable[[str], tuple[Any, Path]]) -> Case:  # noqa: F811
    """A model, rows and targets; gemma2's logits are softly capped."""
    name, dtype = request.param
    model, source = load(folder_of(name)[1], dtype), torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, model.config.hidden_size, generator=source) * 4
    targets = torch.randint(0, model.config.vocab_size, (ROWS,), generator=source)
    return model, hidden.to(getattr(torch, dtype)), targets


def whole(model: CausalLM, hidden: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> loss.Scored:
    *_, found = loss.score_chunks(model, hidden, targets, None, gradient=gradient)
    return found


def test_losses_are_those_of_serving_whatever_the_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, targets = case
    with torch.no_grad():
        served = score(model.logits(hidden), targets.tolist(), 0)
    for rows, count in ((1024, 1), (7, 2), (1, 1)):
        monkeypatch.setattr(loss, "LEAST_ROWS", 1)
        monkeypatch.setattr(loss, "MOST_ROWS", rows)
        with threads(count):
            for gradient in (True, False):
                found = whole(model, hidden, targets, gradient=gradient)
                assert found.losses.tolist() == [-row.logprob for row in served]
                assert found.right.tolist() == [row.rank == 1 for row in served]


def test_the_gradient_is_that_of_the_formula(case: Case) -> None:
    model, hidden, targets = case
    leaf = hidden.clone().requires_grad_()
    losses = -torch.log_softmax(model.logits(leaf).double(), -1).gather(1, targets[:, None])
    wanted = torch.autograd.grad(losses.sum(), leaf)[0].double()
    found = whole(model, hidden, targets, gradient=True).gradient
    assert found is not None
    far = 2e-2 if hidden.dtype == torch.bfloat16 else 1e-5
    assert (found.double() - wanted).norm() <= far * wanted.norm()
