"""Several adapters as one: weighted sums of what they add, in the ways of PEFT's `add_weighted_adapter`.

    cat                 A's and B's beside each other: exactly the weighted sum, of the ranks' sum
    svd                 the nearest to that sum of a given rank (Eckart & Young 1936)
    linear              weighted sums of the A's and of the B's: cheap and rough, since each A then meets every B
    ties                as linear, after the smallest numbers and those of the lesser sign are dropped (Yadav et al. 2023)
    dare_linear, dare   as linear, after random numbers are dropped and the others enlarged (Yu et al. 2024); dare_ties: both
    magnitude_prune     as linear, after the smallest numbers are dropped
    *_svd               the same done to the products B A, brought to a rank by svd

Knows no model and no file. Letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.errors import AdapterError, ConfigError, did_you_mean
from quire.log import logger
from quire.lora.config import LoraConfig
from quire.lora.new import generator
from quire.lora.parts import Adapter, ModulePart

log = logger(__name__)

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_PRODUCTS = tuple(f"{kind}_svd" for kind in ON_FACTORS[1:])
KINDS = ("cat", "svd", *ON_FACTORS, *ON_PRODUCTS)
OTHER_NAMES = {"dare": "dare_linear", "dare_svd": "dare_linear_svd"}
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How. rank: of the result, for svd and *_svd (None: the largest of the adapters'). density: the share of numbers that is
    kept, for the kinds that drop some. sign: by what ties tells the lesser sign. seed: of what falls out at random."""

    kind: str = "cat"
    rank: int | None = None
    density: float | None = None
    sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", OTHER_NAMES.get(self.kind, self.kind))
        if self.kind not in KINDS:
            raise ConfigError(f"combination is {self.kind!r}.{did_you_mean(self.kind, KINDS)} There are {', '.join(KINDS)}.")
        if self.rank is not None and not (self.kind.endswith("svd") and self.rank >= 1):
            raise ConfigError(f"rank must be at least 1 and is for svd and *_svd only, got {self.rank} for {self.kind}.")
        drops = self.kind not in ("cat", "svd", "linear")
        if drops and (self.density is None or not 0 < self.density <= 1):
            raise ConfigError(f"density must be above 0 and at most 1 for {self.kind} (0.5, say), got {self.density}.")
        if not drops and self.density is not None:
            raise ConfigError(f"density is for the kinds that drop numbers; {self.kind} keeps all, got {self.density}.")
        if self.sign not in SIGNS:
            raise ConfigError(f"sign must be total or frequency, got {self.sign!r}.")

    @property
    def plain(self) -> str:
        """The kind without where it is done."""
        return self.kind.removesuffix("_svd")


def combine(adapters: Sequence[Adapter], weights: Sequence[float] | None = None, how: Combination | None = None) -> Adapter:
    """One adapter that does what the weighted `adapters` do together. weights: 1 for each where None.

    A module that only some of them have takes part with those. Raises ConfigError, and AdapterError naming what cannot be
    combined: DoRA, and all but A and B where two adapters have it.
    """
    how = Combination() if how is None else how
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters:
        raise ConfigError("adapters must be at least one, got none.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights must be one finite number for each of {len(adapters)} adapters, got {weights}.")
    pairs = list(zip(adapters, weights, strict=True))
    parts: dict[str, ModulePart] = {}
    for name in sorted({name for adapter in adapters for name in adapter.parts}):
        owned = [(adapter.parts[name], weight) for adapter, weight in pairs if name in adapter.parts]
        parts[name] = _combined(name, owned, how)
    template = _common([adapter.chat_template for adapter in adapters], "chat templates")
    return Adapter(
        _config(adapters, parts),
        parts,
        _common([adapter.base_digest for adapter in adapters], "bases"),
        template,
        next((one.special_tokens for one in adapters if one.chat_template == template), {}),
        {name: written for adapter in adapters for name, written in adapter.written_as.items()},
    )


def _combined(name: str, owned: Sequence[tuple[ModulePart, float]], how: Combination) -> ModulePart:
    _refuse(name, owned, how)
    kept = owned[0][0]
    products = [(part, weight) for part, weight in owned if part.a is not None]
    if not products:
        return kept
    a, b = _factors(name, products, how)
    offsets = [weight * part.scale * part.b_bias for part, weight in products if part.b_bias is not None]
    offset = torch.stack(offsets).sum(0) if offsets else None
    return replace(kept, a=a.contiguous(), b=b.t().contiguous(), scale=1.0, b_bias=offset)


