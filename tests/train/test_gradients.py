"""A training step against PEFT and torch: gradients, one optimizer step, and that no way of cutting a batch matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

from quire.batch import packed
from quire.lora.adapter import write_adapter
from quire.lora.slots import Slots
from quire.models.decoder import CausalLM
from quire.train.config import TrainingConfig
from quire.train.examples import Example
from quire.train.passes import Share, learn
from quire.train.run import TrainingRun
from quire.train.together import pieces_together
from tests.parity.conftest import dense_pair_of, folder_of  # noqa: F401 - fixtures
from tests.train.making import examples, load, pairs, train

ONE = TrainingConfig(
    r=4, lora_alpha=8, max_steps=1, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant",
    weight_decay=0.1, max_grad_norm=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalLM:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def slots(model: CausalLM) -> Slots:
    return Slots(model)


def begun(run: TrainingRun, seed: int = 5) -> TrainingRun:
    """A run whose B is not zero, so that all gradients are there."""
    with torch.no_grad():
        run.flat.values.add_(torch.randn(len(run.flat), generator=torch.Generator().manual_seed(seed)) * 0.05)
    return run


def gradients_of(run: TrainingRun) -> Tensor:
    """The gradient of its first step, before the optimizer takes it."""
    work = run.work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.flat, "update", lambda *_: 0.0)
        for wanted in work:
            if not isinstance(wanted, Share) or wanted.weigh is None:
                break
            for _ in learn(run.model, [wanted]):
                pass
    run.step = 0
    return run.flat.gradient.clone()


def in_peft(folder: Path, run: TrainingRun, where: Path) -> peft.PeftModel:
    write_adapter(where, run.adapter())
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, where, is_trainable=True)


def peft_loss(model: peft.PeftModel, rows: list[Example]) -> Tensor:
    """Mean over all supervised tokens, row by row."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row.tokens])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens[1:]), reduction="none")
        losses.append(each[torch.tensor(row.weights[1:]) > 0])
    return torch.cat(losses).mean()


def in_our_order(run: TrainingRun, named: dict[str, Tensor]) -> Tensor:
    """PEFT's tensors as our buffer has them."""
    parts = []
    for name in run.flat.tensors:
        module, side = name.split("|")
        tensor = named[f"base_model.model.{module}.lora_{side.upper()}.default.weight"]
        parts.append((tensor if side == "a" else tensor.t()).flatten())
    return torch.cat(parts)


def test_one_step_is_that_of_peft_with_torchs_adamw(tiny_llama: Path, model: CausalLM, slots: Slots, tmp_path: Path) -> None:
    rows = examples()
    run = begun(TrainingRun(model, slots, ONE, rows))
    other = in_peft(tiny_llama, run, tmp_path / "adapter")
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=ONE.learning_rate, weight_decay=ONE.weight_decay)
    loss = peft_loss(other, rows)
    loss.backward()
    wanted = in_our_order(run, {name: p.grad for name, p in trained.items()})
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), ONE.max_grad_norm)
    optimizer.step()
    (report,) = train(run)
    assert report.loss == pytest.approx(loss.item(), abs=1e-5)
    assert report.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    assert norm > ONE.max_grad_norm
    factor = ONE.max_grad_norm / (float(norm) + 1e-6)
    torch.testing.assert_close(run.flat.gradient, wanted * factor, atol=1e-6, rtol=1e-4)
    # AdamW's first step divides a gradient by its size: of one near its epsilon it shows the last bits.
    theirs, clear = in_our_order(run, trained).detach(), (wanted * factor).abs() > 1e-6
    assert clear.float().mean() > 0.98
    torch.testing.assert_close(run.flat.values[clear], theirs[clear], atol=1e-5, rtol=0)
    torch.testing.assert_close(run.flat.values, theirs, atol=3e-5, rtol=0)
    run.close()


