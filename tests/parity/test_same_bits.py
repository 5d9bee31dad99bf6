"""One sequence, one answer: packed, paged, in chunks, token by token or in company, every family gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from quire.assemble import assemble
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from tests.parity.families import VARIANTS, Variant
from tests.parity.paged import Cache, chunked_logits, packed_logits

FolderOf = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def tokens_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def model_of(variant: Variant, folder_of: FolderOf, dtype: str) -> CausalLM:
    folder = folder_of(variant.name)[1]
    return assemble(folder, read_model_config(folder), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_variant
def test_packed_equals_paged_equals_decoding(variant: Variant, dtype: str, folder_of: FolderOf) -> None:
    """NaN lies in every slot of the cache that was not written, and blocks are shuffled."""
    model, tokens = model_of(variant, folder_of, dtype), tokens_of(106, seed=1)
    expected = packed_logits(model, [tokens])[0]
    assert expected.isfinite().all()
    for seed, chunks in enumerate(([106], [7, 1, 33, 2, 17, 46], [65, 3], [])):
        assert torch.equal(chunked_logits(model, tokens, chunks, seed), expected), f"chunks {chunks}"


@every_variant
def test_company_changes_nothing(variant: Variant, folder_of: FolderOf) -> None:
    """Four sequences in mixed steps, some decoding while others are in their prompt, against each alone."""
    model = model_of(variant, folder_of, "float32")
    sequences = [tokens_of(length, seed=length) for length in (40, 23, 31, 12)]
    alone = [packed_logits(model, [tokens])[0] for tokens in sequences]
    together = packed_logits(model, sequences)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))

    cache, generator, got = Cache(model, 4, 40, seed=2), torch.Generator().manual_seed(3), [[], [], [], []]
    while any(cache.computed[n] < len(tokens) for n, tokens in enumerate(sequences)):
        chunks = {}
        for number in torch.randperm(4, generator=generator).tolist():
            left = sequences[number][cache.computed[number] :]
            size = int(torch.randint(0, 14, (), generator=generator)) // 2
            if left[:size]:
                chunks[number] = left[:size]
        if not chunks:
            continue
        with torch.no_grad():
            logits = model.logits(model(cache.batch(chunks))).split([len(chunk) for chunk in chunks.values()])
        for number, part in zip(chunks, logits, strict=True):
            got[number].append(part)
    for parts, expected in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_only_the_rows_that_are_asked_for(folder_of: FolderOf) -> None:
    """`logit_rows` picks rows of the same bits."""
    import dataclasses

    from quire.batch import packed

    model = model_of(VARIANTS[0], folder_of, "float32")
    batch = packed([tokens_of(20, seed=1), tokens_of(9, seed=2)])
    rows = torch.tensor([28, 3, 19])
    with torch.no_grad():
        every = model.logits(model(batch))
        some = model.logits(model(dataclasses.replace(batch, logit_rows=rows)))
    assert torch.equal(some, every[rows])
