"""Every environment variable that Quire reads, with its default. Read when asked, so that tests can change them."""

from __future__ import annotations

import os
from pathlib import Path

from quire.errors import ConfigError


def ops() -> str:
    """QUIRE_OPS: which implementation of the operations runs; auto is the best that this machine can."""
    return os.environ.get("QUIRE_OPS", "auto")


def isa() -> str | None:
    """QUIRE_ISA: the instruction set of the native kernels, one of those that `quire doctor` names; the best if not set."""
    return os.environ.get("QUIRE_ISA") or None


def log_level() -> str:
    """QUIRE_LOG_LEVEL: DEBUG, INFO, WARNING or ERROR."""
    level = os.environ.get("QUIRE_LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"QUIRE_LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, got {level!r}.")
    return level


def api_key() -> str | None:
    """QUIRE_API_KEY: the server's key if --api-key is not given."""
    return os.environ.get("QUIRE_API_KEY") or None


def allow_runtime_lora_updating() -> bool:
    """QUIRE_ALLOW_RUNTIME_LORA_UPDATING (vLLM's VLLM_ALLOW_RUNTIME_LORA_UPDATING too): 1 lets /v1/load_lora_adapter name any
    path of this machine."""
    given = (os.environ.get(f"{who}_ALLOW_RUNTIME_LORA_UPDATING", "") for who in ("QUIRE", "VLLM"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in given)


def offline() -> bool:
    """HF_HUB_OFFLINE: never ask the hub (the same variable as huggingface_hub's)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def threads() -> int | None:
    """OMP_NUM_THREADS: compute threads if --threads is not given (the same variable as torch's)."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not first:
        return None
    if not first.isdigit() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS must be a whole number of at least 1, got {first!r}.")
    return int(first)


def cache_dir() -> Path:
    """QUIRE_CACHE: where Quire keeps what can be made again."""
    return Path(os.environ.get("QUIRE_CACHE") or Path.home() / ".cache" / "quire")


def data_dir() -> Path:
    """QUIRE_DATA: where a server keeps files, jobs and trained adapters if --data-dir is not given."""
    return Path(os.environ.get("QUIRE_DATA") or Path.home() / ".local" / "share" / "quire")


def packed_cache_bytes() -> int:
    """QUIRE_PACKED_CACHE_BYTES: how large the folder of packed weights may grow before the oldest go."""
    given = os.environ.get("QUIRE_PACKED_CACHE_BYTES", "")
    if not given:
        return 64 << 30
    if not given.isdigit():
        raise ConfigError(f"QUIRE_PACKED_CACHE_BYTES must be a whole number of bytes, got {given!r}.")
    return int(given)