@pytest.mark.parametrize("bound", [1, 45, 90])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(model: CausalLM, slots: Slots, bound: int) -> None:
    rows = examples()
    whole = begun(TrainingRun(model, slots, ONE, rows))
    cut = begun(TrainingRun(model, slots, TrainingConfig(**{**ONE.as_dict(), "micro_batch_tokens": bound}), rows))
    factors = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = begun(TrainingRun(model, slots, TrainingConfig(**{**ONE.as_dict(), **factors}), rows))
    expected = gradients_of(whole)
    assert expected.norm() > 0.1
    for run in (cut, accumulated):
        torch.testing.assert_close(gradients_of(run), expected, atol=1e-6, rtol=1e-4)
    for run in (whole, cut, accumulated):
        run.close()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_bits(model: CausalLM, slots: Slots, dropout: float) -> None:
    results = []
    for kind in ("on", "off"):
        config = TrainingConfig(r=4, lora_dropout=dropout, max_steps=4, learning_rate=1e-2, gradient_checkpointing=kind)
        run = TrainingRun(model, slots, config, examples())
        train(run)
        results.append(run.adapter().digest)
        run.close()
    assert results[0] == results[1]


def test_dropout_drops_while_training_and_not_while_evaluating(model: CausalLM, slots: Slots) -> None:
    rows = examples()
    dry = begun(TrainingRun(model, slots, ONE, rows, rows))
    wet = begun(TrainingRun(model, slots, TrainingConfig(**{**ONE.as_dict(), "lora_dropout": 0.5}), rows, rows))
    before = [run.score(rows) for run in (dry, wet)]
    assert before[0] == before[1]
    assert not torch.equal(gradients_of(dry), gradients_of(wet))
    dry.close(), wet.close()


def test_runs_together_learn_what_they_learn_alone(model: CausalLM, slots: Slots) -> None:
    rows = examples()
    wishes = [
        (TrainingConfig(r=4, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2, lora_dropout=0.1), rows),
        (TrainingConfig(r=2, max_steps=4, target_modules=("q_proj", "v_proj"), seed=3), rows[3:]),
        (TrainingConfig(r=8, max_steps=5, lora={"layers_to_transform": [2]}, per_device_train_batch_size=1), rows[:4]),
        (TrainingConfig(r=4, max_steps=3, method="dpo", learning_rate=1e-2), pairs()),
    ]
    alone = []
    for config, data in wishes:
        run = TrainingRun(model, slots, config, data, data[:2])
        alone.append([report.loss for report in train(run)])
        alone[-1].append(run.adapter().digest)
        run.close()
    runs = [TrainingRun(model, slots, config, data, data[:2]) for config, data in wishes]
    losses: dict[TrainingRun, list[float]] = {run: [] for run in runs}
    for report in pieces_together(runs):
        if report is not None:
            losses[report.run].append(report.loss)
    together = [[*losses[run], run.adapter().digest] for run in runs]
    for run in runs:
        run.close()
    for mine, theirs in zip(together, alone, strict=True):
        assert mine[:-1] == pytest.approx(theirs[:-1], rel=1e-6)
        assert mine[-1] == theirs[-1]


def test_a_run_that_joins_and_one_that_leaves(model: CausalLM, slots: Slots) -> None:
    config = TrainingConfig(r=2, max_steps=6, per_device_train_batch_size=2)
    alone = TrainingRun(model, slots, config, examples())
    train(alone)
    first, second = (TrainingRun(model, slots, config, examples()) for _ in range(2))
    runs = [first]
    for report in pieces_together(runs):
        if report is not None and report.step == 2 and report.run is first:
            runs.append(second)
        if report is not None and report.step == 4 and report.run is first:
            runs.remove(first)
    assert second.finished
    assert second.adapter().digest == alone.adapter().digest
    assert first.step == 4
    train(first)
    assert first.adapter().digest == alone.adapter().digest
    for run in (alone, first, second):
        run.close()


FAMILIES = ("gpt2", "opt-350m", "gemma2", "mixtral", "qwen3_moe-mixed", "phi3")


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_is_the_whole_graph_for_every_family(dense_pair_of, name: str) -> None:  # noqa: F811
    check_layer_by_layer(dense_pair_of(name)[1], {})


