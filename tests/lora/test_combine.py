"""Combinations of adapters against PEFT's add_weighted_adapter: the same tensors; and what no combination has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

from quire.errors import AdapterError, ConfigError
from quire.lora.adapter import read_adapter, write_adapter
from quire.lora.combine import KINDS, Combination, combine
from quire.lora.new import generator
from quire.lora.parts import Adapter
from quire.merging import merge
from quire.models.decoder import CausalLM
from tests.lora.cases import loaded_by_peft, our_logits, their_logits
from tests.lora.conftest import Base

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = [0.7, -0.4, 1.3]
TARGETS = ["q_proj", "down_proj"]


def three(folder: Path, place: Path, ranks: tuple[int, int, int] = (4, 4, 4), **options: object) -> peft.PeftModel:
    """PEFT's model with three adapters, saved at place/a, place/b and place/c."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    configs = [
        peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 6 + rank, "target_modules": TARGETS, **options})
        for rank in ranks
    ]
    both = peft.get_peft_model(model, configs[0], adapter_name="a")
    both.add_adapter("b", configs[1])
    both.add_adapter("c", configs[2])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    both.save_pretrained(place)
    return both.eval()


def ours(place: Path, model: CausalLM) -> list[Adapter]:
    return [read_adapter(place / name, model) for name in "abc"]


