"""What is set into a linear, an embedding or a norm whose rows go through adapters.

Almost all adapters are A and B on linears: `PlainSocket`, one operation. The others take a slot's rows out, change them and
put them back, through operations that are exact by the row, so that a row never depends on the rows beside it; rows whose
slot has nothing here keep the base's bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire import ops
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.norm import Norm
from quire.lora.dropout import Dropout
from quire.lora.norms import weight_norms
from quire.lora.parts import ModulePart
from quire.models.decoder import CausalLM
from quire.ops.weights import DenseWeight, LoraWeight


class PlainSocket:
    """A linear whose adapters are A and B alone."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __call__(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        return ops.lora(x, y, slots, self.table)

    @staticmethod
    def together(sockets: Sequence[PlainSocket | None], x: Tensor, ys: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
        """The same for linears that were given the same x: in one call."""
        places = [place for place, socket in enumerate(sockets) if socket is not None]
        added = ops.loras(x, [ys[place] for place in places], slots, [sockets[place].table for place in places])
        done = dict(zip(places, added, strict=True))
        return [done.get(place, y) for place, y in enumerate(ys)]


class RarePart:
    """A part that has more than A and B, with what can be computed ahead where it does not train."""

    def __init__(self, model: CausalLM, name: str, part: ModulePart) -> None:
        self.model, self.module, self.part = model, model.get_submodule(name), part
        self.token_ids = torch.tensor(part.token_ids)
        self.packed: Any = None
        if part.weight is not None and not part.weight.requires_grad and isinstance(self.module, Linear):
            self.packed = ops.pack(DenseWeight(part.weight))
        self.fixed = None if part.magnitude is None or part.trainable else self._gain()

    def replaced(self, x: Tensor) -> Tensor:
        """The product with a weight of the adapter's own, in float32."""
        bias = self.module.bias if self.part.bias is None else self.part.bias
        bias = None if bias is None else bias.float()
        if self.packed is not None:
            return ops.packed_linear(x.float(), self.packed, bias)
        return ops.linear(x.float(), self.part.weight, bias)

    def gain(self) -> Tensor:
        """DoRA's factor on each output: [O]."""
        return self._gain() if self.fixed is None else self.fixed

    def _gain(self) -> Tensor:
        return self.part.magnitude / weight_norms(self.model, self.module, self.part)


@dataclass(frozen=True)
class Entry:
    """What a slot has for one module. rare: None where A and B are all and nothing falls out."""

    slot: int
    part: ModulePart
    rare: RarePart | None
    dropout: Dropout


@dataclass
class LinearSocket:
    """A linear with at least one part that has more than A and B, or that drops inputs."""

    name: str
    linear: Linear
    table: Any
    special: Sequence[Entry]

    def __call__(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        work = [(one, rows) for one, rows in _rows(self.special, slots) if len(rows)]
        for one, rows in work:
            if one.part.weight is not None:
                y = y.index_copy(0, rows, one.rare.replaced(x[rows]).to(y.dtype))
        before, dropped = y, x
        for one, rows in work:
            if one.dropout.active and one.part.a is not None:
                mask = one.dropout.mask(self.name, len(rows), x.shape[1]).to(x.device)
                dropped = dropped.index_copy(0, rows, (x[rows].float() * mask).to(x.dtype))
        if self.table is not None:
            if work:
                y = y.clone()  # `lora` may write into it
            y = ops.lora(dropped, y, slots, self.table)
        for one, rows in work:
            y = y.index_copy(0, rows, self._finish(one, x[rows], dropped[rows], before[rows], y[rows]))
        return y

    def _finish(self, one: Entry, x: Tensor, dropped: Tensor, before: Tensor, y: Tensor) -> Tensor:
        """Rows y with the bias, DoRA's factor and the tokens of their adapter. before: y without A and B."""
        part, dtype = one.part, y.dtype
        out = y.float()
        own = None if self.linear.bias is None or part.weight is not None else self.linear.bias.float()
        if part.b_bias is not None:
            out = out + part.scale * part.b_bias
        if part.magnitude is not None and one.dropout.active:
            # The factor's share of the base sees the input as A saw it, the base itself all of it, as in PEFT.
            product = self._product(dropped)
            gain = one.rare.gain()
            out = before.float() + (gain - 1) * product + gain * (out - before.float())
        elif part.magnitude is not None:
            out = (out if own is None else out - own) * one.rare.gain()
            out = out if own is None else out + own
        if part.bias is not None and part.weight is None:
            out = out - own + part.bias
        if part.tokens is not None:
            out = out.index_copy(1, one.rare.token_ids.to(out.device), ops.linear(x.float(), part.tokens))
        return out.to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        """The base's product without its bias."""
        linear = self.linear
        y = ops.linear(x, linear.weight) if linear.format is None else linear.format(linear, x)
        return y.float() if linear.format is None or linear.bias is None else y.float() - linear.bias.float()


@dataclass
class EmbeddingSocket:
    """An embedding: A and B, a table of the adapter's own, rows of single tokens, DoRA."""

    entries: Sequence[Entry]

    def __call__(self, ids: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        for one, rows in _rows(self.entries, slots):
            if len(rows):
                y = y.index_copy(0, rows, self._changed(one, ids[rows], y[rows]).to(y.dtype))
        return y

    def _changed(self, one: Entry, ids: Tensor, y: Tensor) -> Tensor:
        part = one.part
        out = y.float() if part.weight is None else torch.nn.functional.embedding(ids, part.weight)
        if part.a is not None:
            out = out + ops.linear(torch.nn.functional.embedding(ids, part.a.t()), part.b.t()) * part.scale
        if part.magnitude is not None:
            out = out * one.rare.gain()
        if part.tokens is not None:
            rows, which = (ids[:, None] == one.rare.token_ids.to(ids.device)).nonzero(as_tuple=True)
            out = out.index_copy(0, rows, part.tokens[which])
        return out


@dataclass
class NormSocket:
    """A norm: weights and biases of the adapters' own. Their rows are normed once more, which costs little."""

    norm: Norm
    entries: Sequence[Entry]

    def __call__(self, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
        for one, rows in _rows(self.entries, slots):
            if len(rows):
                y = y.index_copy(0, rows, self._changed(one.part, x[rows]).to(y.dtype))
        return y

    def _changed(self, part: ModulePart, x: Tensor) -> Tensor:
        weight = self.norm.weight.float() if part.weight is None else part.weight
        bias = self.norm.bias if part.bias is None else part.bias
        out = self.norm.unweighted(x) * (weight + self.norm.offset)
        return out if bias is None else out + bias.float()


def _rows(entries: Sequence[Entry], slots: Tensor) -> Iterator[tuple[Entry, Tensor]]:
    for one in entries:
        yield one, (slots == one.slot).nonzero()[:, 0]


def socket(module: Linear | Embedding | Norm, name: str, entries: Sequence[Entry]) -> Any:
    """The socket of a module for what the slots have for it; None where none has anything."""
    if not entries:
        return None
    if isinstance(module, Embedding):
        return EmbeddingSocket(entries)
    if isinstance(module, Norm):
        return NormSocket(module, entries)
    weights: list[LoraWeight | None] = [None] * (max(one.slot for one in entries) + 1)
    for one in entries:
        if one.part.a is not None:
            weights[one.slot] = LoraWeight(one.part.a, one.part.b, one.part.scale)
    table = ops.lora_table(weights) if any(weight is not None for weight in weights) else None
    special = [one for one in entries if one.rare is not None or one.dropout.rate > 0]
    return LinearSocket(name, module, table, special) if special else PlainSocket(table)
