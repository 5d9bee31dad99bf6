"""GPTQ and AWQ err less than rounding does; what is written is what was calculated, and loads here and elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from quire.assemble import assemble
from quire.batch import packed
from quire.errors import ConfigError
from quire.models.config import read_model_config
from quire.ops.reference.packed import dense_values
from quire.quant import awq, gptq, save
from quire.quant.calibrate import Inputs, walk
from quire.quant.grid import fitted_grid, output_error, plain_grid
from quire.quant.method import METHODS, Recipe, quantize
from quire.quant.packing import packed_weights
from quire.quant.quality import compare
from quire.quant.scheme import parse
from quire.quant.stored import read
from quire.quant.texts import built_in, rows_of, texts_of
from quire.weights import save as folder_save
from quire.weights.tensors import stored_tensors
from tests.conftest import write_model
from tests.parity.families import BY_NAME, randomise
from tests.parity.families import save as save_reference
from tests.quant import packers
from tests.quant.test_checkpoints import distance, load, logits

SIZE = 32
ROWS = [[(7 * n + 3 * k) % 318 + 2 for k in range(48)] for n in range(12)]


def seen(inputs: int, seed: int = 0) -> Tensor:
    """Rows [T, I] as layers see them: channels that go together, a few of them large."""
    torch.manual_seed(seed)
    sizes = torch.ones(inputs)
    sizes[:: inputs // 8] = 12
    return (torch.randn(600, inputs) + 0.7 * torch.randn(600, 8) @ torch.randn(8, inputs)) * sizes


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_errs_less_than_rounding(symmetric: bool) -> None:
    x = seen(128)
    weight, gram = torch.randn(64, 128) * 0.05, x.t() @ x
    numbers, grid = gptq.rounded(weight, gram, SIZE, symmetric)
    plain = output_error(plain_grid(weight, SIZE, symmetric).nearest(weight) - weight, gram)
    fitted = output_error(fitted_grid(weight, gram, SIZE, symmetric).nearest(weight) - weight, gram)
    got = output_error(grid.restored(numbers) - weight, gram)
    assert got < 0.6 * fitted < 0.6 * plain
    error = x @ (grid.restored(numbers) - weight).t()
    assert float(error.square().sum()) == pytest.approx(got, rel=1e-3)


def test_gptq_bears_inputs_that_never_occur() -> None:
    x = seen(64)
    x[:, 5] = 0
    x[:, 9] = x[:, 8]  # a gram matrix that has no inverse
    weight = torch.randn(16, 64)
    numbers, grid = gptq.rounded(weight, x.t() @ x, SIZE, False)
    assert torch.isfinite(grid.restored(numbers)).all()
    assert numbers.min() >= 0
    assert numbers.max() <= 15


def test_awq_errs_less_than_rounding() -> None:
    x = seen(128, seed=3)
    weights = [torch.randn(64, 128) * 0.05, torch.randn(32, 128) * 0.05]
    inputs = Inputs.none(128)
    inputs.add(x)
    scale = awq.best_scale(weights, [inputs, inputs], [SIZE, SIZE], False)
    assert scale.max() > 2 * scale.min()
    for weight in weights:
        plain = output_error(plain_grid(weight, SIZE, False).nearest(weight) - weight, inputs.gram)
        scaled, gram = weight * scale, inputs.gram / (scale[:, None] * scale)
        numbers, grid = awq.rounded(scaled, gram, SIZE, False)
        assert output_error(grid.restored(numbers) / scale - weight, inputs.gram) < 0.7 * plain


FAMILIES = ("llama-biases", "gpt2", "opt", "opt-350m", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_scales_change_no_result(name: str, tmp_path: Path) -> None:
    """The table of folds, for every kind of layer: with the scales folded in and nothing rounded, logits stay."""
    reference = transformers.AutoModelForCausalLM.from_config(BY_NAME[name].config()).eval()
    randomise(reference)
    folder = save_reference(reference, tmp_path)
    model = assemble(folder, read_model_config(folder), "float32", keep_dense=True)
    batch = packed([[5, 9, 80, 31, 7, 50, 18, 44]])
    with torch.no_grad():
        expected = model.logits(model(batch))
        before = {key: value.clone() for key, value in model.named_parameters()}
        for _, layer, inputs in walk(model, [[token % 97 for token in row] for row in ROWS]):
            folds = list(awq.folds_of(layer))
            assert folds
            awq.fold_scales(layer, inputs, {key: one.gram.shape[0] for key, one in inputs.items()}, False)
        torch.testing.assert_close(model.logits(model(batch)), expected, atol=2e-3, rtol=0)
        changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    if name != "opt-350m":  # its norms come after the sums: nothing to fold into
        assert len(changed) > 5


def folder_for(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dense", tie_word_embeddings=True, torch_dtype="bfloat16")


def written(source: Path, output: Path, recipe: Recipe) -> Path:
    """The command's path without its text and its door."""
    from quire.cli.quantize import stored_as

    config = read_model_config(source)
    model = assemble(source, config, "float32", keep_dense=True)
    made = quantize(model, ROWS, recipe, lambda count: None)
    with folder_save.whole_folder(output) as working:
        config = save.quantization_config(recipe, ())
        folder_save.write_checkpoint(source, working, stored_as(source, model, made), config, 60_000)
    return output


