"""Merged folders against the real PEFT and transformers; what rounding costs; what is refused; whole or not there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import quire
from quire.assemble import assemble
from quire.batch import packed
from quire.cli.main import run
from quire.errors import AdapterError, ConfigError
from quire.lora.adapter import read_adapter, write_adapter
from quire.lora.base import base_digest
from quire.lora.config import LoraConfig
from quire.lora.merge import PIECE
from quire.lora.new import new_adapter
from quire.lora.parts import Adapter
from quire.lora.slots import Slots
from quire.merging import merge
from quire.models.config import read_model_config
from quire.text.chat import render
from quire.text.tokenizer import Tokenizer
from tests.conftest import write_model
from tests.lora.cases import BY_NAME, CASES, SEQUENCES, Case, made_by_peft, their_logits
from tests.lora.conftest import Base

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = {"rtol": 1e-4, "atol": 1e-4}
# PEFT adds to a tensor that table and head share, so that its merged model is not what its adapter computes.
SHARED = ("embedding-tied", "embedding-tied-both", "embedding-gemma", "head-tied", "saved-tied", "saved-tied-head")


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return their_logits(model.eval())


def by_quire(folder: Path, dtype: str = "float32") -> Tensor:
    model = assemble(folder, read_model_config(folder), dtype)
    with torch.no_grad():
        return model.logits(model(packed(SEQUENCES)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_is_what_peft_merges(case: Case, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    folder, _ = base_of(case.base)
    theirs = made_by_peft(case, folder)
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = their_logits(theirs)
        merged = expected if case.name in SHARED else their_logits(theirs.merge_and_unload())
    report = merge(folder, tmp_path / "adapter", tmp_path / "out", held_out=0)
    assert report.untied == (case.name in SHARED)
    found = by_transformers(tmp_path / "out")
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(found, merged, **NEAR)
    torch.testing.assert_close(by_quire(tmp_path / "out"), expected, **NEAR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def trained(folder: Path, scale: float, seed: int = 0, **options: object) -> Adapter:
    """An adapter of Quire's for the folder, as training might leave it: B's numbers are of size `scale`."""
    model = assemble(folder, read_model_config(folder), "float32", keep_dense=True)
    adapter = new_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in adapter.parts.values():
            part.b.normal_(std=scale)
    return adapter.frozen()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A tiny Llama in bfloat16."""
    return write_model(tmp_path / "half", torch_dtype="bfloat16", tie_word_embeddings=True)


def in_half(folder: Path) -> Path:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_rounding_is_to_nearest_and_reported(half: Path, tmp_path: Path) -> None:
    base = load_file(in_half(half) / "model.safetensors")
    adapter = trained(half, 0.001)
    report = quire.merge(half, adapter, tmp_path / "out", held_out=0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == merged.keys()
    wanted = missed = 0.0
    for name, tensor in merged.items():
        part = adapter.parts.get(name.removesuffix(".weight"))
        update = 0 if part is None else part.scale * (part.b.t() @ part.a)
        exact = base[name].float() + update
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact.bfloat16()), name
        if part is not None:
            wanted += float(update.square().sum())
            missed += float((exact - tensor.float()).square().sum())
    assert report.lost == pytest.approx((missed / wanted) ** 0.5, rel=1e-3)
    assert 0.3 < report.lost < 1
    large = quire.merge(half, trained(half, 0.3), tmp_path / "large", held_out=0)
    assert large.lost < 0.1


def test_float32_weights_on_a_bfloat16_base_lose_nothing(half: Path, tmp_path: Path) -> None:
    adapter = trained(in_half(half), 0.05)
    kept = merge(half, adapter, tmp_path / "kept", held_out=2, length=32)
    wide = merge(half, adapter, tmp_path / "wide", dtype="float32", held_out=2, length=32)
    assert wide.lost == 0
    assert wide.drift.largest < 1e-4 < kept.drift.mean
    assert kept.drift.mean < kept.drift.update
    assert kept.drift.tokens == 62
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}


