"""What does a KV cache of one byte per number cost in quality, and what do the scales and their margin matter?

The same model and text through each cache, against the cache in the model's own type: perplexity, mean KL divergence, equal
likeliest tokens. The limit is the house's promise of 0.5 % of the perplexity. Also: how far held-out keys and values went
beyond the bounds of the calibration, which is what the margin is for.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Outcome
from quire.assemble import DTYPES, assemble
from quire.batch import Batch
from quire.engine import calibration
from quire.engine.kv import KV_DTYPES, allocate
from quire.models.config import read_model_config
from quire.models.decoder import CausalLM
from quire.quant.quality import Quality, compare
from quire.quant.texts import rows_of, texts_of
from quire.text.tokenizer import Tokenizer
from quire.weights.hub import resolve

KINDS = ("fp8_e4m3", "fp8_e5m2", "int8")
BLOCK_SIZE = 16


class Cached:
    """A model whose batches go through a cache of that type."""

    def __init__(self, model: CausalLM, dtype: torch.dtype, scales: list[Tensor] | None) -> None:
        self.model, self.dtype, self.scales, self.logits = model, dtype, scales, model.logits

    def __call__(self, batch: Batch) -> Tensor:
        count = len(batch.tokens)
        blocks = -(-count // BLOCK_SIZE)
        kv = allocate(self.model.config, blocks, BLOCK_SIZE, self.dtype, self.scales)
        tables, slots = torch.arange(1, blocks + 1)[None], torch.arange(BLOCK_SIZE, BLOCK_SIZE + count)
        return self.model(replace(batch, kv=kv, block_tables=tables, slots=slots))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="quire-tiny", help="folder, hub id or quire-tiny")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--held-out", type=int, default=16, help="rows to compare on")
    parser.add_argument("--margins", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.5, 2.0, 4.0], help="of int8, to try")
    parser.add_argument("--data", type=Path, help="instead of the standard library's docstrings")


def run(options: argparse.Namespace) -> Outcome:
    folder = resolve(options.model)
    config = read_model_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    _, held = rows_of(texts_of(options.data), tokenizer.encode, options.length, 1, options.held_out)
    options.data = str(options.data) if options.data else None
    model = assemble(folder, config, config.dtype)
    own = DTYPES[config.dtype]
    bounds = calibration.observed_bounds(model, calibration.calibration_tokens(tokenizer, config), own)
    seen = calibration.observed_bounds(model, held, own)
    beyond = torch.stack([there / bound for there, bound in zip(seen, bounds, strict=True)])

    def quality(kind: str, scales: list[Tensor]) -> Quality:
        return compare(Cached(model, own, None), Cached(model, KV_DTYPES[kind], scales), held)

    found: dict[str, Quality] = {}
    for kind in KINDS:
        found[kind] = quality(kind, calibration.scales_of(bounds, KV_DTYPES[kind]))
        print(f"{kind}, calibrated:", found[kind].text(), flush=True)
    for kind in KINDS[:2]:
        found[f"{kind} with scales of 1"] = quality(kind, [torch.ones_like(bound) for bound in bounds])
    for margin in options.margins:
        scales = [bound * margin / 127 for bound in bounds]
        found[f"int8 with margin {margin:g}"] = quality("int8", scales)
    for name, one in found.items():
        print(f"{name:28} {one.text()}")
    listed = ", ".join(f"{kind} {found[kind].increase:+.2%}" for kind in KINDS)
    most = [round(float(beyond[:, row].max()), 3) for row in (0, 1)]
    numbers: dict[str, Any] = {"margin": calibration.MARGIN, "held_out_beyond_bounds": {"keys": most[0], "values": most[1]}}
    numbers |= {name: one.as_dict() for name, one in found.items()}
    headline = (
        f"perplexity of {options.model} with calibrated caches against {config.dtype}: {listed} (limit 0.5 %); "
        f"held-out keys reached {most[0]:.2f} of the calibration's bounds, values {most[1]:.2f}"
    )
    return Outcome(headline, numbers)
