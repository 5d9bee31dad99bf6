"""Which modules a configuration means: as PEFT's own matching has it, but for the router and the head."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from quire.errors import AdapterError
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.lora.config import LoraConfig, parse_lora_config
from quire.lora.targets import adaptable, named_one_by_one, saved_modules, target_modules, token_modules
from tests.lora.conftest import Base
from tests.parity.families import BY_NAME, VARIANTS, reference_model

WORDS = [
    "q_proj", "v_proj", "mlp.up_proj", "layers.1.mlp.down_proj", "0.self_attn.k_proj", "proj", "lm_head", "embed_tokens",
    "model.layers.2.self_attn.o_proj", "gate_proj",
]  # fmt: skip
PATTERNS = [
    r".*_proj", r".*\.(q|v)_proj", r"model\.layers\.[02]\..*", r".*layers\.\d\.mlp\.(up|down)_proj", r".*head", r"q_proj",
    ".*embed.*",
]  # fmt: skip
EXCLUDED = ["q_proj", "layers.0.mlp.up_proj", "mlp.down_proj", "self_attn", "model.layers.1.self_attn.v_proj"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, object]:
    raw: dict[str, object] = {}
    if draw(st.booleans()):
        raw["target_modules"] = draw(st.sampled_from(PATTERNS))
    else:
        raw["target_modules"] = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True))
        if draw(st.booleans()):
            raw["layers_to_transform"] = draw(st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=3)))
            raw["layers_pattern"] = draw(st.sampled_from([None, "layers", ["h", "layers"], [r"lay\w+"]]))
            if raw["layers_to_transform"] == []:
                del raw["layers_to_transform"], raw["layers_pattern"]
    raw["exclude_modules"] = draw(
        st.one_of(st.none(), st.sampled_from(PATTERNS), st.lists(st.sampled_from(EXCLUDED), max_size=2))
    )
    raw["modules_to_save"] = draw(st.one_of(st.none(), st.lists(st.sampled_from(["lm_head", "mlp", "k_proj"]), max_size=2)))
    return raw


@given(raw=configurations())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matching_is_pefts(raw: dict[str, object], base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    theirs = peft.LoraConfig(**raw)
    expected = [name for name in adaptable(model) if check_target_module_exists(theirs, name)]
    entries = raw["target_modules"]
    known = isinstance(entries, str) or all(any(n == e or n.endswith(f".{e}") for n in adaptable(model)) for e in entries)
    if not expected or not known:
        with pytest.raises(AdapterError, match="target_modules"):
            target_modules(parse_lora_config(raw), model)
    else:
        assert target_modules(parse_lora_config(raw), model) == expected


@given(key=st.sampled_from([*WORDS, *PATTERNS, "layers", r"layers\.0.*", "q", "_proj"]), name=st.sampled_from(WORDS))
def test_patterns_of_ranks_match_as_pefts_do(key: str, name: str) -> None:
    theirs = {key: 3}.get(get_pattern_key([key], f"model.{name}"), 8)
    assert LoraConfig(rank_pattern={key: 3}).rank_of(f"model.{name}") == theirs


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if variant.family not in ("Mixtral", "Qwen3Moe")])
def test_all_linear_is_what_peft_takes(name: str, base_of: Callable[[str], Base]) -> None:
    _, model = base_of(name)
    theirs = peft.get_peft_model(reference_model(BY_NAME[name]), peft.LoraConfig(target_modules="all-linear"))
    expected = {path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(target_modules(LoraConfig(), model)) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-mixed"])
def test_all_linear_leaves_the_router_and_the_head_alone(name: str, base_of: Callable[[str], Base]) -> None:
    _, model = base_of(name)
    found = target_modules(LoraConfig(), model)
    linears = {path for path, module in model.named_modules() if isinstance(module, Linear)}
    routers = {path for path in linears if path.endswith(("mlp.gate", "moe.gate"))}
    assert routers
    assert set(found) == linears - routers - {"lm_head"}
    listed = named_one_by_one(LoraConfig(), model)
    assert all("." not in entry for entry in listed.target_modules)
    assert target_modules(listed, model) == found
    assert set(target_modules(LoraConfig(target_modules=("gate",)), model)) == routers  # who asks for it gets it


def test_all_linear_in_some_layers_is_listed_with_them(base_of: Callable[[str], Base]) -> None:
    _, model = base_of("qwen3")
    config = LoraConfig(layers_to_transform=(0, 2), exclude_modules=("o_proj",))
    listed = named_one_by_one(config, model)
    assert listed.target_modules == ("down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj")
    assert target_modules(listed, model) == target_modules(config, model)
    assert not any(".1." in name for name in target_modules(listed, model))


@pytest.mark.parametrize(
    "options,field,said",
    [
        ({"target_modules": ("q_prj",)}, "target_modules", 'Did you mean "q_proj"?'),
        ({"target_modules": ("q_proj", "norm")}, "target_modules", "not a linear layer"),
        ({"target_modules": "nothing.*"}, "target_modules", "matches no linear layer"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (9,)}, "target_modules", "matches no linear layer"),
        ({"modules_to_save": ("lm_hed",)}, "modules_to_save", 'Did you mean "lm_head"?'),
        ({"trainable_token_indices": (5, 97)}, "trainable_token_indices", "97 is not below the vocabulary's 97"),
        ({"trainable_token_indices": (5, 5)}, "trainable_token_indices", "twice"),
        ({"trainable_token_indices": {"q_proj": (5,)}}, "trainable_token_indices", "neither"),
        ({"target_parameters": ("nothing.weight",), "target_modules": None}, "target_parameters", "matches no parameter"),
    ],
)
def test_what_is_not_there_is_named(
    options: dict[str, object], field: str, said: str, base_of: Callable[[str], Base]
) -> None:
    _, model = base_of("qwen3")
    config = LoraConfig(**options)
    with pytest.raises(AdapterError) as raised:
        target_modules(config, model), saved_modules(config, model), token_modules(config, model)
    assert raised.value.parameter == field
    assert said in str(raised.value)


def test_module_names_are_those_of_transformers(base_of: Callable[[str], Base]) -> None:
    """Which is what makes PEFT's names and patterns mean the same here."""
    for name in ("qwen3", "gpt2", "opt-350m", "phi3", "gemma3"):
        _, model = base_of(name)
        theirs: transformers.PreTrainedModel = reference_model(BY_NAME[name])
        kinds = ("Linear", "Conv1D", "Embedding", "OPTLearnedPositionalEmbedding", "Gemma3TextScaledWordEmbedding")
        expected = {path for path, module in theirs.named_modules() if type(module).__name__ in kinds}
        assert set(adaptable(model)) == expected
        assert all(isinstance(model.get_submodule(path), (Linear, Embedding)) for path in expected)
