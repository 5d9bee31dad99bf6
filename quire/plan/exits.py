"""Why wishes do not fit a machine, and what would: each way out is proven by running the planner on it.

Fact, causes with sizes, then exits from the one that costs the user least to the one that always works. This room changes
no wish by itself; it only says what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quire.config import AUTO, EngineConfig
from quire.plan.hardware import Hardware
from quire.plan.memory import DEFAULT_UTILIZATION, RUNTIME_BYTES, Plan, Wishes, find_plan, size_text

if TYPE_CHECKING:
    from quire.models.config import ModelConfig
    from quire.quant.sizes import WeightSizes

MOST_UTILIZATION = 0.97
SMALL_TOKENS, SMALL_SEQS = 128, 1
# Tenths of a GiB, so that the number shown is the number proven.
MEMORY_STEP = -(-(1 << 30) // 10)
PINS = ("num_gpu_blocks_override", "kv_cache_memory_bytes")


@dataclass(frozen=True)
class Exit:
    """One way out: options to change (None: not to be given any more), memory that must be free, and what that means."""

    options: dict[str, Any]
    remark: str
    memory_free: int | None = None

    def command(self) -> str:
        """The options as flags."""
        changed = [f"--{name.replace('_', '-')} {value}" for name, value in self.options.items() if value is not None]
        dropped = [f"without --{name.replace('_', '-')}" for name, value in self.options.items() if value is None]
        memory = [f"{size_text(self.memory_free)} of free memory"] if self.memory_free is not None else []
        return " ".join(memory + changed + dropped)


@dataclass(frozen=True)
class Misfit:
    """What does not fit and where the memory would go, with the exits, best first."""

    fact: str
    parts: dict[str, int]
    budget: int
    free: int
    exits: tuple[Exit, ...]

    def text(self) -> str:
        """The message of DoesNotFit."""
        commands = [way.command() for way in self.exits]
        width = max(map(len, commands))
        lines = [self.fact, "  " + " | ".join(f"{name} {size_text(size)}" for name, size in self.parts.items())]
        lines.append("Choose one (each was computed and fits):")
        for number, (command, way) in enumerate(zip(commands, self.exits, strict=True), 1):
            lines.append(f"  {number}  {command:<{width}}  {way.remark}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "fits": False,
            "fact": self.fact,
            "parts": self.parts,
            "memory_budget": self.budget,
            "memory_free": self.free,
            "exits": [
                {"command": way.command(), "options": way.options, "memory_free": way.memory_free, "remark": way.remark}
                for way in self.exits
            ],
        }


def diagnose(config: EngineConfig, model: ModelConfig, weights: int | WeightSizes, hardware: Hardware) -> Misfit:
    """The account of wishes for which `find_plan` gave None."""
    wishes = Wishes.of(config, model, weights, hardware)
    tokens, sequences = wishes.steps()[-1]
    length = wishes.length() or min(config.block_size, model.max_position_embeddings)
    stated = wishes.stated_blocks()
    needed_blocks = -(-length // config.block_size)
    too_small = stated is not None and stated < needed_blocks
    parts = {
        f"weights in {wishes.form}": wishes.weights,
        f"activations at {tokens} tokens and {sequences} sequences": wishes.step_bytes(tokens, sequences),
        "KV cache as stated" if stated is not None else f"KV cache for one request of {length} tokens": wishes.bytes_per_block
        * ((needed_blocks if stated is None else stated) + 1),
        "runtime": RUNTIME_BYTES,
    }
    if wishes.adapters:
        parts[f"{config.adapters_in_memory} adapters of rank {config.max_lora_rank}"] = wishes.adapters
    if wishes.jobs:
        parts[f"{config.training_jobs} training jobs of rank {config.max_lora_rank}"] = wishes.jobs
    if too_small:
        fact = (
            f"{config.model} does not fit: the KV cache as stated holds {stated * config.block_size} tokens, "
            f"one request may have {length}."
        )
    else:
        fact = (
            f"{config.model} does not fit: needs {size_text(sum(parts.values()))}, this machine can give "
            f"{size_text(wishes.budget)} ({wishes.budget / max(1, hardware.memory_free):.0%} of "
            f"{size_text(hardware.memory_free)} free)."
        )

    def attempt(**changes: Any) -> Plan | None:
        return find_plan(replace(config, **changes), model, weights, hardware)

    exits = [*_shorter(config, length, attempt), *_fp8_cache(config, wishes, length, attempt)]
    exits += _other_cache(config, wishes, needed_blocks, attempt)
    exits += [*_smaller_step(tokens, sequences, attempt), *_larger_share(config, wishes, attempt)]
    exits += [*_fewer_adapters(config, attempt), *_fewer_jobs(config, attempt)]
    exits += [*_other_dtype(wishes, attempt), *_quantized(wishes, attempt)]
    exits += _everything(config, attempt) if not exits else ()
    exits.append(_more_memory(config, too_small, model, weights, hardware))
    return Misfit(fact, parts, wishes.budget, hardware.memory_free, tuple(exits))


Attempt = Callable[..., Plan | None]


def _shorter(config: EngineConfig, length: int, attempt: Attempt) -> Iterator[Exit]:
    """The longest max_model_len that fits, in whole blocks."""
    longest = _longest(config, length, attempt)
    plan = attempt(max_model_len=longest) if longest else None
    if plan is not None:
        yield Exit({"max_model_len": longest}, f"instead of {length}; {plan.max_concurrency:.1f} requests of full length")


def _longest(config: EngineConfig, length: int, attempt: Attempt, **changes: Any) -> int:
    """The longest max_model_len below `length` that fits with those changes, 0 if there is none or none was asked for."""
    if config.max_model_len in (AUTO, -1):
        return 0
    size = config.block_size
    return size * _largest((length - 1) // size, lambda n: attempt(max_model_len=n * size, **changes) is not None)


def _fp8_cache(config: EngineConfig, wishes: Wishes, length: int, attempt: Attempt) -> Iterator[Exit]:
    """Keys and values of one byte per number: alone, or else with a longer sequence than without it."""
    if config.kv_cache_dtype != AUTO:
        return
    fp8 = {"kv_cache_dtype": "fp8"}
    if (plan := attempt(**fp8)) is not None:
        room, stated = wishes.room_for_cache(plan.max_num_batched_tokens, plan.max_num_seqs), wishes.stated_blocks()
        before = (room if stated is None else min(stated, room)) * config.block_size
        yield Exit(fp8, f"{plan.kv_tokens} tokens of KV cache where {wishes.dtype} has room for {before}")
        return
    longest = _longest(config, length, attempt, **fp8)
    gain = longest - _longest(config, length, attempt) if longest else 0
    if gain > 0:
        yield Exit({**fp8, "max_model_len": longest}, f"instead of {length}; {gain} more than in {wishes.dtype}")


def _other_cache(config: EngineConfig, wishes: Wishes, needed_blocks: int, attempt: Attempt) -> Iterator[Exit]:
    """Where the cache's size is stated: one that holds a request and that the memory holds."""
    blocks = wishes.room_for_cache(*wishes.steps()[-1])
    remark = "all that the free memory holds"
    if (wishes.stated_blocks() or 0) < needed_blocks:
        blocks, remark = needed_blocks, "one request of full length"
    for name, value in zip(PINS, (blocks, (blocks + 1) * wishes.bytes_per_block), strict=True):
        if getattr(config, name) is None or blocks < 1:
            continue
        if (plan := attempt(**{name: value})) is not None:
            yield Exit({name: value}, f"{plan.kv_tokens} tokens of KV cache, {remark}")
        return  # the first wins over the second


