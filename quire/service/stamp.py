"""What every adapter that is trained here says of where it comes from: its base, the template and the special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.lora.adapter import NOTES
from quire.lora.base import base_digest
from quire.weights.hub import resolve


@dataclass(frozen=True)
class Stamp:
    """fields: those of an Adapter. base_name: what its configuration calls the base."""

    fields: Mapping[str, Any]
    base_name: str

    @classmethod
    def of(cls, engine: Any) -> Stamp:
        """The stamp of the model that is served."""
        config = engine.config
        template = config.chat_template or engine.tokenizer.chat_template
        fields = {
            "base_digest": base_digest(resolve(config.model, config.revision)),
            "chat_template": template if isinstance(template, str) else None,
            "special_tokens": dict(engine.tokenizer.special_tokens),
        }
        return cls(fields, config.model)

    def fits(self, folder: Path) -> bool:
        """Whether the adapter in `folder`, which was made here, was trained on this base."""
        try:
            notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return notes.get("base_digest") == self.fields["base_digest"]
