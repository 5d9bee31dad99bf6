"""What do the ways of quantizing the weights cost in quality, on held-out text of the standard library?

Each against the same model with dense weights as it is published: perplexity, mean KL divergence, equal likeliest tokens. The
peer is the method's own promise in the house's terms: int8 within 0.5 % of the perplexity, AWQ and GPTQ within 3 %.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Outcome
from quire.assemble import assemble
from quire.models.config import read_model_config
from quire.quant.method import Recipe, quantize
from quire.quant.quality import Quality, compare
from quire.quant.save import quantization_config
from quire.quant.texts import rows_of, texts_of
from quire.text.tokenizer import Tokenizer
from quire.weights.hub import resolve
from quire.weights.save import write_checkpoint

AT_LOAD = ("int8", "int4", "fp8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="quire-tiny", help="folder, hub id or quire-tiny")
    parser.add_argument("--samples", type=int, default=64, help="rows to calibrate with")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=16, help="rows to compare on")
    parser.add_argument("--group-size", type=int, default=128, help="of awq and gptq")
    parser.add_argument("--data", type=Path, help="instead of the standard library's docstrings")


def run(options: argparse.Namespace) -> Outcome:
    folder = resolve(options.model)
    config = read_model_config(folder)
    encode = Tokenizer.from_folder(folder).encode
    rows, held = rows_of(texts_of(options.data), encode, options.length, options.samples, options.held_out)
    options.data = str(options.data) if options.data else None
    dtype = config.dtype
    original = assemble(folder, config, dtype)
    found: dict[str, Quality] = {}
    for kind in AT_LOAD:
        found[f"{kind} at load"] = compare(original, assemble(folder, config, dtype, kind), held)
        print(kind, found[f"{kind} at load"].text(), flush=True)
    recipes = [Recipe("gptq", group_size=options.group_size), Recipe("gptq", group_size=options.group_size, symmetric=True)]
    recipes += [Recipe("awq", group_size=options.group_size), Recipe("int8"), Recipe("fp8")]
    for recipe in recipes:
        name = recipe.method + (" symmetric" if recipe.symmetric else "")
        with tempfile.TemporaryDirectory() as written:
            _write(folder, Path(written), recipe, rows)
            other = assemble(Path(written), read_model_config(Path(written)), dtype)
            found[name] = compare(original, other, held)
            del other
        print(name, found[name].text(), flush=True)
    listed = ", ".join(f"{name} {quality.increase:+.2%}" for name, quality in found.items())
    first = next(iter(found.values()))
    numbers: dict[str, Any] = {name: quality.as_dict() for name, quality in found.items()}
    return Outcome(f"perplexity of {options.model} over {first.original:.2f} in {dtype}: {listed}", numbers)


def _write(folder: Path, output: Path, recipe: Recipe, rows: list[list[int]]) -> None:
    from quire.cli.quantize import stored_as

    config = read_model_config(folder)
    model = assemble(folder, config, config.dtype, keep_dense=True)
    made = quantize(model, rows, recipe, lambda count: None)
    write_checkpoint(folder, output, stored_as(folder, model, made), quantization_config(recipe, ()))
