"""From wishes to a running engine: find the model, plan before loading, load, allocate. Says what it does as it goes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quire.assemble import assemble
from quire.batch import packed
from quire.config import AUTO, EngineConfig
from quire.engine.engine import Engine
from quire.engine.intake import Intake
from quire.engine.kv import KV_DTYPES, allocate
from quire.engine.kv_scales import kv_scales
from quire.engine.runner import Runner
from quire.errors import ConfigError
from quire.log import logger
from quire.lora.base import base_digest
from quire.lora.manager import AdapterManager
from quire.lora.serving import ServingSlots
from quire.lora.slots import Slots
from quire.metrics import Metrics
from quire.models.config import ModelConfig, read_json, read_model_config
from quire.models.decoder import CausalLM
from quire.models.registry import model_class
from quire.plan.hardware import probe
from quire.plan.memory import Plan, make_plan
from quire.presets import recommended_sampling
from quire.scheduler.scheduler import Limits
from quire.speculation import Speculation
from quire.text.tokenizer import Tokenizer
from quire.weights.files import checkpoint_files, tensor_headers, weight_sizes
from quire.weights.hub import resolve
from quire.weights.packed_cache import packed_cache

log = logger(__name__)

ENOUGH_TOKENS = 512  # more in a step make it longer, but a token of it hardly cheaper


@dataclass(frozen=True)
class Started:
    """An engine and all that its doors need to know of it. default_sampling: what the model's files recommend. slots: of the
    model, for serving and training. adapters: those that requests may name, None without enable_lora."""

    engine: Engine
    intake: Intake
    config: EngineConfig
    model_config: ModelConfig
    plan: Plan
    tokenizer: Tokenizer
    metrics: Metrics
    default_sampling: Mapping[str, Any]
    slots: Slots
    adapters: AdapterManager | None


def start(config: EngineConfig) -> Started:
    """Load the model of `config`. Raises ModelError, ConfigError, and DoesNotFit before anything large is read."""
    laps = _Laps()
    config = replace(config, chat_template=_chat_template(config.chat_template))
    folder = resolve(config.model, config.revision)
    model_config = read_model_config(folder)
    model_class(model_config)  # an unknown architecture is refused before planning
    generation = _generation_config(folder) if config.generation_config == AUTO else {}
    plan = make_plan(config, model_config, weight_sizes(folder, model_config), probe())
    cache = packed_cache(config.packed_cache, folder, plan.dtype, config.quantization)
    if cache is not None:
        cache.begin(plan.threads)
    for line in plan.describe():
        log.info("%s", line)
    laps.end("plan")
    tokenizer = Tokenizer.from_folder(resolve(config.tokenizer, config.revision, weights=False) if config.tokenizer else folder)
    laps.end("tokenizer")
    torch.set_num_threads(plan.threads)
    shape = model_config.for_length(plan.max_model_len)
    model = assemble(folder, shape, plan.dtype, config.quantization, cache=cache)
    laps.end("weights")
    scales = kv_scales(config, plan, model, folder, model_config, tokenizer)
    kv = allocate(model_config, plan.num_blocks, plan.block_size, KV_DTYPES[plan.kv_cache_dtype], scales)
    laps.end("KV cache")
    _warm_up(model)
    laps.end("first rows")
    metrics = Metrics(config.model, plan.max_model_len)
    metrics.set_cache_config(
        block_size=plan.block_size,
        num_gpu_blocks=plan.num_blocks,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_prefix_caching=config.enable_prefix_caching,
        cache_dtype=plan.kv_cache_dtype,
    )
    eos, also_stop = _stop_tokens(tokenizer, model_config, generation)
    slots = Slots(model)
    adapters = _adapters(config, slots, folder, tokenizer, metrics)
    engine = Engine(
        Runner(model, kv, ServingSlots(slots, adapters, config.max_loras) if adapters else None),
        tokenizer,
        plan,
        _limits(config, plan),
        model_digest=_digest(folder, f"{plan.dtype} {config.quantization} {plan.kv_cache_dtype} {config.calculate_kv_scales}"),
        eos=eos,
        metrics=metrics,
        log_stats=not config.disable_log_stats,
    )
    intake = Intake(
        tokenizer,
        model_config.vocab_size,
        plan.max_model_len,
        config.max_logprobs,
        eos,
        also_stop,
        seed=config.seed,
        adapters=adapters,
    )
    log.info("Ready after %s", laps)
    sampling = recommended_sampling(generation)
    return Started(engine, intake, config, model_config, plan, tokenizer, metrics, sampling, slots, adapters)


def _adapters(
    config: EngineConfig, slots: Slots, folder: Path, tokenizer: Tokenizer, metrics: Metrics
) -> AdapterManager | None:
    if not config.enable_lora:
        return None
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return AdapterManager(
        slots,
        max_cpu_loras=config.adapters_in_memory,
        max_rank=config.max_lora_rank,
        base_digest=base_digest(folder),
        base_template=config.chat_template or template,
        on_read=metrics.observe_adapter_load,
    )


class _Laps:
    """Where a start's time went, for its log."""

    def __init__(self) -> None:
        self._begin = self._last = time.monotonic()
        self._laps: list[str] = []

    def end(self, name: str) -> None:
        """What has just been done."""
        now = time.monotonic()
        self._laps.append(f"{name} {now - self._last:.2f}")
        self._last = now

    def __str__(self) -> str:
        return f"{time.monotonic() - self._begin:.2f} s ({', '.join(self._laps)})"


@torch.inference_mode()
def _warm_up(model: CausalLM) -> None:
    """Kernels are tried and set up at their first use: let it not be a request's. One row, and where products of dense
    weights are tried, enough rows for a group."""
    for count in (1,) if model.lm_head.weight is None else (1, 17):
        model.logits(model(packed([[0] * count])))


def _limits(config: EngineConfig, plan: Plan) -> Limits:
    return Limits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        block_size=plan.block_size,
        enough_tokens=ENOUGH_TOKENS,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        policy=config.scheduling_policy,
        prefix_caching=config.enable_prefix_caching,
        speculation=Speculation.of(config.speculative_config),
        max_loras=config.max_loras if config.enable_lora else 0,
    )


def _chat_template(given: str | None) -> str | None:
    """The template's text, if a file was named; text has braces, and a bare word is the name of one of the model's own."""
    if given is None or "{" in given:
        return given
    path = Path(given)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"chat_template must be a template or the path of a file, got {given!r}, which does not exist.")
    return given


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _stop_tokens(tokenizer: Tokenizer, model: ModelConfig, generation: Mapping[str, Any]) -> tuple[int | None, frozenset[int]]:
    """(the end-of-sequence token, further tokens at which the model's files say to stop)."""
    named = generation.get("eos_token_id")
    listed = [*(named if isinstance(named, list) else [] if named is None else [named]), *model.eos_token_ids]
    eos = tokenizer.eos_token_id
    if eos is None and listed:
        eos = listed[0]
    also = {int(token) for token in (named if isinstance(named, list) else listed)}
    return eos, frozenset(token for token in also if token != eos and 0 <= token < model.vocab_size)


def _digest(folder: Path, form: str) -> str:
    """Identity of the weights: configuration, tensor headers and file sizes, so that starting stays quick."""
    digest = hashlib.sha256(form.encode() + (folder / "config.json").read_bytes())
    for path in checkpoint_files(folder):
        headers = sorted(tensor_headers(path).items()) if path.suffix == ".safetensors" else []
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} {headers}".encode())
    return digest.hexdigest()
