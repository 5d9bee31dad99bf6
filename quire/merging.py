"""From a base and adapters to a folder of its own: a merged model, or the adapters combined into one.

Brings rooms together (files, adapters, tokenizer, model) and measures what rounding cost; the arithmetic is in
quire/lora/merge.py and quire/lora/combine.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quire import envs, log
from quire.assemble import DTYPES, assemble
from quire.errors import ConfigError
from quire.lora.adapter import TEMPLATE, read_adapter, write_adapter
from quire.lora.base import base_digest
from quire.lora.combine import Combination, combine
from quire.lora.drift import Drift, Scores, drift_between, scores
from quire.lora.merge import Merged, merge_weights
from quire.lora.parts import Adapter
from quire.models.config import ModelConfig, read_json, read_model_config
from quire.models.decoder import CausalLM
from quire.models.registry import build_model
from quire.plan.memory import plan_dtype, size_text
from quire.quant.scheme import scheme_of
from quire.quant.texts import rows_of, texts_of
from quire.text.chat import render
from quire.text.tokenizer import Tokenizer
from quire.weights.dense import DequantizedTensors, StoredTensors
from quire.weights.hub import resolve
from quire.weights.save import SHARD_BYTES, copy_companions, refuse_contents, whole_folder

Rows = list[list[int]]
Say = Callable[[str], None]
# Files that say how a base was quantized.
QUANTIZERS_OWN = ("quantize_config.json", "quant_config.json", "recipe.yaml", "hf_quant_config.json")


@dataclass(frozen=True)
class MergeReport:
    """What was written and what it cost. lost: the share of the update that rounding took (0 none, 1 all), and the tensor
    where it took most. drift: None where it was not measured. digest: of the adapter that was merged or written.
    dequantized: how the base's weights were quantized, None: they were dense. dtype: of what was written, None: as before."""

    output: Path
    adapters: tuple[str, ...]
    digest: str
    rank: int
    lost: float | None = None
    lost_most: tuple[str, float] | None = None
    untied: bool = False
    drift: Drift | None = None
    dequantized: str | None = None
    dtype: str | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "output": str(self.output)}


def merge(
    model: str | Path,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: Combination | None = None,
    dtype: str | None = None,
    adapter_only: bool = False,
    data: Path | None = None,
    held_out: int = 16,
    length: int = 512,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Say = lambda line: None,
) -> MergeReport:
    """Write `model` with `adapters` in its weights to `output`, a new folder that needs nothing else.

    weights, how: what to make of several adapters (`quire.lora.combine`). dtype: of the weights; None: as they are, or of a
    quantized base, whose weights become dense, the type that its configuration names.
    adapter_only: write the combined adapter instead, in PEFT's layout. held_out: rows of `length` tokens to compare adapter
    and merged model on, of `data` or of the built-in text; 0: do not. Raises ConfigError, ModelError and AdapterError before
    anything is written; whatever happens later, `output` is whole or not there.
    """
    begin = time.monotonic()
    output = Path(output)
    refuse_contents(output)
    folder = resolve(str(model), revision)
    config = read_model_config(folder)
    _check(dtype, adapter_only)
    with torch.device("meta"):
        tree = build_model(config)
    given = [adapters] if isinstance(adapters, (str, Path, Adapter)) else list(adapters)
    names = tuple("adapter" if isinstance(one, Adapter) else str(one) for one in given)
    read = [one if isinstance(one, Adapter) else read_adapter(Path(one).expanduser(), tree) for one in given]
    _compare_bases(folder, names, read, say)
    adapter = read[0] if len(read) == 1 and weights is None and how is None else combine(read, weights, how)
    facts = {"output": output, "adapters": names, "digest": adapter.digest, "rank": adapter.rank}
    if adapter_only:
        write_adapter(output, adapter, base_name=str(model))
        return MergeReport(**facts, seconds=time.monotonic() - begin)
    source, dequantized = _source(folder, config, tree)
    if dequantized is not None:
        dtype = dtype or (config.dtype if config.dtype in DTYPES else "float32")
        say(f"The base's weights are {dequantized}; what is written is dense, {dtype}.")
    total = _total(source, dtype)
    _check_space(output, total)
    if (threads := envs.threads()) is not None:
        torch.set_num_threads(threads)
    compute = plan_dtype("auto", dtype or config.dtype, "cpu")
    rows = _held_out(folder, adapter, data, held_out, min(length, config.max_position_embeddings))
    before = _before(folder, config, compute, rows, adapter) if rows else None
    with whole_folder(output) as working:
        merged = _write(source, total, working, tree, adapter, dtype, shard_bytes)
        mixed = f" ({(how or Combination()).kind}, weights {weights})" if weights or how else ""
        _describe(folder, working, adapter, merged, dtype, _card(output, str(model), names, mixed, adapter, merged))
        drift = None
        if before is not None:
            after = _scored(assemble(working, read_model_config(working), compute), rows, None, "Comparing: merged")
            drift = drift_between(*before, after)
    rounding = merged.rounding
    return MergeReport(
        **facts,
        lost=rounding.lost,
        lost_most=(rounding.worst_name, rounding.worst),
        untied=merged.untied,
        drift=drift,
        dequantized=dequantized,
        dtype=dtype,
        seconds=time.monotonic() - begin,
    )


