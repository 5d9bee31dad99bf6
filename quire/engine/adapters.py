"""Adapters from Python, as people know them from PEFT: add, set, disable, list, delete, combine.

A part of `LLM`; kept apart because it knows names and folders, and nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from quire.errors import ConfigError, InvalidRequest
from quire.lora.adapter import Adapter
from quire.lora.manager import AdapterManager
from quire.lora.request import LoRARequest

LoRARequests = LoRARequest | Sequence[LoRARequest | None] | None


class AdapterControls:
    """What `LLM` offers for adapters. `_adapters`: None where they are not served."""

    _adapters: AdapterManager | None
    _active: str | None = None

    @property
    def adapters(self) -> AdapterManager:
        """The adapters by their names. Raises ConfigError where they are not served."""
        if self._adapters is None:
            raise ConfigError("enable_lora must be true to use adapters: LLM(model, enable_lora=True).")
        return self._adapters

    def add_adapter(self, name: str, source: str | Path | Adapter, *, replace: bool = False) -> None:
        """Register a folder in PEFT's layout, or an adapter, under a name. Raises AdapterError, InvalidRequest if the name is
        taken."""
        self.adapters.add(name, Path(source) if isinstance(source, str) else source, replace=replace)

    def delete_adapter(self, name: str) -> None:
        """Forget a name and free its memory. Raises NotFound."""
        self.adapters.remove(name)
        if self._active == name:
            self._active = None

    def list_adapters(self) -> list[str]:
        """The registered names."""
        return self.adapters.names()

    def set_adapter(self, name: str | None) -> None:
        """Let requests that name no adapter go through this one; None: through the base alone. Raises NotFound."""
        if name is not None:
            self.adapters.get(name)
        self._active = name

    @property
    def active_adapter(self) -> str | None:
        """What `set_adapter` has set."""
        return self._active

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within: requests that name no adapter go through the base alone."""
        before, self._active = self._active, None
        try:
            yield
        finally:
            self._active = before

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: str = "linear",
        *,
        rank: int | None = None,
        density: float | None = None,
        replace: bool = False,
    ) -> None:
        """Serve a weighted combination of registered adapters under a new name. method: cat (the exact sum), linear, svd to a
        `rank`, or ties, dare_linear, ... that keep a `density` of the numbers, as in PEFT."""
        self.adapters.combine(name, weights, method, rank=rank, density=density, replace=replace)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """`combine` under PEFT's name and order."""
        if len(adapters) != len(weights):
            raise InvalidRequest(
                f"weights must be as many as the {len(adapters)} adapters, got {len(weights)}.", parameter="weights"
            )
        self.combine(adapter_name, dict(zip(adapters, weights, strict=True)), combination_type)

    def _lora_requests(self, given: LoRARequests, count: int) -> list[LoRARequest | None]:
        """One for each of `count` prompts; what names a folder that is not registered yet is registered first."""
        if given is None and self._active is not None:
            given = LoRARequest(self._active)
        listed = [given] * count if given is None or isinstance(given, LoRARequest) else list(given)
        if len(listed) != count:
            raise InvalidRequest(
                f"lora_request must be one or as many as the {count} prompts, got {len(listed)}.", parameter="lora_request"
            )
        for request in dict.fromkeys(one for one in listed if one is not None):
            if request.lora_path and (request.load_inplace or request.lora_name not in self.adapters):
                self.adapters.add(request.lora_name, Path(request.lora_path), replace=request.load_inplace)
        return listed