def test_drift_is_the_difference_of_log_probabilities(tmp_path: Path) -> None:
    folder = in_half(write_model(tmp_path / "base", torch_dtype="bfloat16"))
    data = tmp_path / "texts.txt"
    data.write_text("the quick brown fox jumps over the lazy dog " * 20)
    adapter = trained(folder, 0.1)
    report = merge(folder, adapter, tmp_path / "out", data=data, held_out=3, length=24)
    # The same by other means: PEFT's unmerged forward and transformers' merged one, both in bfloat16, are as far apart.
    write_adapter(tmp_path / "adapter", adapter)
    tokens = Tokenizer.from_folder(folder).encode(data.read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    both = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    rows = torch.tensor([tokens[:24], tokens[24:48], tokens[48:72]])
    with torch.no_grad():
        logs = [model(rows).logits[:, :-1].float().log_softmax(-1).gather(2, rows[:, 1:, None]) for model in (both, merged)]
    distance = (logs[0] - logs[1]).abs()
    assert report.drift.tokens == distance.numel()
    assert report.drift.mean == pytest.approx(float(distance.mean()), rel=0.6)


def test_shards_hold_every_tensor_once_and_load_anywhere(tmp_path: Path, base_of: Callable[[str], Base]) -> None:
    folder, model = base_of("qwen3")
    made_by_peft(BY_NAME["saved-both"], folder).save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", model)
    merge(folder, adapter, tmp_path / "one", held_out=0)
    merge(folder, adapter, tmp_path / "many", held_out=0, shard_bytes=60_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 70_000 for path in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                assert index["weight_map"][name] == path.name
                assert torch.equal(file.get_tensor(name), whole[name])
    assert torch.equal(by_transformers(tmp_path / "many"), by_transformers(tmp_path / "one"))


def test_large_tensors_are_merged_in_pieces(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", vocab_size=2 * PIECE + 7, tie_word_embeddings=True)
    options = {"target_modules": ("embed_tokens", "q_proj")}
    adapter = trained(folder, 0.1, **options)
    report = merge(folder, adapter, tmp_path / "out", held_out=0)
    assert report.untied
    base, merged = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    part = adapter.parts["model.embed_tokens"]
    expected = base["model.embed_tokens.weight"] + part.scale * (part.a.t() @ part.b)
    torch.testing.assert_close(merged["model.embed_tokens.weight"], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], base["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_long_biases_are_merged_in_pieces(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", intermediate_size=PIECE + 64, mlp_bias=True)
    adapter = new_adapter(
        assemble(folder, read_model_config(folder), "float32", keep_dense=True),
        LoraConfig(r=2, target_modules=("up_proj",), bias="all"),
        0,
    ).frozen()
    part = adapter.parts["model.layers.0.mlp.up_proj"]
    part.bias.copy_(torch.arange(len(part.bias)))
    merge(folder, adapter, tmp_path / "out", held_out=0)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["model.layers.0.mlp.up_proj.bias"], part.bias)


def test_bin_files_become_safetensors(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    adapter = trained(folder, 0.1)
    merge(folder, adapter, tmp_path / "expected", held_out=0)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    merge(folder, adapter, tmp_path / "out", held_out=0)
    assert not list((tmp_path / "out").glob("*.bin"))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_folder_has_tokenizer_defaults_and_the_adapters_template(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    (folder / "README.md").write_text("The base's card.")
    adapter = trained(folder, 0.1)
    own = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    with_template = Adapter(adapter.config, adapter.parts, None, own, {"eos_token": "<s>"})
    merge(folder, adapter, tmp_path / "plain", held_out=0)
    merge(folder, with_template, tmp_path / "own", held_out=0)
    for name in ("plain", "own"):
        out = tmp_path / name
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert (out / "generation_config.json").read_text() == '{"temperature": 0.3}'
        assert "base's card" not in (out / "README.md").read_text()
        assert oct(out.stat().st_mode & 0o777) == "0o755"
    messages = [{"role": "user", "content": "fox"}]
    read = {name: transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("plain", "own")}
    assert read["own"].apply_chat_template(messages, tokenize=False) == "[fox]"
    assert read["own"].eos_token == "<s>"
    assert read["plain"].apply_chat_template(messages, tokenize=False) == "<|user|>fox</s>"
    assert render(Tokenizer.from_folder(tmp_path / "own"), messages) == "[fox]"


def test_quire_serves_what_it_merged(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base")
    adapter = trained(folder, 0.3)
    merge(folder, adapter, tmp_path / "out", held_out=0)
    greedy = quire.SamplingParams(max_tokens=12, temperature=0)
    prompt = {"prompt_token_ids": [5, 77, 120, 9]}
    expected = by_hand(folder, adapter, prompt["prompt_token_ids"], 12)
    with_out = quire.LLM(model=str(tmp_path / "out"), dtype="float32").generate([prompt], greedy)
    assert list(with_out[0].outputs[0].token_ids) == expected


def by_hand(folder: Path, adapter: Adapter, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens of the adapter beside its base, each by a whole pass; up to the end-of-sequence token."""
    model = assemble(folder, read_model_config(folder), "float32")
    slots = Slots(model)
    slots.place(slots.take(), adapter)
    known = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            batch = packed([known])
            rows = torch.zeros(len(known), dtype=torch.int32)
            known.append(int(model.logits(model(replace(batch, adapters=rows))[-1:], rows[-1:]).argmax()))
            if known[-1] == 1:
                break
    return known[len(tokens) :]


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, base_of: Callable[[str], Base]) -> None:
    folder, _ = base_of("qwen3")
    made_by_peft(BY_NAME["plain"], folder).save_pretrained(tmp_path / "adapter")
    made_by_peft(Case("", "qwen3", {"target_modules": ["q_proj"], "lora_bias": True}), folder).save_pretrained(
        tmp_path / "bias"
    )
    with pytest.raises(AdapterError, match=r"q_proj\.bias cannot be merged"):
        merge(folder, tmp_path / "bias", tmp_path / "out", held_out=0)
    with pytest.raises(ConfigError, match="dtype must be one of"):
        merge(folder, tmp_path / "adapter", tmp_path / "out", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="output must be a new or an empty folder"):
        merge(folder, tmp_path / "adapter", tmp_path / "full", held_out=0)
    huge = trained(write_model(tmp_path / "base"), 1e5)
    with pytest.raises(AdapterError, match=r"out of the range of torch.float16 when merged: choose --dtype bfloat16"):
        merge(tmp_path / "base", huge, tmp_path / "out", dtype="float16", held_out=0)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


MERGE = """
import resource, sys
from quire.merging import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(sys.argv[1], sys.argv[2], sys.argv[3], held_out=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def wide(tmp_path: Path) -> tuple[Path, Path]:
    """A base of 84 MB in 11 tensors, the largest of 8 MB, and an adapter for it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}
    folder = write_model(tmp_path / "base", vocab_size=320, num_key_value_heads=8, **sizes)
    write_adapter(tmp_path / "adapter", trained(folder, 0.1))
    return folder, tmp_path / "adapter"


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    folder, adapter = wide(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(folder), str(adapter), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (folder / "model.safetensors").stat().st_size > 80e6
    assert int(done.stdout) * 1024 < 45e6, done.stdout


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    folder, adapter = wide(tmp_path)
    words = [sys.executable, "-m", "quire.cli", "merge", str(folder), str(adapter), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".out.*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_command_says_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = in_half(write_model(tmp_path / "base", torch_dtype="bfloat16"))
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, trained(folder, 0.1, seed))
    given = ["merge", str(folder), str(tmp_path / "a"), str(tmp_path / "b")]
    options = ["--held-out", "2", "--length", "32", "--json"]
    assert run([*given, "--weights", "0.7,-0.3", "--output", str(tmp_path / "out"), *options]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["rank"] == 8
    assert facts["drift"]["tokens"] == 62
    assert re.search(r"Rounding to the weights' type took [\d.]+% of the update, most in model\.layers", captured.err)
    assert re.search(r"Drift: log-probabilities of adapter and merged model differ by", captured.err)
    dare = ["--combination", "dare", "--density", "0.5", "--seed", "3", "--adapter-only"]
    assert run([*given, *dare, "--output", str(tmp_path / "only")]) == 0
    assert json.loads((tmp_path / "only" / "adapter_config.json").read_text())["r"] == 4
    capsys.readouterr()
    for wrong, code, message in (
        (["--weights", "0.7,x"], 3, "--weights must be numbers with commas"),
        (["--weights", "0.7"], 3, "one finite number for each of 2 adapters"),
        (["--combination", "tie", "--density", "1"], 3, 'Did you mean "ties"?'),
        (["--held-out", "-1"], 3, "--held-out must be at least 0"),
        (["--data", str(tmp_path / "none.txt")], 3, "none.txt"),
    ):
        assert run([*given, *wrong, "--output", str(tmp_path / "no")]) == code, wrong
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_another_base_is_warned_about(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "first", 1), write_model(tmp_path / "second", 2)
    adapter = replace(trained(first, 0.1), base_digest=base_digest(first))
    said: list[str] = []
    merge(first, adapter, tmp_path / "right", held_out=0, say=said.append)
    assert not said
    merge(second, adapter, tmp_path / "wrong", held_out=0, say=said.append)
    assert "was trained on a base with other weights" in said[0]