def _check(dtype: str | None, adapter_only: bool) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype is not None and adapter_only:
        raise ConfigError(f"dtype is of a merged model's weights, got {dtype!r} with adapter_only; adapters are float32.")


def _compare_bases(folder: Path, names: Sequence[str], adapters: Sequence[Adapter], say: Say) -> None:
    """Says which adapters were trained on another base than this: they fit by their shapes, and may mean nothing here."""
    known = [(name, one.base_digest) for name, one in zip(names, adapters, strict=True) if one.base_digest is not None]
    if known and (digest := base_digest(folder)):
        for name, other in known:
            if other != digest:
                say(f"Warning: {name} was trained on a base with other weights (its base_digest differs).")


def _source(folder: Path, config: ModelConfig, tree: CausalLM) -> tuple[StoredTensors, str | None]:
    """The base's tensors as dense ones, and how its weights were quantized, if they were."""
    scheme = scheme_of(config.raw, None)
    if scheme is None:
        return StoredTensors(folder), None
    return DequantizedTensors(folder, tree, scheme), scheme.method


def _total(source: StoredTensors, dtype: str | None) -> int:
    """Bytes of the merged weights."""

    def size(tensor: torch.Tensor) -> int:
        return (DTYPES[dtype] if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize

    return sum(tensor.numel() * size(tensor) for _, tensor in source.planned())


def _check_space(output: Path, needed: int) -> None:
    place = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(f"output needs {size_text(needed)}, and the disk of {str(place)!r} has {size_text(free)} free.")


def _held_out(folder: Path, adapter: Adapter, data: Path | None, count: int, length: int) -> Rows:
    """Tokens to compare on: conversations as the adapter's template (or the base's) writes them."""
    if not count:
        return []
    tokenizer = Tokenizer.from_folder(folder)

    def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
        return render(tokenizer, messages, add_generation_prompt=False, chat_template=adapter.chat_template)

    return rows_of(texts_of(data, rendered), tokenizer.encode, length, count, 0)[0]


def _before(folder: Path, config: ModelConfig, compute: str, rows: Rows, adapter: Adapter) -> tuple[Scores, Scores]:
    """What the base says of the rows, and what the adapter beside it says. The model is gone afterwards."""
    model = assemble(folder, config, compute)
    base = _scored(model, rows, None, "Comparing: base")
    return base, _scored(model, rows, adapter, "Comparing: adapter")


def _scored(model: CausalLM, rows: Rows, adapter: Adapter | None, title: str) -> Scores:
    with log.progress(title, len(rows)) as advance:
        return scores(model, rows, adapter, advance)


def _write(
    source: StoredTensors, total: int, working: Path, tree: CausalLM, adapter: Adapter, dtype: str | None, most: int
) -> Merged:
    with log.progress("Merging", total) as advance:
        return merge_weights(source, working, tree, adapter, None if dtype is None else DTYPES[dtype], advance, most)


def _describe(folder: Path, working: Path, adapter: Adapter, merged: Merged, dtype: str | None, card: str) -> None:
    """All that stands beside the weights: configuration, tokenizer, the adapter's template and a card."""
    copy_companions(folder, working, leave_out=("README.md", *QUANTIZERS_OWN))
    config = read_json(folder / "config.json")
    for level in (config, config.get("text_config")):
        if isinstance(level, dict):
            for name in ("quantization_config", "compression_config"):
                level.pop(name, None)  # what is written is dense, also where the base was not
            if merged.untied and (level is config or "tie_word_embeddings" in level):
                level["tie_word_embeddings"] = False
            if dtype is not None:
                level.pop("torch_dtype", None)
                level["dtype"] = dtype
    _write_json(working / "config.json", config)
    if adapter.chat_template is not None:
        (working / TEMPLATE).write_text(adapter.chat_template, encoding="utf-8")
    path = working / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path)
        if adapter.chat_template is not None:
            settings.pop("chat_template", None)  # the file beside it counts
        own = {key: _content(value) for key, value in settings.items()}
        settings |= {key: token for key, token in adapter.special_tokens.items() if own.get(key) != token}
        _write_json(path, settings)
    (working / "README.md").write_text(card, encoding="utf-8")


def _card(output: Path, model: str, names: Sequence[str], mixed: str, adapter: Adapter, merged: Merged) -> str:
    """A model card of a few lines. mixed: how several adapters became one."""
    shares = ", ".join(f"`{Path(name).name}`" for name in names)
    return (
        f"# {output.name}\n\n"
        f"`{Path(model).name}` with {shares}{mixed} merged into its weights by Quire.\n\n"
        f"- digest of what was merged: `{adapter.digest}`\n"
        f"- share of the update that rounding to the weights' type took: {merged.rounding.lost:.2%}\n"
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
