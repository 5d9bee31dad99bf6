"""Chat messages as clients send them: the checks that come before a template sees them.

Content parts, tool calls and unknown keys are quire/text/chat's business; unknown keys do no harm, since clients echo what
they received from other servers.
"""

from __future__ import annotations

from typing import Any

from quire.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def plain_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """The messages in the roles that templates know; raises InvalidRequest that names the place."""
    if not messages:
        raise InvalidRequest("messages must have at least one message.", parameter="messages")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{place} must be an object.", parameter=place, value=message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InvalidRequest(
            f"{place}.role must be one of {', '.join(ROLES)}, got {str(role)[:100]!r}.", parameter=f"{place}.role"
        )
    if content is None and role != "assistant":
        raise InvalidRequest(f"{place}.content must be a string or a list of text parts.", parameter=f"{place}.content")
    if content is None:
        message = {**message, "content": ""}
    # "developer" is OpenAI's newer name for "system"; most templates do not know it and would drop or refuse the message.
    return {**message, "role": "system"} if role == "developer" else message
