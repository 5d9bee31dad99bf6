"""Forward and backward through the model layer by layer, for rows of one run or of several: the inner part of training.

Every layer's input is cut off from the graph below it, so that a layer's gradients are made, and its activations freed,
before the next one's; between two layers a caller may do something else (serve). What a run wants of its rows is in its
`Share`: this file knows no data, no optimizer and no file. Letters: T tokens, R labelled rows, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quire import ops
from quire.batch import Batch, packed
from quire.models.decoder import CausalLM, LayerStep
from quire.train.examples import Example
from quire.train.loss import chunks, logits_of, score_chunks

# Parts of the model that are no layer: below the first, above the last.
BEGIN, FINISH, HEAD = "begin", "finish", "head"
Place = int | str


@dataclass
class Share:
    """What one run has in a packed batch.

    weigh: losses of its labelled rows [R] -> by how much each row's loss counts [R]; None: only score, go not back.
    trained: (tensor, where its gradient is added) by the part of the model that it belongs to. dropped: the context in
    which a layer is computed (dropout). losses, right: of its labelled rows, filled in by the pass.
    """

    sequences: Sequence[Example]
    slot: int
    weigh: Callable[[Tensor], Tensor] | None = None
    trained: dict[Place, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    dropped: Callable[[], AbstractContextManager[None]] | None = None
    losses: Tensor | None = None
    right: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(len(sequence.tokens) for sequence in self.sequences)

    def labelled(self) -> list[int]:
        """Labelled rows of each of its sequences."""
        return [sequence.supervised for sequence in self.sequences]

    def weights(self) -> Tensor:
        """The examples' own weights of its labelled rows [R]."""
        return torch.tensor([weight for sequence in self.sequences for weight in sequence.weights[1:] if weight > 0])


@dataclass(frozen=True)
class Labels:
    """The rows whose next token counts, in order; sizes: how many of them each share has."""

    rows: Tensor
    targets: Tensor
    sizes: list[int]


def lay_out(shares: Sequence[Share]) -> tuple[Batch, Labels]:
    """The shares end to end."""
    sequences = [sequence for share in shares for sequence in share.sequences]
    batch = packed([sequence.tokens for sequence in sequences])
    counts = [share.tokens for share in shares]
    slots = torch.tensor([share.slot for share in shares], dtype=torch.int32)
    batch = replace(batch, adapters=slots.repeat_interleave(torch.tensor(counts)))
    counted = torch.tensor([w > 0 for sequence in sequences for w in (*sequence.weights[1:], 0.0)], dtype=torch.bool)
    rows = counted.nonzero()[:, 0]
    sizes = [sum(share.labelled()) for share in shares]
    return batch, Labels(rows, batch.tokens[rows + 1], sizes)


def score(model: CausalLM, shares: Sequence[Share]) -> Iterator[None]:
    """Forward only: fills in `losses` and `right`. Yields after each layer and each chunk of the head."""
    batch, labels = lay_out(shares)
    with torch.no_grad():
        x, layers = model.body.begin(batch)
    for layer in layers:
        with torch.no_grad():
            x = layer(x)
        yield
    adapters = _at(batch.adapters, labels.rows)
    with torch.no_grad():
        hidden = model.body.finish(x[labels.rows], replace(batch, adapters=adapters))
    for found in score_chunks(model, hidden, labels.targets, adapters, gradient=False):
        if found is None:
            yield
        else:
            _fill_in(shares, labels, found.losses, found.right)


def learn(model: CausalLM, shares: Sequence[Share], recomputed: int = 0) -> Iterator[None]:
    """Forward and back: fills in the same, and adds to the gradients of `trained`. Yields likewise.

    recomputed: so many of the layers, the lowest ones, are computed a second time instead of keeping their activations.
    """
    batch, labels = lay_out(shares)
    count = model.config.num_layers
    lowest = min((place for share in shares for place in share.trained if isinstance(place, int)), default=count)
    lowest = 0 if any(BEGIN in share.trained for share in shares) else lowest
    with torch.set_grad_enabled(any(BEGIN in share.trained for share in shares)):
        begun, layers = model.body.begin(batch)
    tape = _Tape(shares, layers, lowest, lowest + recomputed, batch)
    x = begun.detach()
    for index in range(count):
        x = tape.forward(index, x, needs_input=index > lowest or begun.requires_grad)
        yield
    gradient = None
    for found in _head(model, shares, batch, labels, x):
        gradient = found
        yield
    del x
    assert gradient is not None
    for index in reversed(range(lowest, count)):
        gradient = tape.backward(index, gradient)
        yield
    if begun.requires_grad:
        _add(begun, gradient, _trained(shares, BEGIN))