def theirs(model: peft.PeftModel, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B [O, R] of an adapter in PEFT's model, by module."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear) and name in module.lora_A:
            found[path] = module.lora_A[name].weight.data, module.lora_B[name].weight.data
        elif isinstance(module, peft.tuners.lora.Embedding) and name in module.lora_embedding_A:
            found[path] = module.lora_embedding_A[name].data, module.lora_embedding_B[name].data
    return found


def options(kind: str) -> dict[str, object]:
    return {} if kind in ("cat", "svd", "linear") else {"density": 0.4}


SIGNED = [(kind, "total") for kind in KINDS if "dare" not in kind] + [("ties", "frequency"), ("ties_svd", "frequency")]


@pytest.mark.parametrize(("kind", "sign"), SIGNED)
def test_the_same_tensors_as_peft(kind: str, sign: str, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of("qwen3")
    reference = three(folder, tmp_path)
    reference.add_weighted_adapter(list("abc"), WEIGHTS, "all", kind, majority_sign_method=sign, **options(kind))
    made = combine(ours(tmp_path, model), WEIGHTS, Combination(kind, sign=sign, **options(kind)))
    compare(made, theirs(reference, "all"), kind)


def compare(made: Adapter, expected: dict[str, tuple[Tensor, Tensor]], kind: str) -> None:
    assert made.parts.keys() == expected.keys()
    for name, part in made.parts.items():
        a, b = expected[name]
        assert part.scale == 1
        assert (part.a.shape, part.b.t().shape) == (a.shape, b.shape)
        if kind.endswith("svd"):
            # Singular vectors have no sign of their own; lengths and product do.
            torch.testing.assert_close(part.b.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(part.a.abs(), a.abs(), rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(part.b.t() @ part.a, b @ a, rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(part.a, a, rtol=0, atol=0)
            torch.testing.assert_close(part.b.t(), b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dare" in kind])
def test_the_same_tensors_as_peft_when_the_same_fall_out(
    kind: str, base_of: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT draws from torch's global generator; here it is handed ours. One module, so that the order is known."""
    folder, model = base_of("qwen3")
    reference = three(folder, tmp_path, target_modules=["layers.1.self_attn.k_proj"])
    made = combine(ours(tmp_path, model), WEIGHTS, Combination(kind, density=0.4, seed=5))
    source, drawn = generator(5, "model.layers.1.self_attn.k_proj"), torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda input: drawn(input, generator=source))
    reference.add_weighted_adapter(list("abc"), WEIGHTS, "all", kind, density=0.4)
    compare(made, theirs(reference, "all"), kind)
    monkeypatch.undo()
    again = combine(ours(tmp_path, model), WEIGHTS, Combination(kind, density=0.4, seed=5))
    other = combine(ours(tmp_path, model), WEIGHTS, Combination(kind, density=0.4, seed=6))
    assert again.digest == made.digest != other.digest


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_ranks_may_differ(kind: str, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of("qwen3")
    reference = three(folder, tmp_path, (2, 5, 3), target_modules=["q_proj", "embed_tokens"])
    reference.add_weighted_adapter(list("abc"), WEIGHTS, "all", kind)
    made = combine(ours(tmp_path, model), WEIGHTS, Combination(kind))
    assert made.rank == {"cat": 10, "svd": 5}[kind]
    compare(made, theirs(reference, "all"), kind)
    reference.add_weighted_adapter(list("abc"), WEIGHTS, "small", "svd", svd_rank=3)
    compare(combine(ours(tmp_path, model), WEIGHTS, Combination("svd", rank=3)), theirs(reference, "small"), "svd")
    with pytest.raises(AdapterError, match=r"ranks \[2, 3, 5\]; linear needs the same"):
        combine(ours(tmp_path, model), WEIGHTS, Combination("linear"))


def test_cat_is_exactly_the_sum_also_where_only_some_have_a_module(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of("qwen3")
    three(folder, tmp_path, use_rslora=True)
    first, second, third = ours(tmp_path, model)
    fewer = {name: part for name, part in second.parts.items() if "layers.0" not in name}
    adapters = [first, Adapter(second.config, fewer), third]
    made = combine(adapters, WEIGHTS)
    for name, part in made.parts.items():
        updates = [
            weight * one.parts[name].scale * (one.parts[name].b.t() @ one.parts[name].a)
            for one, weight in zip(adapters, WEIGHTS, strict=True)
            if name in one.parts
        ]
        torch.testing.assert_close(part.b.t() @ part.a, torch.stack(updates).sum(0), rtol=1e-4, atol=1e-5)
    assert made.parts["model.layers.0.self_attn.q_proj"].rank == 8
    assert made.parts["model.layers.1.self_attn.q_proj"].rank == 12


def test_a_combination_is_an_adapter_for_everyone(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    """Saved, it is read again here and by PEFT, with mixed ranks too; merged, it is what it was beside its base."""
    folder, model = base_of("qwen3")
    three(folder, tmp_path, (2, 5, 3))
    first, second, third = ours(tmp_path, model)
    third = Adapter(third.config, {name: part for name, part in third.parts.items() if "layers.2" in name})
    made = combine([first, second, third], WEIGHTS)
    report = merge(folder, [first, second, third], tmp_path / "only", weights=WEIGHTS, adapter_only=True)
    assert report.digest == made.digest == read_adapter(tmp_path / "only", model).digest
    merge(folder, tmp_path / "only", tmp_path / "merged", held_out=0)
    with torch.no_grad():
        expected = our_logits(model, made)
        torch.testing.assert_close(their_logits(loaded_by_peft(folder, tmp_path / "only")), expected, rtol=1e-4, atol=1e-4)
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(their_logits(whole.eval()), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_weighted_sum_is_refused_or_carried_over(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of("qwen3")
    three(folder, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match=r"_proj has DoRA's magnitudes.*quire merge MODEL ADAPTER"):
        combine(ours(tmp_path / "dora", model)[:2])
    three(folder, tmp_path / "saved", modules_to_save=["lm_head"])
    first, second, third = ours(tmp_path / "saved", model)
    with pytest.raises(AdapterError, match=r"lm_head has values in place of the base's \(weight\)"):
        combine([first, second])
    bare = Adapter(third.config, {name: part for name, part in third.parts.items() if name != "lm_head"})
    with pytest.raises(AdapterError, match="or give that adapter the weight 1"):
        combine([first, bare], [0.5, 1])
    made = combine([first, bare], [1, 0.5])
    assert torch.equal(made.parts["lm_head"].weight, first.parts["lm_head"].weight)
    write_adapter(tmp_path / "out", made)
    assert read_adapter(tmp_path / "out", model).digest == made.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "ties_svdd", "density": 0.5}, "combination is 'ties_svdd'. Did you mean \"ties_svd\"?"),
        ({"kind": "ties"}, "density must be above 0 and at most 1 for ties (0.5, say), got None"),
        ({"kind": "dare", "density": 1.5}, "density must be above 0 and at most 1 for dare_linear (0.5, say), got 1.5"),
        ({"kind": "cat", "density": 0.5}, "density is for the kinds that drop numbers; cat keeps all"),
        ({"kind": "linear", "rank": 4}, "rank must be at least 1 and is for svd and *_svd only, got 4 for linear"),
        ({"kind": "ties", "density": 0.5, "sign": "mean"}, "sign must be total or frequency, got 'mean'"),
    ],
)
def test_wrong_wishes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Combination(**arguments)


def test_there_is_one_weight_for_each_adapter(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, model = base_of("qwen3")
    three(folder, tmp_path)
    with pytest.raises(ConfigError, match="weights must be one finite number for each of 3 adapters"):
        combine(ours(tmp_path, model), [1, 2])
    with pytest.raises(ConfigError, match="adapters must be at least one"):
        combine([])
