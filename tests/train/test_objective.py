"""The losses by hand: DPO as its paper and TRL write it, and the weighted mean of cross-entropies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from quire.lora.slots import Slots
from quire.train import objective
from quire.train.config import TrainingConfig
from quire.train.run import TrainingRun
from tests.train.making import load, pairs, train


def test_dpo_is_its_formula() -> None:
    torch.manual_seed(0)
    counts = [3, 2, 4, 1]
    losses = torch.rand(10, dtype=torch.float64).requires_grad_()
    reference = [-1.5, -0.7, -2.0, -0.4]
    policy = torch.stack([-part.sum() for part in losses.split(counts)])
    ratios = policy - torch.tensor(reference, dtype=torch.float64)
    wanted = sum(-torch.nn.functional.logsigmoid(0.3 * (ratios[n] - ratios[n + 1])) for n in (0, 2)) / 2
    (slope,) = torch.autograd.grad(wanted, losses)
    loss, right, factors = objective.preference(losses.detach(), counts, reference, 0.3, 2)
    assert loss == pytest.approx(wanted.item(), abs=1e-12)
    assert right == sum(int(ratios[n] > ratios[n + 1]) for n in (0, 2))
    torch.testing.assert_close(factors, slope.float())


def test_dpo_begins_at_log_two_and_pulls_the_answers_apart(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    config = TrainingConfig(r=4, method="dpo", max_steps=6, learning_rate=5e-3, per_device_train_batch_size=4)
    rows = pairs()
    run = TrainingRun(model, Slots(model), config, rows, rows)
    before = run.score([one.rejected for one in rows]), run.score(rows)
    reports = train(run)
    assert reports[0].loss == pytest.approx(math.log(2), abs=1e-6)
    assert reports[-1].loss < 0.3
    assert reports[-1].accuracy == 1.0
    after = run.score([one.rejected for one in rows]), run.score(rows)

    def margin(rejected: list[list[float]], wanted: list[list[float]]) -> float:
        return sum(map(sum, wanted)) - sum(map(sum, rejected))

    assert margin(*after) > margin(*before) + 1
    # The reference is the base, which the adapter does not touch.
    assert reports[-1].validation_loss is not None
    run.close()


def test_the_supervised_loss_is_a_weighted_mean() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 1.0])
    loss, factors = objective.supervised(losses, weights, 5.0)
    assert loss == pytest.approx((1 + 1 + 4) / 5)
    torch.testing.assert_close(factors, weights / 5)