def _refuse(name: str, owned: Sequence[tuple[ModulePart, float]], how: Combination) -> None:
    advice = "merge one into the base first (quire merge MODEL ADAPTER) and train or add the other on that"
    for part, weight in owned:
        if part.magnitude is not None:
            raise AdapterError(f"{name} has DoRA's magnitudes, which have no weighted sum: {advice}.", parameter="use_dora")
        if part.b_bias is not None and how.kind not in ("cat", "svd"):
            message = f"{name} has a lora_bias, which {how.kind} does not know: use cat or svd."
            raise AdapterError(message, parameter="lora_bias")
        alone = [field for field in ("weight", "bias", "tokens") if getattr(part, field) is not None]
        if alone and (len(owned) > 1 or weight != 1):
            raise AdapterError(
                f"{name} has values in place of the base's ({alone[0]}), of which there is no weighted sum: {advice}, or give "
                "that adapter the weight 1 where no other has this module."
            )


def _factors(name: str, owned: Sequence[tuple[ModulePart, float]], how: Combination) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the result."""
    parts = [(part.a.detach().float(), part.b.detach().float().t().contiguous()) for part, _ in owned]
    sizes = [(weight, part.scale) for part, weight in owned]
    ranks = {a.shape[0] for a, _ in parts}
    if how.kind == "cat":
        scaled = [a * weight * scale for (a, _), (weight, scale) in zip(parts, sizes, strict=True)]
        return torch.cat(scaled), torch.cat([b for _, b in parts], dim=1)
    source = generator(how.seed, name)
    if how.kind in ON_FACTORS:
        if len(ranks) > 1:
            raise AdapterError(
                f"{name} has ranks {sorted(ranks)}; {how.kind} needs the same in all adapters: use cat, or svd with a rank.",
                parameter="r",
            )
        # The square root goes to each side, the sign to one.
        totals = [weight * scale for weight, scale in sizes]
        sides = [math.sqrt(abs(total)) for total in totals]
        signed = [math.copysign(side, total) for side, total in zip(sides, totals, strict=True)]
        a = _sum([a for a, _ in parts], signed, how, source)
        return a, _sum([b for _, b in parts], sides, how, source)
    rank = how.rank or max(ranks)
    if how.kind == "svd":
        weighted = [a * (weight * scale) for (a, _), (weight, scale) in zip(parts, sizes, strict=True)]
        return _nearest_of_factors(torch.cat(weighted), torch.cat([b for _, b in parts], dim=1), rank)
    updates = [b @ a * scale for (a, b), (_, scale) in zip(parts, sizes, strict=True)]
    return _nearest(_sum(updates, [weight for weight, _ in sizes], how, source), rank)


def _sum(tensors: Sequence[Tensor], weights: Sequence[float], how: Combination, source: torch.Generator) -> Tensor:
    """The weighted sum of tensors of one shape, after what the kind drops."""
    factors = torch.tensor(weights, dtype=torch.float32).view(-1, *[1] * tensors[0].dim())
    if how.density is not None and how.density < 1:
        thin = _largest if how.plain in ("ties", "magnitude_prune") else _random
        tensors = [thin(tensor, how.density, source) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    if how.plain not in ("ties", "dare_ties"):
        return (stacked * factors).sum(0)
    votes = stacked if how.sign == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (stacked * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float, source: torch.Generator) -> Tensor:
    """That share of the numbers, the largest by absolute value; the others 0."""
    kept = torch.zeros(tensor.numel())
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view(tensor.shape)


def _random(tensor: Tensor, density: float, source: torch.Generator) -> Tensor:
    """Each number with that probability, enlarged so that the mean stays; the others 0."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=source) / density


def _nearest(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] whose product is the nearest to update [O, I] of all of that rank."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def _nearest_of_factors(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for b @ a, without ever making it: its singular values are those of the product of two small triangles."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    a_small, b_small = _nearest(upper @ lower.t(), rank)
    return a_small @ right.t(), left @ b_small


def _config(adapters: Sequence[Adapter], parts: dict[str, ModulePart]) -> LoraConfig:
    """What adapter_config.json says of the result: every scale is 1."""
    ranks = {name: part.rank for name, part in parts.items() if part.a is not None}
    rank = max(ranks.values(), default=1)
    smaller = {re.escape(name): own for name, own in ranks.items() if own != rank}
    saved = {name for adapter in adapters for name in adapter.config.modules_to_save or ()}
    tokens = next((one.config.trainable_token_indices for one in adapters if one.config.trainable_token_indices), None)
    return replace(
        adapters[0].config,
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        use_rslora=False,
        target_modules=tuple(ranks),
        target_parameters=None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        lora_bias=any(part.b_bias is not None for part in parts.values()),
        bias=next((one.config.bias for one in adapters if one.config.bias != "none"), "none"),
        modules_to_save=tuple(sorted(saved)) or None,
        trainable_token_indices=tokens,
    )


def _common(values: Sequence[str | None], what: str) -> str | None:
    """The first that is known; where others differ, the log says so."""
    known = list(dict.fromkeys(value for value in values if value is not None))
    if len(known) > 1:
        log.warning("the adapters have different %s; the first one's counts", what)
    return known[0] if known else None