def _smaller_step(tokens: int, sequences: int, attempt: Attempt) -> Iterator[Exit]:
    """The largest step below the present one that fits, by tokens alone and by sequences alone."""
    for name, present, least, cost in (
        ("max_num_batched_tokens", tokens, SMALL_TOKENS, "long prompts are read in shorter chunks"),
        ("max_num_seqs", sequences, SMALL_SEQS, "fewer sequences at once"),
    ):
        value = 1 << max(0, present - 1).bit_length()
        while value > least:
            value //= 2
            if value < present and (plan := attempt(**{name: value})) is not None:
                yield Exit({name: value}, f"instead of {present}; {cost}; {plan.kv_tokens} tokens of KV cache")
                break


def _fewer_adapters(config: EngineConfig, attempt: Attempt) -> Iterator[Exit]:
    """The largest number of adapters in memory that fits."""
    kept, least = config.adapters_in_memory, config.max_loras
    most = _largest(kept - least, lambda n: attempt(max_cpu_loras=least + n - 1) is not None) if kept > least else 0
    if most:
        number = least + most - 1
        yield Exit({"max_cpu_loras": number}, f"instead of {kept}; others are read again when they are needed")


def _fewer_jobs(config: EngineConfig, attempt: Attempt) -> Iterator[Exit]:
    """The largest number of training jobs that find room."""
    for number in reversed(range(config.training_jobs)):
        if attempt(training_jobs=number) is not None:
            yield Exit({"training_jobs": number}, f"instead of {config.training_jobs}; further jobs wait for memory")
            return


