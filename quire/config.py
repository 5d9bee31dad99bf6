"""The user's wishes for one engine, frozen as given. What the machine can really do is the `Plan` (quire/plan).

Names and defaults are vLLM's. This room knows no torch and reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from quire.errors import ConfigError, did_you_mean
from quire.speculation import Speculation

DTYPES = ("auto", "float32", "bfloat16", "float16", "float", "half")
POLICIES = ("fcfs", "priority")
QUANTIZATIONS = ("int8", "int4", "fp8", "awq", "gptq", "compressed-tensors")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")
AUTO = "auto"
MAX_BLOCK_SIZE = 256
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_DTYPES = (AUTO, "float32")

# vLLM's switches for what is a fact here: (the sense in which each is accepted, None for both; the fact).
ALWAYS: dict[str, tuple[bool | None, str]] = {
    "enable_chunked_prefill": (True, "prompts are always read in chunks; max_num_batched_tokens sets their size"),
    "enforce_eager": (None, "nothing is compiled or captured"),
    "async_scheduling": (False, "the scheduler does not plan ahead"),
    "trust_remote_code": (False, "no code of a model's repository is ever run"),
}


@dataclass(frozen=True)
class EngineConfig:
    """One engine's options. None means "not said": the preset, the plan or the model decides."""

    model: str
    """A folder in Hugging Face layout, a hub id, or `quire-tiny` (shipped with the package)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it is not the model's."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of model and tokenizer."""
    dtype: str = AUTO
    """Type of weights and activations; auto keeps the checkpoint's (float16 becomes bfloat16 on CPU)."""
    seed: int = 0
    """Source of the seeds of requests that name none."""
    max_model_len: int | str | None = None
    """Longest sequence in tokens, prompt and output together; auto: as long as memory allows."""
    max_num_seqs: int | None = None
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step: the size of a prefill chunk."""
    block_size: int = 16
    """Tokens in one KV block."""
    gpu_memory_utilization: float | None = None
    """Share of the device's memory (on CPU: of the memory that machine and cgroup have free) that the engine may use."""
    kv_cache_memory_bytes: int | None = None
    """Exact size of the KV cache; overrides the share above."""
    kv_cache_dtype: str = AUTO
    """Type of cached keys and values: auto is dtype; fp8 (fp8_e4m3), fp8_e5m2 and int8 take one byte per number."""
    calculate_kv_scales: bool = False
    """With fp8: find the scales of keys and values at start, from a fixed text, not the checkpoint's or 1 (int8: always)."""
    num_gpu_blocks_override: int | None = None
    """Exact number of KV blocks; overrides both, mostly for tests."""
    enable_prefix_caching: bool = True
    """Reuse the KV blocks of equal prefixes."""
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in one step; 0 is no limit but the step's."""
    scheduling_policy: str = "fcfs"
    """fcfs, or priority (lower value first, then arrival)."""
    max_logprobs: int = 20
    """Most alternatives a request may ask for; -1 is no limit."""
    generation_config: str = AUTO
    """auto: sampling defaults from the model's generation_config.json; vllm: neutral defaults."""
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    """Sampling defaults that win over the model's."""
    chat_template: str | None = None
    """A jinja template (text or the path of a file) instead of the model's."""
    preset: str | None = None
    """A scenario of `quire presets`."""
    speculative_config: Mapping[str, Any] | None = None
    """Draft tokens from text that repeats itself, with the same results: {"method": "ngram", "num_speculative_tokens": 4,
    "prompt_lookup_min": 2, "prompt_lookup_max": 5}."""
    threads: int | None = None
    """Compute threads; if not given, OMP_NUM_THREADS or as many as cores are usable."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_parallel_size: int = 1
    """Ranks that take consecutive layers."""
    quantization: str | None = None
    """int8, int4 or fp8: round dense weights at load; awq, gptq, compressed-tensors or fp8: what the checkpoint must be."""
    enable_lora: bool = False
    """Serve LoRA adapters on this base, each under a name of its own."""
    max_loras: int = 1
    """Different adapters in one step; requests of further ones wait their turn."""
    max_lora_rank: int = 16
    """Largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512. Every rank up to it is served as it is."""
    max_cpu_loras: int | None = None
    """Adapters that are kept in memory; others are read from their folders when they are needed. If not given, max_loras."""
    lora_dtype: str = AUTO
    """Type of adapters: float32, on every base (auto is the same)."""
    training_jobs: int = 0
    """Fine-tuning jobs of rank max_lora_rank that the memory plan leaves room for. With --enable-fine-tuning, quire serve plans
    for as many as train together."""
    packed_cache: str = "off"
    """Keep packed (and quantized) weights for a quicker next start: off, auto (in the user's cache folder) or a folder. Takes
    as much disk as the weights; QUIRE_PACKED_CACHE_BYTES limits it."""
    disable_log_stats: bool = False
    """Do not log throughput and cache use every ten seconds."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model must be a folder, a hub id or quire-tiny, got an empty value.")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.calculate_kv_scales and self.kv_cache_dtype == AUTO:
            raise ConfigError(
                f"calculate_kv_scales needs a kv_cache_dtype of {', '.join(KV_CACHE_DTYPES[1:])}, got {AUTO!r}: "
                "a cache of full numbers has no scales."
            )
        _one_of("scheduling_policy", self.scheduling_policy, POLICIES)
        if self.max_model_len not in (None, AUTO, -1):
            _whole("max_model_len", self.max_model_len, 1)
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "num_gpu_blocks_override", "threads"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        if 128 % self.block_size:
            # KV is read in fixed spans of 128 tokens (exactness), so a block must divide one.
            raise ConfigError(f"block_size must divide 128, got {self.block_size}. Use 16.")
        _whole("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _whole("max_logprobs", self.max_logprobs, -1)
        Speculation.of(self.speculative_config)
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be in (0, 1], got {share}.")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            _whole(name, getattr(self, name), 1)
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} must be 1, got {getattr(self, name)}: ranks are not built yet.")
        if not isinstance(self.packed_cache, str) or not self.packed_cache:
            raise ConfigError(f"packed_cache must be off, auto or a folder, got {self.packed_cache!r}.")
        if self.quantization is not None:
            _one_of("quantization", self.quantization, QUANTIZATIONS)
        self._check_lora()

    def _check_lora(self) -> None:
        _whole("max_loras", self.max_loras, 1)
        if isinstance(self.max_lora_rank, bool) or self.max_lora_rank not in LORA_RANKS:
            raise ConfigError(f"max_lora_rank must be one of {', '.join(map(str, LORA_RANKS))}, got {self.max_lora_rank!r}.")
        _one_of("lora_dtype", self.lora_dtype, LORA_DTYPES)
        if self.max_cpu_loras is not None:
            _whole("max_cpu_loras", self.max_cpu_loras, 1)
            if self.max_cpu_loras < self.max_loras:
                raise ConfigError(f"max_cpu_loras must be at least max_loras={self.max_loras}, got {self.max_cpu_loras}.")
        _whole("training_jobs", self.training_jobs, 0)
        for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "training_jobs"):
            if not self.enable_lora and getattr(self, name) != getattr(EngineConfig, name):
                raise ConfigError(f"{name} needs enable_lora, which is not given: adapters would not be served.")

    @property
    def adapters_in_memory(self) -> int:
        """Adapters that are kept in memory; none without LoRA."""
        return (self.max_cpu_loras or self.max_loras) if self.enable_lora else 0

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """A config from keyword options, those of ALWAYS among them; an unknown one is an error that suggests the nearest."""
        options = without_always(options)
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}.{did_you_mean(name, known)}")
        return cls(**options)


def without_always(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options but for those of ALWAYS. Raises ConfigError for one that asks for what cannot be."""
    left = dict(options)
    for name, (fact, reason) in ALWAYS.items():
        said = left.pop(name, None)
        if said is not None and fact is not None and said != fact:
            raise ConfigError(f"{name}={said} is not possible: {reason}.")
    return left


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(str(value), choices)}")


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ConfigError(f"{name} must be a whole number {bounds}, got {value!r}.")
