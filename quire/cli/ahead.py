"""What a command that is about to load a model begins before it imports torch, which takes as long as reading a small model.

Python's own work is done by one thread at a time, but reading weights and loading libraries are not Python's work.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import threading
from pathlib import Path

from quire.config import EngineConfig
from quire.plan.memory import Plan

# Importing makes some hundred thousand objects that stay: looking through them again and again finds no garbage.
OBJECTS_BETWEEN_COLLECTIONS = (100_000, 20, 20)
TORCH_LIBRARIES = (("libtorch_global_deps.so", ctypes.RTLD_GLOBAL), ("libtorch_python.so", ctypes.RTLD_LOCAL))


def begin(config: EngineConfig, folder: Path, plan: Plan) -> None:
    """Begin to read the weights of `folder`, if they are kept packed, and to load torch's libraries."""
    from quire.weights.packed_cache import packed_cache

    gc.set_threshold(*OBJECTS_BETWEEN_COLLECTIONS)
    cache = packed_cache(config.packed_cache, folder, plan.dtype, config.quantization)
    if cache is not None:
        cache.begin(plan.threads)
    threading.Thread(target=_load_libraries, name="quire-libraries", daemon=True).start()


def _load_libraries() -> None:
    """As torch does when it is imported, in the same order; where it has others it will find them itself."""
    found = importlib.util.find_spec("torch")
    for folder in found.submodule_search_locations or () if found is not None else ():
        for name, mode in TORCH_LIBRARIES:
            path = Path(folder) / "lib" / name
            with contextlib.suppress(OSError):
                if path.is_file():
                    ctypes.CDLL(str(path), mode=mode)
