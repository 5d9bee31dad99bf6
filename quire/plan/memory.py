"""Wishes + model headers + machine -> a frozen Plan: how many KV blocks, how long a sequence, how many at once.

Everything is arithmetic on headers, done before a byte of weights is read. A wish that the user stated is kept or refused;
one that nobody stated (or that only a preset states) is lowered, within bounds, until the rest fits. So more memory or a
lower limit never makes a plan fail that fitted before. This room knows no torch and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire import envs
from quire.config import AUTO, EngineConfig
from quire.errors import ConfigError, DoesNotFit
from quire.plan.activations import activation_bytes
from quire.plan.adapters import adapter_bytes
from quire.plan.hardware import Hardware
from quire.plan.training import PIECE_TOKENS, TrainingBytes, training_bytes
from quire.presets import deployment_of
from quire.quant.scheme import scheme_of
from quire.quant.sizes import Sizes, WeightSizes

if TYPE_CHECKING:
    from quire.models.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_ITEM_BYTES = {**ITEM_BYTES, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}
_SPELLINGS = {"float": "float32", "half": "float16"}
# What the interpreter, torch and the server hold themselves: 160 MiB measured, rounded up.
RUNTIME_BYTES = 192 << 20
DEFAULT_UTILIZATION = 0.9
# A value that nobody stated may be halved this far so that the rest fits; below, a flag must ask for it.
DEFAULT_SEQS, LEAST_SEQS = 256, 16
DEFAULT_TOKENS, LEAST_TOKENS = 2048, 512
LEAST_PRESET_SEQS, LEAST_PRESET_TOKENS = 1, 128


@dataclass(frozen=True)
class Plan:
    """What the engine obeys. num_blocks: usable KV blocks; the null block is extra and counted in kv_bytes.

    reasons: where each value came from: flag | preset | model | plan | default, sometimes with a remark after it.
    """

    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    threads: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    adapter_bytes: int
    training_bytes: int
    kv_bytes: int
    bytes_per_block: int
    memory_free: int
    memory_budget: int
    device: str
    reasons: Mapping[str, str]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def max_concurrency(self) -> float:
        """Sequences of full length that the KV cache holds at once."""
        return self.num_blocks / _ceil(self.max_model_len, self.block_size)

    @property
    def needed_bytes(self) -> int:
        """Everything that the engine will hold."""
        return self.serving_bytes + self.training_bytes

    @property
    def serving_bytes(self) -> int:
        """The same without the room that is left for training."""
        return self.weight_bytes + self.runtime_bytes + self.adapter_bytes + self.activation_bytes + self.kv_bytes

    def sequences_that_fit(self, tokens: int) -> int:
        """Sequences of `tokens` tokens each that run without preemption, at most max_num_seqs."""
        return min(self.max_num_seqs, self.num_blocks // _ceil(max(1, tokens), self.block_size))

    def describe(self) -> list[str]:
        """Lines for the start log and for `quire plan`."""

        def value(name: str, shown: str | None = None) -> str:
            return f"{name} {shown or getattr(self, name)} ({self.reasons.get(name, 'plan')})"

        limits = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "threads")
        left = self.memory_budget - self.needed_bytes
        return [
            ", ".join(value(name) for name in limits),
            f"Memory: {size_text(self.needed_bytes)} of {size_text(self.memory_budget)} "
            f"({self.memory_budget / max(1, self.memory_free):.0%} of {size_text(self.memory_free)} free): "
            f"weights {size_text(self.weight_bytes)} | "
            f"activations at {self.max_num_batched_tokens} tokens {size_text(self.activation_bytes)} | "
            f"runtime {size_text(self.runtime_bytes)} | "
            + (f"adapters {size_text(self.adapter_bytes)} | " if self.adapter_bytes else "")
            + (f"training {size_text(self.training_bytes)} | " if self.training_bytes else "")
            + f"KV cache {size_text(self.kv_bytes)} | unused {size_text(left)}",
            f"KV cache size: {self.kv_tokens:,} tokens ({self.num_blocks:,} blocks of {self.block_size}, "
            f"{size_text(self.bytes_per_block // self.block_size)} per token as {self.kv_cache_dtype})",
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {self.max_concurrency:.2f}x",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "reasons"},
            "kv_tokens": self.kv_tokens,
            "max_concurrency": round(self.max_concurrency, 2),
            "needed_bytes": self.needed_bytes,
            "reasons": dict(self.reasons),
        }


def make_plan(config: EngineConfig, model: ModelConfig, weights: int | WeightSizes, hardware: Hardware) -> Plan:
    """The plan for these wishes; `weights` are the checkpoint's sizes, or just their bytes where all are dense (model.dtype).

    Raises DoesNotFit with sized ways out, ConfigError for a wish that this model cannot grant on any machine.
    """
    plan = find_plan(config, model, weights, hardware)
    if plan is None:
        from quire.plan.exits import diagnose  # it calls find_plan to prove each way out

        raise DoesNotFit(diagnose(config, model, weights, hardware).text())
    return plan


def find_plan(config: EngineConfig, model: ModelConfig, weights: int | WeightSizes, hardware: Hardware) -> Plan | None:
    """As `make_plan`, but None if it does not fit."""
    wishes = Wishes.of(config, model, weights, hardware)
    length = wishes.length()
    if length is None:
        return None
    fitting = None
    for tokens, sequences in wishes.steps():
        plan = wishes.plan_for(length, tokens, sequences)
        if plan is None:
            continue
        fitting = plan
        # Enough: the cache has the size asked for, or all that can be used, or at least as much as a step needs beside it.
        useful = plan.max_num_seqs * _ceil(length, plan.block_size)
        if wishes.pinned or plan.num_blocks >= useful or plan.kv_bytes >= plan.activation_bytes:
            break
    return fitting


@dataclass(frozen=True)
class Wishes:
    """Configuration, preset and model laid together, before anything is lowered. Ladders: values to try, largest first.

    weights: bytes in memory. form: the type of most of them. adapters: bytes of all that are kept in memory.
    training: of each job that is to find room.
    """

    config: EngineConfig
    model: ModelConfig
    hardware: Hardware
    preset: Mapping[str, Any]
    dtype: str
    kv_cache_dtype: str
    weights: int
    form: str
    sizes: WeightSizes
    bytes_per_block: int
    budget: int
    seq_ladder: tuple[int, ...]
    token_ladder: tuple[int, ...]
    adapters: int
    training: TrainingBytes

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, weights: int | WeightSizes, hardware: Hardware) -> Wishes:
        preset = deployment_of(config.preset) if config.preset else {}
        dtype = plan_dtype(config.dtype, model.dtype, hardware.device)
        if isinstance(weights, int):
            weights = WeightSizes(Sizes(weights // ITEM_BYTES.get(model.dtype, ITEM_BYTES[dtype])))
        scheme = scheme_of(model.raw, config.quantization)
        kv_cache_dtype = plan_kv_dtype(config.kv_cache_dtype, dtype)
        per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * KV_ITEM_BYTES[kv_cache_dtype]
        share = config.gpu_memory_utilization or preset.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
        seqs = _ladder(config.max_num_seqs, preset.get("max_num_seqs"), DEFAULT_SEQS, LEAST_SEQS, LEAST_PRESET_SEQS)
        tokens = _ladder(
            config.max_num_batched_tokens,
            preset.get("max_num_batched_tokens"),
            DEFAULT_TOKENS,
            LEAST_TOKENS,
            LEAST_PRESET_TOKENS,
        )
        return cls(
            config=config,
            model=model,
            hardware=hardware,
            preset=preset,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            weights=weights.of(scheme).bytes_as(ITEM_BYTES[dtype]),
            form=scheme.form.kind if scheme is not None else dtype,
            sizes=weights,
            bytes_per_block=per_token * config.block_size,
            # An exact cache size is a wish for those bytes, not for a share of the memory; it must still exist.
            budget=hardware.memory_free if _is_pinned(config) else int(share * hardware.memory_free),
            seq_ladder=seqs,
            token_ladder=tokens,
            adapters=config.adapters_in_memory * adapter_bytes(model, config.max_lora_rank),
            training=training_bytes(model, ITEM_BYTES[dtype], config.max_lora_rank, PIECE_TOKENS),
        )

    @property
    def pinned(self) -> bool:
        """The cache's size is stated exactly."""
        return _is_pinned(self.config)

    @property
    def jobs(self) -> int:
        """Bytes of all jobs that are to find room. They share the pieces, so that there is one of those."""
        count = self.config.training_jobs
        return count * self.training.adapter + self.training.activations + self.training.head if count else 0

    def steps(self) -> list[tuple[int, int]]:
        """(tokens, sequences) of a step, in the order in which to try them: shorter chunks first, then fewer sequences."""
        pairs = [(t, min(s, t)) for s in self.seq_ladder for t in self.token_ladder]
        return list(dict.fromkeys(pairs))

    def length(self) -> int | None:
        """max_model_len: as stated, or the largest that fits, or the model's; None if not even one block fits."""
        most = self.model.max_position_embeddings
        stated = self.config.max_model_len
        if stated not in (None, AUTO, -1):
            if int(stated) > most:
                raise ConfigError(
                    f"max_model_len must be at most {most} (the model's max_position_embeddings), got {stated}. "
                    f"Use --max-model-len {most} or auto."
                )
            return int(stated)
        if stated is None and "max_model_len" not in self.preset:
            return most
        wish = most if stated is not None else min(most, self.preset["max_model_len"])
        largest = self._room(*self.steps()[-1]) * self.config.block_size
        return min(wish, largest) if largest > 0 else None

    def plan_for(self, length: int, tokens: int, sequences: int) -> Plan | None:
        """The plan with exactly these limits, or None if it does not fit."""
        config = self.config
        needed = _ceil(length, config.block_size)
        room = self._room(tokens, sequences)
        if room < needed:
            return None
        blocks = room if self.pinned else min(room, sequences * needed)
        return Plan(
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=tokens,
            block_size=config.block_size,
            num_blocks=blocks,
            threads=config.threads or envs.threads() or self.hardware.cores,
            weight_bytes=self.weights,
            activation_bytes=self.step_bytes(tokens, sequences),
            runtime_bytes=RUNTIME_BYTES,
            adapter_bytes=self.adapters,
            training_bytes=self.jobs,
            kv_bytes=(blocks + 1) * self.bytes_per_block,
            bytes_per_block=self.bytes_per_block,
            memory_free=self.hardware.memory_free,
            memory_budget=self.budget,
            device=self.hardware.device,
            reasons=self._reasons(length, tokens, sequences),
        )

    def room_for_cache(self, tokens: int, sequences: int) -> int:
        """Usable KV blocks that the budget leaves beside everything else; 0 if there are none."""
        room = self.budget - self.weights - RUNTIME_BYTES - self.adapters - self.jobs - self.step_bytes(tokens, sequences)
        return max(0, room // self.bytes_per_block - 1)

    def step_bytes(self, tokens: int, sequences: int) -> int:
        """What a step of that size needs beside weights and cache."""
        return activation_bytes(self.model, ITEM_BYTES[self.dtype], tokens, sequences)

    def stated_blocks(self) -> int | None:
        """Usable KV blocks of a cache whose size is stated exactly, None if it is not."""
        if self.config.num_gpu_blocks_override is not None:
            return self.config.num_gpu_blocks_override
        if self.config.kv_cache_memory_bytes is not None:
            return max(0, self.config.kv_cache_memory_bytes // self.bytes_per_block - 1)
        return None

    def _room(self, tokens: int, sequences: int) -> int:
        """Usable KV blocks; an exact wish is granted in full or not at all."""
        room, stated = self.room_for_cache(tokens, sequences), self.stated_blocks()
        if stated is None:
            return room
        return stated if stated <= room else 0

    def _reasons(self, length: int, tokens: int, sequences: int) -> dict[str, str]:
        config = self.config
        most = self.model.max_position_embeddings
        reasons = {
            "dtype": "flag" if config.dtype != AUTO else "model" if self.dtype == self.model.dtype else "plan",
            "max_num_batched_tokens": self._reason("max_num_batched_tokens", tokens, DEFAULT_TOKENS),
            "max_num_seqs": self._reason("max_num_seqs", sequences, DEFAULT_SEQS),
            "gpu_memory_utilization": self._reason("gpu_memory_utilization", None, None),
            "block_size": "default" if config.block_size == EngineConfig.block_size else "flag",
            "threads": "flag" if config.threads else "OMP_NUM_THREADS" if envs.threads() else "plan",
            "num_blocks": "plan",
        }
        if config.max_model_len is None and "max_model_len" not in self.preset:
            reasons["max_model_len"] = "model"
        elif config.max_model_len in (AUTO, -1):
            reasons["max_model_len"] = "model" if length == most else "plan, the largest that fits"
        else:
            reasons["max_model_len"] = self._reason("max_model_len", min(length, most), None)
        for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override"):
            if getattr(config, name) is not None:
                reasons["num_blocks"] = "flag"
                reasons["gpu_memory_utilization"] += f", overridden by {name}"
        return reasons

    def _reason(self, name: str, used: int | None, default: int | None) -> str:
        flag = getattr(self.config, name)
        source, wish = ("flag", flag) if flag is not None else ("preset", self.preset.get(name))
        if wish is None:
            source, wish = "default", default
        if used is None or used == wish:
            return source
        if name == "max_model_len" and used == self.model.max_position_embeddings:
            return f"model, {source} {wish}"
        if name == "max_num_seqs" and used < wish and used in self.token_ladder and source == "flag":
            return f"plan, {source} {wish} cut to max_num_batched_tokens"
        return f"plan, lowered from {source} {wish}"


def plan_dtype(wish: str, stored: str, device: str) -> str:
    """The type to compute in. auto keeps the checkpoint's; float16 becomes bfloat16 on CPU, which has no fast float16."""
    if wish != AUTO:
        return _SPELLINGS.get(wish, wish)
    stored = _SPELLINGS.get(stored, stored)
    if stored == "float16" and device == "cpu":
        return "bfloat16"
    return stored if stored in ITEM_BYTES else "float32"


def plan_kv_dtype(wish: str, dtype: str) -> str:
    """The type to cache keys and values in, by one name each."""
    return {AUTO: dtype, "fp8": "fp8_e4m3"}.get(wish, wish)


def size_text(number: int) -> str:
    """A size for people: 1.5 GiB, 12.0 KiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(number) >= 1 << power:
            return f"{number / (1 << power):.1f} {unit}"
    return f"{number} B"


def _ladder(flag: int | None, preset: int | None, default: int, least: int, least_preset: int) -> tuple[int, ...]:
    """Values to try, largest first: only the flag's, or the preset's or default's and its halves down to the least."""
    if flag is not None:
        return (flag,)
    value, floor = (preset, least_preset) if preset is not None else (default, least)
    rungs = []
    while value >= floor:
        rungs.append(value)
        value //= 2
    return tuple(rungs)


def _is_pinned(config: EngineConfig) -> bool:
    return config.kv_cache_memory_bytes is not None or config.num_gpu_blocks_override is not None


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)
