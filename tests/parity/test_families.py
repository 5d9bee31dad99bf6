"""Every family against transformers, through the files that transformers writes: logits, greedy tokens, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from quire.batch import packed
from quire.models.decoder import CausalLM
from quire.models.registry import build_model
from tests.parity.conftest import Pair
from tests.parity.families import VARIANTS, Variant
from tests.parity.paged import greedy, packed_logits

PairOf = Callable[[str], Pair]
TOLERANCE = 5e-5
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def stepwise_reference_logits(model: transformers.PreTrainedModel, tokens: list[int], first: int) -> Tensor:
    """transformers with its cache: `first` tokens at once, the others one by one."""
    out, cache = [], transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in [tokens[:first], *([token] for token in tokens[first:])]:
            out.append(model(torch.tensor([chunk]), past_key_values=cache).logits[0])
    return torch.cat(out)


@every_variant
def test_logits(variant: Variant, pair_of: PairOf) -> None:
    """Two sequences at once, past every window and every original length but the trained one."""
    reference, model = pair_of(variant.name)
    sequences = [tokens_of(variant.trained or 120, seed=1), tokens_of(37, seed=2)]
    for got, tokens in zip(packed_logits(model, sequences), sequences, strict=True):
        expected = reference_logits(reference, tokens)
        assert expected.abs().max() > 2, "logits so small that mistakes would not show"
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name == "phi3-longrope"], ids=lambda variant: variant.name)
def test_logits_of_long_sequences(variant: Variant, dense_pair_of: PairOf) -> None:
    """A model that serves long sequences rotates all of them as transformers rotates a long one."""
    reference, model = dense_pair_of(variant.name)
    tokens = tokens_of(variant.trained + 30, seed=3)
    long = build_model(model.config.for_length(len(tokens)))
    long.load_state_dict(model.state_dict())
    torch.testing.assert_close(packed_logits(long, [tokens])[0], reference_logits(reference, tokens), atol=TOLERANCE, rtol=0)
    short = build_model(model.config.for_length(variant.trained))
    short.load_state_dict(model.state_dict())
    start = tokens[: variant.trained]
    torch.testing.assert_close(packed_logits(short, [start])[0], reference_logits(reference, start), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name == "llama-dynamic"], ids=lambda variant: variant.name)
def test_logits_past_the_trained_length(variant: Variant, pair_of: PairOf) -> None:
    """There Quire gives, for prompts too, what transformers gives step by step: a row depends on its past only.

    (A whole prompt that passes the trained length is rotated anew by transformers, and its first rows then see what
    comes after them. Quire does not follow: chunks, prefix cache and decoding could not agree with it.)
    """
    reference, model = pair_of(variant.name)
    tokens = tokens_of(variant.trained + 30, seed=3)
    expected = stepwise_reference_logits(reference, tokens, variant.trained)
    got = packed_logits(model, [tokens])[0]
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    whole = reference_logits(reference, tokens)
    assert (whole[: variant.trained] - expected[: variant.trained]).abs().max() > 0.01, "the deviation is gone"


@every_variant
def test_greedy_tokens(variant: Variant, pair_of: PairOf) -> None:
    reference, model = pair_of(variant.name)
    prompt = tokens_of(min(19, (variant.trained or 999) - 64), seed=4)
    expected = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, min_new_tokens=64,
        max_new_tokens=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert greedy(model, prompt, 64) == expected[0, len(prompt) :].tolist()


def loss_of(logits: Tensor, tokens: list[int]) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(tokens[1:]), reduction="sum")


def gradients_of(model: CausalLM, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Of the packed forward pass, by parameter name."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    batch = packed(sequences)
    logits = model.logits(model(batch)).split([len(tokens) for tokens in sequences])
    loss = sum(loss_of(part, tokens) for part, tokens in zip(logits, sequences, strict=True))
    try:
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


@every_variant
def test_gradients(variant: Variant, dense_pair_of: PairOf) -> None:
    """Training's forward and backward pass: equal to transformers' autograd wherever the parameter has the same name."""
    reference, model = dense_pair_of(variant.name)
    sequences = [tokens_of(50, seed=5), tokens_of(23, seed=6)]
    got = gradients_of(model, sequences)
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in got.values())

    reference.zero_grad()
    for tokens in sequences:
        loss_of(reference(torch.tensor([tokens])).logits[0], tokens).backward()
    compared = 0
    for stored, parameter in reference.named_parameters():
        name = next((name for name in model.checkpoint_names(stored) if name in got), None)
        if name is None:
            continue  # experts, which transformers fuses in memory
        expected = model.convert(name, parameter.grad)
        torch.testing.assert_close(got[name], expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)
        compared += 1
    assert compared >= 10
