"""Quantizing dense checkpoints at load: what becomes of which module, of every family, in how much memory, with what error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from quire import LLM, SamplingParams
from quire.layers.embedding import Embedding
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.ops.reference.packed import dense_values
from quire.ops.weights import DenseWeight, Fp8Weight, Int4Weight, Int8Weight
from quire.quant.nearest import nearest
from quire.quant.packing import PackedTable, packed_weights
from quire.quant.scheme import AT_LOAD, Form, scheme_of
from quire.weights.files import weight_sizes
from tests.conftest import write_model
from tests.engine.test_same_request_same_bits import facts
from tests.parity.families import BY_NAME, save
from tests.quant.test_checkpoints import distance, load, logits

KINDS = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}
# Of random weights, whose layers make errors larger; two unrelated models are 1.1 apart.
WORST = {"int8": 0.1, "int4": 0.8, "fp8": 0.25}


@pytest.mark.parametrize("form", [Form("int8"), Form("fp8"), Form("int4", 32), Form("int4", 64), Form("int4")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest(form: Form, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    values = (torch.randn(40, 192) * torch.rand(40, 1)).to(dtype)
    values[3] = 0
    values[4] = values[4].abs()
    weight = nearest(values, form)
    error = (dense_values(weight) - values.float()).abs()
    assert not error[3].any()
    if form.kind == "int8":
        assert (error <= weight.scales[:, None] * 0.5001).all()
    elif form.kind == "fp8":  # half a step of three bits of mantissa, or of the smallest numbers there are
        assert (error <= (values.float().abs() / 16).maximum(weight.scales[:, None] * 2**-10) * 1.001).all()
    else:
        grouped = error.view(40, -1, form.group_size or 192)
        # One step at most, where the range ends; and no worse than the plain asymmetric grid on the whole.
        assert (grouped <= weight.scales.abs()[..., None] * 1.001).all()
        assert error.square().mean().sqrt() < 0.16 * values.float().std()
        assert set(weight.zeros.unique().tolist()) - {8}, "no asymmetric group"


def test_rows_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, 64)
    whole = [nearest(values, form) for form in (Form("int8"), Form("int4", 32), Form("fp8"))]
    monkeypatch.setattr("quire.quant.nearest.PIECE", 300)
    for one in whole:
        form = Form("int4", 32) if isinstance(one, Int4Weight) else Form("int8" if isinstance(one, Int8Weight) else "fp8")
        assert torch.equal(dense_values(nearest(values, form)), dense_values(one))


@pytest.mark.parametrize("kind", AT_LOAD)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("reference_ops")
def test_which_modules(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tie_word_embeddings=tied)
    model = load(folder, kind)
    weights = {name: weight for name, weight in packed_weights(model).items() if not isinstance(weight, DenseWeight)}
    layers = {name for name in packed_weights(model) if name != "lm_head"}
    assert {name: type(weights[name]) for name in layers} == dict.fromkeys(layers, KINDS[kind])
    assert len(layers) == 3 * 7
    assert ("lm_head" in weights) == (kind != "fp8")
    if kind != "fp8":
        assert isinstance(weights["lm_head"], Int8Weight)
    table = model.table
    assert isinstance(table, Embedding)
    assert isinstance(table.format, PackedTable) == (tied and kind != "fp8")
    assert not [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]
    assert distance(logits(model), logits(load(folder))) < WORST[kind]


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt-350m", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe-mixed", "qwen2"])
@pytest.mark.usefixtures("reference_ops")
def test_every_family(name: str, tmp_path: Path) -> None:
    """Widths of 64, so that int4 has groups; routers stay dense."""
    variant = BY_NAME[name]
    wider = {"n_embd": 64} if name == "gpt2" else {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    if name.startswith("opt"):
        wider = {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64 if name == "opt" else 32}
    config = variant.config()
    for key, value in wider.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = save(reference, tmp_path)
    dense = load(folder)
    # Which experts are chosen may change with a rounded input, so a mixture is only held to be sane.
    slack = 4 if "moe" in name or name == "mixtral" else 1.5
    with torch.inference_mode():
        expected = dense.logits(dense(batch_of(dense)))
        for kind in AT_LOAD:
            model = load(folder, kind)
            got = model.logits(model(batch_of(dense)))
            assert distance(got, expected) < WORST[kind] * slack
            forms = {key: type(weight) for key, weight in packed_weights(model).items()}
            assert KINDS[kind] in forms.values()
            assert all(form is DenseWeight for key, form in forms.items() if key.endswith((".gate", "project_in")))


def batch_of(model: CausalLM) -> object:
    from quire.batch import packed

    del model
    return packed([[5, 9, 80, 31, 7, 50, 18, 44]])


@pytest.mark.parametrize("kind", AT_LOAD)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("reference_ops")
def test_plans_count_what_is_resident(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tie_word_embeddings=tied)
    config = read_model_config(folder)
    planned = weight_sizes(folder, config).of(scheme_of(config.raw, kind)).bytes_as(4)
    assert planned == resident(load(folder, kind))


def resident(model: CausalLM) -> int:
    """Bytes of all tensors that a model holds, each once."""
    weights = list(packed_weights(model).values())
    tensors = [tensor for weight in weights for tensor in vars(weight).values() if isinstance(tensor, torch.Tensor)]
    tensors += list(model.parameters())
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


PEAK = """
import sys, threading, time
from pathlib import Path
from quire.assemble import assemble
from quire.models.config import read_model_config
def resident(kind):
    return int(next(l for l in open("/proc/self/status") if l.startswith(kind)).split()[1]) << 10
folder = Path(sys.argv[1])
assemble(Path(sys.argv[2]), read_model_config(Path(sys.argv[2])), "bfloat16", sys.argv[3])  # code and its memory
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = assemble(folder, read_model_config(folder), "bfloat16", sys.argv[3])
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_peak_memory_is_little_more_than_the_weights(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}
    folder = write_model(tmp_path / "model", **sizes, torch_dtype="float32")
    planned = weight_sizes(folder, read_model_config(folder)).at_load[kind].bytes_as(2)
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tiny_llama), kind], check=True, capture_output=True, text=True
    )
    peak, after = map(int, ran.stdout.split())
    # One tensor of 8 MiB, what the allocator keeps and pages that the system maps beside what is read come on top, 4 to 32 MiB;
    # the stored float32 weights would be 150. What large models take is measured in tests/weights/test_memory.py.
    assert after < planned + (16 << 20)
    assert peak < planned * 1.1 + (40 << 20)


@pytest.mark.parametrize("kind", AT_LOAD)
def test_generates_the_same_bits_alone_and_in_a_crowd(kind: str, tiny_llama: Path) -> None:
    crowd = LLM(str(tiny_llama), quantization=kind, dtype="bfloat16", max_num_batched_tokens=48, max_num_seqs=12)
    solo = LLM(str(tiny_llama), quantization=kind, dtype="bfloat16", enable_prefix_caching=False)
    prompts = [[(7 * n + 3 * k) % 318 + 2 for k in range(1 + 5 * n % 37)] for n in range(14)]
    params = [SamplingParams(temperature=0.8, seed=n, max_tokens=4 + n % 5, logprobs=2) for n in range(14)]
    together = crowd.generate(prompts, params, use_tqdm=False)
    for prompt, own, output in zip(prompts, params, together, strict=True):
        (alone,) = solo.generate([prompt], own, use_tqdm=False)
        assert [facts(sample) for sample in output.outputs] == [facts(sample) for sample in alone.outputs]
