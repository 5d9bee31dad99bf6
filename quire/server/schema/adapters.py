"""Bodies of vLLM's two routes for adapters."""

from __future__ import annotations

from typing import Any

from quire.server.schema.base import RequestBody
from quire.service.adapters import FILES, InvalidUserInput


class LoadBody(RequestBody):
    """POST /v1/load_lora_adapter."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    base_model_name: str | None = None

    def check(self) -> None:
        """What vLLM asks for, in its words."""
        if not self.lora_name or not self.lora_path:
            raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.", parameter="lora_name")
        if self.is_3d_lora_weight:
            raise InvalidUserInput(
                "is_3d_lora_weight must be false: the files say what they hold.", parameter="is_3d_lora_weight"
            )


class UnloadBody(RequestBody):
    """POST /v1/unload_lora_adapter. lora_int_id has no effect, as at vLLM."""

    lora_name: str = ""
    lora_int_id: int | None = None

    def check(self) -> None:
        if not self.lora_name:
            raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.", parameter="lora_name")


UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": list(FILES[:2]),
                    "properties": {name: {"type": "string", "format": "binary"} for name in FILES},
                }
            }
        },
    }
}
"""The body of PUT /v1/adapters/{name}, for /openapi.json."""
