"""Adapters of an image-and-text model, of which Quire has the text part: PEFT's paths are longer there than the tree's."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

from quire.assemble import assemble
from quire.lora.adapter import read_adapter, write_adapter
from quire.lora.config import LoraConfig
from quire.lora.new import new_adapter
from quire.models.config import read_model_config
from tests.lora.cases import our_logits, their_logits
from tests.parity.families import GEMMA, SIZES, randomise, save

pytestmark = pytest.mark.filterwarnings("ignore")
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Gemma3Config(text_config={**SIZES, **GEMMA}, vision_config=VISION, mm_tokens_per_image=1)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    randomise(model)
    return save(model, tmp_path_factory.mktemp("multimodal"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ".*vision.*"},
        {"target_modules": r"model\.language_model\..*\.(v|o)_proj"},
        {
            "target_modules": [f"model.language_model.layers.{layer}.mlp.up_proj" for layer in (0, 2)],
            "rank_pattern": {r"language_model\.layers\.2\..*": 3},
        },
    ],
)
@torch.no_grad()
def test_peft_and_quire_read_each_others_folders(base: Path, options: dict[str, object], tmp_path: Path) -> None:
    model = assemble(base, read_model_config(base), "float32")
    theirs = peft.get_peft_model(load(base), peft.LoraConfig(r=4, **options)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", model)
    torch.testing.assert_close(our_logits(model, adapter), their_logits(theirs), **NEAR)
    write_adapter(tmp_path / "ours", adapter)
    assert read_adapter(tmp_path / "ours", model).digest == adapter.digest
    back = peft.PeftModel.from_pretrained(load(base), tmp_path / "ours").eval()
    torch.testing.assert_close(their_logits(back), our_logits(model, adapter), **NEAR)


@torch.no_grad()
def test_a_new_one_is_read_by_peft(base: Path, tmp_path: Path) -> None:
    model = assemble(base, read_model_config(base), "float32")
    adapter = new_adapter(model, LoraConfig(), 0)
    for tensor in adapter.tensors().values():
        tensor.add_(torch.randn(tensor.shape) * 0.1)
    write_adapter(tmp_path / "new", adapter)
    back = peft.PeftModel.from_pretrained(load(base), tmp_path / "new").eval()
    torch.testing.assert_close(their_logits(back), our_logits(model, adapter), **NEAR)


def load(base: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
