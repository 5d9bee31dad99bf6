"""An adapter written into its base's weights, tensor by tensor: W + s B A in float32, rounded to the type of the file.

Where the base is quantized, W is what its stored numbers stand for, and all that is written is dense.

Knows weights, an adapter and a folder to write to; knows no tokenizer, no template and no measuring (quire/merging.py).
Letters: R rank, I inputs, O outputs, V vocabulary, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quire.errors import AdapterError
from quire.layers.embedding import Embedding
from quire.lora.parts import Adapter, ModulePart
from quire.models.decoder import CausalLM
from quire.weights.dense import StoredTensors
from quire.weights.save import SHARD_BYTES, Planned, stream_weights

# Rows that are in float32 at a time.
PIECE = 1024
HEAD = "lm_head.weight"
# What replaces, leaves nothing to say of an update that was added and rounded.
_REPLACED = ("weight", "bias", "tokens")


@dataclass
class Rounding:
    """What became of the updates in the type of the file, as sums of squares over all changed numbers."""

    wanted: float = 0.0
    missed: float = 0.0
    worst: float = 0.0
    worst_name: str = ""
    tensors: int = 0

    @property
    def lost(self) -> float:
        """|update - what arrived of it| / |update|: 0 nothing was lost, 1 nothing arrived."""
        return math.sqrt(self.missed / self.wanted) if self.wanted else 0.0

    def add(self, name: str, wanted: float, missed: float) -> None:
        self.tensors += 1
        self.wanted += wanted
        self.missed += missed
        own = math.sqrt(missed / wanted) if wanted else 0.0
        if own > self.worst:
            self.worst, self.worst_name = own, name


@dataclass
class Merged:
    """What was written. untied: whether the head has become a tensor of its own."""

    untied: bool
    rounding: Rounding = field(default_factory=Rounding)


def merge_weights(
    source: StoredTensors,
    output: Path,
    model: CausalLM,
    adapter: Adapter,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
    most: int = SHARD_BYTES,
) -> Merged:
    """The tensors of `source` with `adapter` in them, as files in `output`. model: the base's tree, without memory.

    dtype: of all floating tensors; None: as they are. Raises AdapterError for what no weight can hold, naming it.
    """
    return _Merge(source, model, adapter, dtype, advance).write(output, most)


class _Merge:
    def __init__(
        self,
        source: StoredTensors,
        model: CausalLM,
        adapter: Adapter,
        dtype: torch.dtype | None,
        advance: Callable[[int], None],
    ) -> None:
        self.source, self.model, self.adapter, self.dtype, self.advance = source, model, adapter, dtype, advance
        self.names = {name for name, _ in model.named_parameters()}
        modules = {id(module): name for name, module in model.named_modules()}
        self.table = modules[id(model.table)]
        tied = model.config.tie_word_embeddings
        head, table = adapter.parts.get("lm_head"), adapter.parts.get(self.table)
        self.merged = Merged(untied=tied and not _alike(head, table))
        self.drops_head = tied  # a tied model's files may hold one all the same
        self.left = {f"{name}.{leaf}" for name, part in adapter.parts.items() for leaf in _leaves(part)}

    def write(self, output: Path, most: int) -> Merged:
        planned = [one for stored, tensor in self.source.planned() for one, _ in self._plan(stored, tensor)]
        if self.merged.untied:
            self.left.discard(HEAD)
        elif self.model.config.tie_word_embeddings:
            self.left.discard(HEAD)  # alike with the table's
        if self.left:
            name = min(self.left)
            raise AdapterError(
                f"{name} cannot be merged: the base has no such tensor to put the adapter's into. "
                "Serve the adapter beside its base instead (--lora-modules)."
            )
        stream_weights(output, planned, self._tensors(), most)
        return self.merged

    def _plan(self, stored: str, tensor: Tensor) -> Iterator[tuple[Planned, str | None]]:
        """What becomes of one tensor of the files: (what is written, its name in the tree if it has one there)."""
        name = next((one for one in self.model.checkpoint_names(stored) if one in self.names), None)
        if name is None and self.drops_head and stored.endswith(HEAD):
            return
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        if name is not None:
            self.left.discard(name)
        yield Planned(stored, dtype, tuple(tensor.shape)), name
        if name == f"{self.table}.weight" and self.merged.untied:
            prefix = "language_model." if stored.startswith("language_model.") else ""
            yield Planned(prefix + HEAD, dtype, tuple(tensor.shape)), HEAD

    def _tensors(self) -> Iterator[Tensor]:
        for stored, tensor in self.source.tensors():
            for one, name in self._plan(stored, tensor):
                module, _, leaf = (name or "").rpartition(".")
                part = self.adapter.parts.get(module)
                if part is None or leaf not in _leaves(part):
                    yield tensor.to(one.dtype)
                else:
                    yield self._changed(one, module, leaf, part, tensor)
                self.advance(one.size)

    def _changed(self, one: Planned, module: str, leaf: str, part: ModulePart, tensor: Tensor) -> Tensor:
        tree = self.model.get_submodule(module)
        base = self.model.convert(f"{module}.{leaf}", tensor)
        out = torch.empty(base.shape, dtype=one.dtype)
        wanted = missed = 0.0
        gain = _column_gain(part, base) if part.magnitude is not None and isinstance(tree, Embedding) else None
        for start in range(0, len(base), PIECE):
            rows = base[start : start + PIECE].float()
            if leaf == "bias":
                exact = _offset(part, start, rows)
            else:
                exact = _rows(part, start, rows, isinstance(tree, Embedding), gain)
            out[start : start + PIECE] = exact
            if not any(getattr(part, name) is not None for name in _REPLACED):
                wanted += float((exact - rows).double().square().sum())
                arrived = out[start : start + PIECE].float() - rows.to(one.dtype).float()
                missed += float((exact - rows - arrived).double().square().sum())
        if not torch.isfinite(out).all():
            raise AdapterError(f"{module}.{leaf} is out of the range of {one.dtype} when merged: choose --dtype bfloat16.")
        self.merged.rounding.add(f"{module}.{leaf}", wanted, missed)
        return self.model.convert(f"{module}.{leaf}", out)


def _leaves(part: ModulePart) -> set[str]:
    """The tensors of a module that its part changes."""
    weight = part.a is not None or part.weight is not None or part.tokens is not None
    bias = part.bias is not None or part.b_bias is not None
    return ({"weight"} if weight else set()) | ({"bias"} if bias else set())


def _alike(head: ModulePart | None, table: ModulePart | None) -> bool:
    """Whether head and table, one tensor before, are one afterwards: neither has a part, or both the same tokens or weight."""
    if head is None or table is None:
        return head is table
    ours, theirs = dict(head.tensors()), dict(table.tensors())
    replaced = ours.keys() == theirs.keys() and ours.keys() <= {"weight", "tokens"}
    return replaced and head.token_ids == table.token_ids and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _rows(part: ModulePart, start: int, rows: Tensor, embedding: bool, gain: Tensor | None) -> Tensor:
    """Rows [N, I] from number `start` on, merged. gain: DoRA's of an embedding's columns."""
    out = rows if part.weight is None else part.weight[start : start + len(rows)].float()
    if part.a is not None:
        factor, other = (part.a, part.b) if embedding else (part.b, part.a)
        out = out + factor[:, start : start + len(rows)].t() @ other * part.scale
    if gain is not None:
        out = out * gain
    elif part.magnitude is not None:
        norms = torch.linalg.norm(out, dim=1)
        out = (part.magnitude[start : start + len(rows)] / norms)[:, None] * out
    if part.tokens is not None:
        out = out.clone()
        for token, row in zip(part.token_ids, part.tokens, strict=True):
            if start <= token < start + len(rows):
                out[token - start] = row
    return out


def _column_gain(part: ModulePart, base: Tensor) -> Tensor:
    """[E]: DoRA's factors of an embedding, whose norms go down its columns."""
    squares = torch.zeros(base.shape[1])
    for start in range(0, len(base), PIECE):
        rows = base[start : start + PIECE].float()
        squares += (rows + part.scale * (part.a[:, start : start + len(rows)].t() @ part.b)).square().sum(0)
    return part.magnitude / squares.sqrt()


def _offset(part: ModulePart, start: int, bias: Tensor) -> Tensor:
    """Numbers [N] of the bias from number `start` on, merged."""
    here = slice(start, start + len(bias))
    out = bias if part.bias is None else part.bias[here].float()
    return out if part.b_bias is None else out + part.scale * part.b_bias[here]
