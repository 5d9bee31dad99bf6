"""Quire: fine-tune, serve and tune language models on machines that you own.

The public names load on first use, so that `import quire` (and every command that needs no model) never imports torch.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# MKL reads this once, at its first call: matrix products then do not depend on the number of threads.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# OpenMP reads this once, when torch is loaded: its threads sleep at once when they have nothing to do, instead of taking
# the cores from the native kernels' threads for a while.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOMES = {
    "LLM": "quire.engine.llm",
    "AsyncEngine": "quire.engine.async_engine",
    "EngineConfig": "quire.config",
    "SamplingParams": "quire.request",
    "BeamSearchParams": "quire.request",
    "RequestOutput": "quire.request",
    "CompletionOutput": "quire.request",
    "Logprob": "quire.request",
    "LoRARequest": "quire.lora.request",
    "train": "quire.train.door",
    "merge": "quire.merging",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