SHARED = {
    "qwen3_moe": {"target_modules": ("q_proj",), "lora": {"target_parameters": ["gate_up_proj", "down_proj"]}},
    "qwen2": {"target_modules": ("q_proj", "embed_tokens"), "lora": {"ensure_weight_tying": True}},
}
NORMS = {
    "gpt2": {"target_modules": ("c_attn",), "bias": "all"},
    "opt-350m": {"target_modules": ("q_proj",), "bias": "all", "modules_to_save": ("layer_norm",)},
    "gemma2": {"target_modules": ("q_proj",), "modules_to_save": ("norm", "layernorm")},
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_learn_layer_by_layer_as_in_the_whole_graph(dense_pair_of, name: str) -> None:  # noqa: F811
    check_layer_by_layer(dense_pair_of(name)[1], NORMS[name])


@pytest.mark.parametrize("name", SHARED)
def test_a_tensor_that_works_in_two_places_gets_the_sum_of_their_gradients(dense_pair_of, name: str) -> None:  # noqa: F811
    check_layer_by_layer(dense_pair_of(name)[1], SHARED[name])


def check_layer_by_layer(model: CausalLM, options: dict[str, object]) -> None:
    rows = examples((9, 13, 11), vocabulary=97)
    config = TrainingConfig(**{**ONE.as_dict(), "max_grad_norm": 0, **options})
    run = begun(TrainingRun(model, Slots(model), config, rows))
    found = gradients_of(run)
    batch = packed([row.tokens for row in rows])
    batch = replace(batch, adapters=torch.full((len(batch.tokens),), run.slot, dtype=torch.int32))
    logits = model.logits(model(batch), batch.adapters)
    counted = torch.tensor([w > 0 for row in rows for w in (*row.weights[1:], 0.0)])
    targets = batch.tokens.roll(-1)
    loss = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    wanted = torch.autograd.grad(loss, list(run.flat.tensors.values()), allow_unused=True)
    pairs_of = zip(run.flat.tensors.values(), wanted, strict=True)
    flat = torch.cat([(torch.zeros_like(tensor) if own is None else own).flatten() for tensor, own in pairs_of])
    assert flat.norm() > 1e-3
    # The factors of rows are rounded apart from their gradients.
    torch.testing.assert_close(found, flat, atol=1e-6, rtol=1e-4)
    run.close()


EXTRAS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding and head": {"target_modules": ("q_proj", "embed_tokens", "lm_head")},
    "head alone": {"target_modules": ("lm_head",)},
    "saved head": {"target_modules": ("v_proj",), "modules_to_save": ("lm_head",)},
    "saved norms": {"target_modules": ("v_proj",), "modules_to_save": ("norm", "input_layernorm")},
    "lora_bias": {"lora": {"lora_bias": True}},
    "tokens": {"target_modules": ("o_proj",), "lora": {"trainable_token_indices": [3, 7]}},
    "top layer": {"lora": {"layers_to_transform": [2]}},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_every_trainable_part_learns(model: CausalLM, slots: Slots, extra: dict[str, object]) -> None:
    """Gradients by finite differences along the gradient itself, and a falling loss."""
    config = TrainingConfig(**{**ONE.as_dict(), "max_steps": 8, "learning_rate": 1e-2, **extra})
    rows = examples((12, 15))
    if extra.get("lora", {}).get("trainable_token_indices"):
        rows = [Example((3, 7, *row.tokens[2:]), row.weights, row.line, row.prompt) for row in rows]
    run = begun(TrainingRun(model, slots, config, rows, rows))
    gradient = gradients_of(run)
    direction = gradient / gradient.norm()

    def loss() -> float:
        return -sum(sum(scores) for scores in run.score(rows)) / sum(row.supervised for row in rows)

    size = 0.05 / float(gradient.norm())
    with torch.no_grad():
        run.flat.values.add_(direction * size)
        above = loss()
        run.flat.values.sub_(direction * 2 * size)
        below = loss()
        run.flat.values.add_(direction * size)
    assert (above - below) / (2 * size) == pytest.approx(float(gradient.norm()), rel=0.03)
    # Each tensor by itself has a share, so that none is forgotten.
    silent = [name for name, part in run.flat.gradients.items() if not gradient_of(run, gradient, name).any()]
    assert not silent or extra.get("lora", {}).get("trainable_token_indices"), silent
    reports = train(run)
    assert reports[-1].loss < reports[0].loss
    run.close()


def gradient_of(run: TrainingRun, gradient: Tensor, name: str) -> Tensor:
    view = run.flat.gradients[name]
    start = (view.data_ptr() - run.flat.gradient.data_ptr()) // 4
    return gradient[start : start + view.numel()]