class _Tape:
    """What the layers' forward passes left for their backward passes."""

    def __init__(self, shares: Sequence[Share], layers: Sequence[LayerStep], lowest: int, keep_from: int, batch: Batch) -> None:
        self.shares, self.layers, self.lowest, self.keep_from, self.batch = shares, layers, lowest, keep_from, batch
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def forward(self, index: int, x: Tensor, *, needs_input: bool) -> Tensor:
        if index < self.keep_from:
            with torch.no_grad():
                out = self._run(index, x)
            if index >= self.lowest:
                self.inputs[index] = x.requires_grad_(needs_input)
            return out
        self.inputs[index] = x = x.detach().requires_grad_(needs_input)
        with torch.enable_grad():
            out = self._run(index, x)
        self.outputs[index] = out
        return out.detach()

    def backward(self, index: int, gradient: Tensor) -> Tensor:
        """From the gradient of a layer's output to that of its input (where that is wanted)."""
        x, out = self.inputs.pop(index), self.outputs.pop(index, None)
        if out is None:
            with torch.enable_grad():
                out = self._run(index, x)
        return _add(out, gradient, _trained(self.shares, index), x)

    def _run(self, index: int, x: Tensor) -> Tensor:
        dropping = [share for share in self.shares if share.dropped is not None]
        with ExitStack() as stack:
            for share in dropping:
                stack.enter_context(share.dropped())
            return self.layers[index](x)


def _head(model: CausalLM, shares: Sequence[Share], batch: Batch, labels: Labels, x: Tensor) -> Iterator[Tensor | None]:
    """The loss, and last the gradient of x [T, E]."""
    adapters = _at(batch.adapters, labels.rows)
    rows = x[labels.rows].requires_grad_()
    with torch.enable_grad():
        finished = model.body.finish(rows, replace(batch, adapters=adapters))
    in_head = _trained(shares, HEAD)
    scoring = score_chunks(model, finished.detach(), labels.targets, adapters, gradient=not in_head)
    while (found := next(scoring)) is None:
        yield None
    _fill_in(shares, labels, found.losses, found.right)
    factors = torch.cat([share.weigh(share.losses) for share in shares if share.weigh is not None])
    if in_head:  # the weights of rows are known only now, and the head's own gradients are sums over rows
        parts = []
        for piece in chunks(model, len(rows)):
            of_piece = finished.detach()[piece], labels.targets[piece], adapters[piece], factors[piece]
            parts.append(_head_again(model, *of_piece, in_head))
            yield None
        found.gradient = torch.cat(parts)
    else:
        found.gradient = (found.gradient.float() * factors[:, None]).to(x.dtype)
    gradient = torch.zeros_like(x)
    gradient[labels.rows] = _add(finished, found.gradient, _trained(shares, FINISH), rows)
    yield gradient


def _head_again(
    model: CausalLM, hidden: Tensor, targets: Tensor, adapters: Tensor, factors: Tensor, trained: list[tuple[Tensor, Tensor]]
) -> Tensor:
    rows = hidden.requires_grad_()
    with torch.enable_grad():
        logits, _ = logits_of(model, rows, adapters)
    slope = torch.empty_like(logits, requires_grad=False)
    ops.cross_entropy(logits.detach(), targets, slope)
    return _add(logits, slope.mul_(factors[:, None]), trained, rows)


def _add(out: Tensor, gradient: Tensor | None, trained: list[tuple[Tensor, Tensor]], x: Tensor | None = None) -> Tensor:
    """Back from `out`: adds to the gradients of `trained`, gives that of x (or `gradient`, if x wants none)."""
    wanted = [tensor for tensor, _ in trained]
    with_x = x is not None and x.requires_grad
    if not wanted and not with_x:
        return gradient
    found = torch.autograd.grad(out, [*wanted, x] if with_x else wanted, gradient, allow_unused=True)
    for (_, total), own in zip(trained, found, strict=False):
        if own is not None:
            total.add_(own)
    if not with_x:
        return gradient
    return torch.zeros_like(x) if found[-1] is None else found[-1]


def _trained(shares: Sequence[Share], place: Place) -> list[tuple[Tensor, Tensor]]:
    return [pair for share in shares for pair in share.trained.get(place, ())]


def _fill_in(shares: Sequence[Share], labels: Labels, losses: Tensor, right: Tensor) -> None:
    for share, own, well in zip(shares, losses.split(labels.sizes), right.split(labels.sizes), strict=True):
        share.losses, share.right = own, well


def _at(adapters: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if adapters is None else adapters[rows]


def places(model: CausalLM, modules: Sequence[str]) -> dict[str, Place]:
    """Which part of the model each of these modules belongs to."""
    count = model.config.num_layers
    stack = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    table = next(name for name, module in model.named_modules() if module is model.table)
    above = {name for name, module in model.body.named_children() if name not in stack}
    found: dict[str, Place] = {}
    for name in modules:
        if name.startswith(f"{stack}."):
            found[name] = int(name[len(stack) + 1 :].split(".")[0])
        elif name == "lm_head":
            found[name] = HEAD
        else:
            leaf = name.rpartition(".")[2]
            assert leaf in above or name == table, name
            found[name] = FINISH if leaf in ("norm", "ln_f", "final_layer_norm", "project_out") else BEGIN
    return found
