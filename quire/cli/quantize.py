"""`quire quantize`: a quantized copy of a model, in the layout that its method has everywhere, and what it costs in quality.

Brings rooms together (loading, quire/quant, the tokenizer) and knows no arithmetic.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire import envs, log
from quire.cli.command import SectionedCommand, json_flag
from quire.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from quire.models.config import ModelConfig
    from quire.models.decoder import CausalLM
    from quire.quant.method import Made, Recipe

METHODS = ("awq", "gptq", "int8", "fp8")


@click.command("quantize", cls=SectionedCommand)
@click.argument("model")
@click.option("--method", required=True, type=click.Choice(METHODS), help="How, and in which published layout.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The new model's folder: new, or empty.")
@click.option("--bits", type=int, help="4 for awq and gptq, 8 for int8 and fp8, which is the default.")
@click.option("--group-size", default=128, show_default=True, help="Inputs that share a scale (awq, gptq).")
@click.option("--symmetric", is_flag=True, help="Zero in the middle of each group (gptq); some GPU kernels need it.")
@click.option(
    "--data", type=click.Path(path_type=Path), help='.txt, or .jsonl with "text" or "messages". [default: built-in text]'
)
@click.option("--samples", default=128, show_default=True, help="Rows of tokens to calibrate with (awq, gptq).")
@click.option("--length", default=512, show_default=True, help="Tokens of a row.")
@click.option("--held-out", default=16, show_default=True, help="Rows to compare both models on; 0: do not.")
@click.option("--revision", help="Hub revision of the model.")
@json_flag
def command(
    model: str,
    method: str,
    output: Path,
    bits: int | None,
    group_size: int,
    symmetric: bool,
    data: Path | None,
    samples: int,
    length: int,
    held_out: int,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write a quantized copy of MODEL (a folder, a hub id or quire-tiny) to a folder, for Quire and for others.

    awq and gptq run the model over calibration text: give some of the kind that will be served with --data; else docstrings
    of Python's standard library are taken. At the end both models read held-out text, and their difference is printed.
    """
    from quire.quant.method import Recipe

    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("held_out", held_out, 0)):
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    recipe = Recipe(method, bits, group_size, symmetric)
    log.setup("WARNING")
    facts = quantize(model, recipe, output, data, samples, length, held_out, revision)
    if as_json:
        click.echo(json.dumps(facts, indent=2))


def quantize(
    model: str,
    recipe: Recipe,
    output: Path,
    data: Path | None,
    samples: int,
    length: int,
    held_out: int,
    revision: str | None = None,
) -> dict[str, Any]:
    """The command's work; returns what --json prints. Raises ConfigError and ModelError before anything is written."""
    import torch

    from quire.assemble import assemble
    from quire.models.config import read_model_config
    from quire.plan.memory import plan_dtype
    from quire.quant import method as methods
    from quire.quant.quality import compare
    from quire.quant.save import quantization_config
    from quire.quant.texts import rows_of, texts_of
    from quire.text.tokenizer import Tokenizer
    from quire.weights import save
    from quire.weights.hub import resolve

    begin = time.monotonic()
    save.refuse_contents(output)
    folder = resolve(model, revision)
    config = read_model_config(folder)
    _refuse(config, recipe)
    length = min(length, config.max_position_embeddings)
    if data is None:
        _say("Text: docstrings of Python's standard library (give your own with --data).")
    rows, held = rows_of(texts_of(data), Tokenizer.from_folder(folder).encode, length, samples, held_out)
    if (threads := envs.threads()) is not None:
        torch.set_num_threads(threads)
    dtype = plan_dtype("auto", config.dtype, "cpu")
    dense = assemble(folder, config, dtype, keep_dense=True)
    if recipe.method in methods.CALIBRATED:
        _say(f"Calibrating with {len(rows)} rows of {length} tokens.")
    with log.progress(f"Quantizing ({recipe.method})", config.num_layers) as advance:
        made = methods.quantize(dense, rows, recipe, advance)
    with save.whole_folder(output) as working:
        tensors = stored_as(folder, dense, made)
        save.write_checkpoint(folder, working, tensors, quantization_config(recipe, _left_dense(dense, made)))
    _say(f"Wrote {output} ({_megabytes(folder)} -> {_megabytes(output)} MB of weights) in {time.monotonic() - begin:.0f} s.")
    facts: dict[str, Any] = {"output": str(output), "method": recipe.method, "linears": len(made.parts)}
    del dense, made
    if held_out:
        original = assemble(folder, config, dtype)
        written = assemble(output, read_model_config(output), dtype)
        with log.progress("Comparing", len(held)) as advance:
            quality = compare(original, written, held, advance)
        _say(f"Quality: {quality.text()}.")
        facts["quality"] = quality.as_dict()
    return facts


def _refuse(config: ModelConfig, recipe: Recipe) -> None:
    from quire.quant.scheme import scheme_of

    if (scheme := scheme_of(config.raw, None)) is not None:
        raise ConfigError(f"model must have dense weights, got one whose weights are {scheme.method} already.")
    if config.model_type == "gpt2" and recipe.method in ("int8", "fp8"):
        raise ConfigError(
            f"method must be awq or gptq for GPT-2, got {recipe.method!r}: its matrices are stored transposed, which "
            "compressed-tensors has no form for."
        )


def stored_as(folder: Path, model: CausalLM, made: Made) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors under the source's names, quantized and changed ones in the place of the old."""
    from quire.weights.files import checkpoint_files
    from quire.weights.tensors import stored_tensors

    ours = dict(model.named_parameters())
    for path in checkpoint_files(folder):
        for stored, tensor in stored_tensors(path):
            name = next((name for name in model.checkpoint_names(stored) if name in ours), None)
            module = name.removesuffix(".weight") if name is not None else None
            if module in made.parts:
                for leaf, part in made.parts[module].items():
                    yield f"{stored.removesuffix('weight')}{leaf}", part
            elif name in made.changed:
                yield stored, model.convert(name, made.changed[name]).to(tensor.dtype)
            else:
                yield stored, tensor


def _left_dense(model: CausalLM, made: Made) -> list[str]:
    """Linears of the layers that are not quantized (routers, or widths that the groups do not divide)."""
    from quire.layers.linear import Linear
    from quire.quant.calibrate import layers_of

    prefix = layers_of(model)[0]
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return [name for name in names if name.startswith(prefix) and name not in made.parts]


def _megabytes(folder: Path) -> int:
    from quire.weights.files import checkpoint_files

    return sum(path.stat().st_size for path in checkpoint_files(folder)) // 1_000_000


def _say(line: str) -> None:
    click.echo(line, err=True)