@pytest.mark.parametrize("method", METHODS)
def test_written_checkpoints_load_and_are_near(method: str, tmp_path: Path) -> None:
    source = folder_for(tmp_path)
    output = written(source, tmp_path / method, Recipe(method, group_size=SIZE))
    assert len(list(output.glob("*.safetensors"))) > 1
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert oct(output.stat().st_mode & 0o777) == "0o755"
    worst = 0.15 if METHODS[method] == 8 else 0.7
    assert distance(logits(load(output)), logits(load(source))) < worst
    if METHODS[method] == 4:
        quality = {
            kind: compare(load(source), model, ROWS[:4]).divergence
            for kind, model in (("made", load(output)), ("rounded", load(source, "int4")))
        }
        assert quality["made"] < quality["rounded"] * 1.1


def test_four_bit_parts_are_bit_for_bit_the_independent_writers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    grid = plain_grid(weight, SIZE, False)
    numbers = grid.rounded(weight)
    plain, zeros, scales = numbers.int().numpy(), grid.zeros.int().numpy(), grid.scales.numpy()
    of_input = packers.natural(128, SIZE)
    for ours, theirs in (
        (save.awq_parts(numbers, grid), packers.awq(plain, zeros, scales)),
        (save.gptq_parts(numbers, grid), packers.gptq(plain, zeros, scales, of_input)),
    ):
        assert ours.keys() == theirs.keys()
        for name, part in ours.items():
            assert torch.equal(part, theirs[name]), name
            assert part.dtype == theirs[name].dtype
    for method, parts in (("awq", save.awq_parts(numbers, grid)), ("gptq", save.gptq_parts(numbers, grid))):
        scheme = parse(save.quantization_config(Recipe(method, group_size=SIZE), ()))
        assert torch.equal(dense_values(read("m", parts, scheme, 24, 128)), grid.restored(numbers))


@pytest.mark.parametrize("method", ["int8", "fp8"])
@pytest.mark.usefixtures("reference_ops")
def test_transformers_loads_what_is_written(method: str, tmp_path: Path) -> None:
    """compressed-tensors through transformers, the reference for that format, on the CPU."""
    pytest.importorskip("compressed_tensors")
    source = folder_for(tmp_path)
    output = written(source, tmp_path / method, Recipe(method))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    tokens = [5, 9, 200, 31, 7, 250, 18, 44]
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    ours = load(output)
    weights = packed_weights(ours)
    assert len(weights) == 21
    for name, weight in weights.items():
        torch.testing.assert_close(dense_values(weight), theirs.get_submodule(name).weight.float(), rtol=1e-6, atol=0)
    # Activations are rounded otherwise there (to fp8 too).
    assert distance(logits(ours), expected) < 0.2


def test_the_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), folder_save.whole_folder(tmp_path / "out") as working:
        (working / "written.json").rename(working / "none" / "there")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="output must be a new or an empty folder"):
        folder_save.refuse_contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bnb"}, "method must be one of awq, gptq, int8, fp8, got 'bnb'"),
        ({"method": "awq", "bits": 8}, "bits must be 4 for awq, got 8"),
        ({"method": "int8", "bits": 4}, "bits must be 8 for int8, got 4"),
        ({"method": "gptq", "group_size": 100}, "group_size must be a multiple of 32, got 100"),
        ({"method": "awq", "symmetric": True}, "symmetric must be left out for awq"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_texts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    lines = [{"text": "one two"}, {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(texts_of(tmp_path / "a.jsonl")) == ["one two", "three\nfour"]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"'b\.jsonl', line 2"):
        list(texts_of(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match=r"\.jsonl or \.txt file"):
        texts_of(tmp_path / "c.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        texts_of(tmp_path / "none.txt")
    assert len(next(built_in())) > 100
    rows, held = rows_of(iter(["a" * 1000]), lambda text: list(range(len(text))), 10, 7, 4)
    assert (len(rows), len(held)) == (7, 4)
    assert not {row[0] for row in rows} & {row[0] for row in held}
    with pytest.raises(ConfigError, match="at least 20 tokens, got 5"):
        rows_of(iter(["a" * 5]), lambda text: list(range(len(text))), 10, 7, 4)


def test_quality_of_itself_is_perfect(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    quality = compare(model, model, ROWS[:2])
    assert (quality.increase, quality.divergence, quality.agreement, quality.tokens) == (0, 0, 1, 94)
    row = torch.tensor(ROWS[0])
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(model.logits(model(packed([ROWS[0]])))[:-1], row[1:]).exp()
    assert compare(model, model, ROWS[:1]).perplexity == pytest.approx(float(expected), rel=1e-5)


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quire.cli.main import run

    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = ["quantize", str(tiny_llama), "--data", str(tmp_path / "text.txt"), "--length", "64", "--group-size", "32"]
    words += ["--samples", "4", "--held-out", "2"]
    assert run([*words, "--method", "gptq", "--output", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["linears"] == 21
    assert facts["quality"]["tokens"] == 126
    assert abs(facts["quality"]["increase"]) < 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert sum(tensor.numel() for _, tensor in stored_tensors(tmp_path / "out" / "model.safetensors")) > 0
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert run([*words, "--method", "gptq", "--output", str(tmp_path / "out")]) == 3
    assert "must be a new or an empty folder" in capsys.readouterr().err
    assert run(["quantize", str(tmp_path / "out"), "--method", "int8", "--output", str(tmp_path / "again")]) == 3
    assert "weights are gptq already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