def _larger_share(config: EngineConfig, wishes: Wishes, attempt: Attempt) -> Iterator[Exit]:
    if wishes.pinned:
        return
    share = config.gpu_memory_utilization or wishes.preset.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    for percent in range(int(share * 100) + 1, int(MOST_UTILIZATION * 100) + 1):
        if attempt(gpu_memory_utilization=percent / 100) is not None:
            yield Exit({"gpu_memory_utilization": percent / 100}, f"instead of {share:g}; less is left to other programs")
            return


def _other_dtype(wishes: Wishes, attempt: Attempt) -> Iterator[Exit]:
    if wishes.dtype == "float32" and attempt(dtype="bfloat16") is not None:
        yield Exit({"dtype": "bfloat16"}, "halves weights and KV cache; answers may differ in the last digits")


def _quantized(wishes: Wishes, attempt: Attempt) -> Iterator[Exit]:
    """The form that costs least quality among those that fit; only where the sizes of such weights are known."""
    for kind, remark in (("int8", "halves the weights of bfloat16"), ("int4", "a quarter of them; answers differ more")):
        if wishes.form == wishes.dtype and kind in wishes.sizes.at_load and attempt(quantization=kind) is not None:
            yield Exit({"quantization": kind}, remark)
            return


def _everything(config: EngineConfig, attempt: Attempt) -> Iterator[Exit]:
    """Where no single change is enough: the smallest step and the longest sequence that then fits, in bfloat16 if need be."""
    small = {"max_num_batched_tokens": SMALL_TOKENS, "max_num_seqs": SMALL_SEQS, **_unpinned(config)}
    for extra in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "gpu_memory_utilization": MOST_UTILIZATION}):
        plan = attempt(**small, **extra, max_model_len=AUTO)
        if plan is not None:
            yield Exit({"max_model_len": plan.max_model_len, **small, **extra}, "one sequence at a time")
            return


def _more_memory(
    config: EngineConfig, too_small: bool, model: ModelConfig, weights: int | WeightSizes, hardware: Hardware
) -> Exit:
    """How much must be free for the wishes as they stand; a cache stated too small for one request must go in any case."""
    options = _unpinned(config) if too_small else {}
    config = replace(config, **options)

    def fits(steps: int) -> bool:
        return find_plan(config, model, weights, replace(hardware, memory_free=steps * MEMORY_STEP)) is not None

    most = 1
    while not fits(most):
        most *= 2
    enough = (most - _largest(most - 1, lambda n: fits(most - n))) * MEMORY_STEP
    remark = f"this machine has {size_text(hardware.memory_total)}"
    if enough <= hardware.memory_total:
        remark += f", of which other programs hold {size_text(hardware.memory_total - hardware.memory_free)}"
    return Exit(options, remark, memory_free=enough)


def _unpinned(config: EngineConfig) -> dict[str, Any]:
    return {name: None for name in PINS if getattr(config, name) is not None}


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [0, most] that fits, if fitting is monotone and 0 is taken to fit."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
