"""Which adapter a request goes through, under vLLM's names. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quire.errors import InvalidRequest

MOST_NAME = 200


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by its name; two requests of one name are equal.

    lora_int_id: at least 1; vLLM's number, which means nothing here beyond that. lora_path: the folder to register the adapter
    from if the name is not registered yet; empty: it is. load_inplace: read the folder again and replace what the name meant.
    """

    lora_name: str
    lora_int_id: int = field(default=1, compare=False)
    lora_path: str = field(default="", compare=False)
    base_model_name: str | None = field(default=None, compare=False)
    load_inplace: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        check_name(self.lora_name, "lora_name")
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise InvalidRequest(f"id must be > 0, got {self.lora_int_id}", parameter="lora_int_id")

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return self.lora_path


def check_name(name: Any, parameter: str) -> str:
    """The name, if it may be an adapter's: it stands in answers, metrics and the log, so it is short and printable."""
    if not isinstance(name, str) or not name.strip() or len(name) > MOST_NAME or not name.isprintable():
        raise InvalidRequest(
            f"{parameter} must be a name of 1 to {MOST_NAME} printable characters, got {name!r:.80}.", parameter=parameter
        )
    return name
