"""--chat-template: a file, a text, and a file that is not there."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from quire.config import EngineConfig
from quire.engine.async_engine import AsyncEngine
from quire.errors import ConfigError
from tests.server.running import RunningServer

TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.mark.parametrize("as_file", [True, False])
def test_the_servers_template_is_used(tiny_llama: Path, tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    given = str(path) if as_file else TEMPLATE
    engine = AsyncEngine.from_config(
        EngineConfig(model=str(tiny_llama), dtype="float32", num_gpu_blocks_override=40, chat_template=given)
    )
    with RunningServer(engine) as server:
        messages = [{"role": "user", "content": "fox"}]
        tokens = httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"]
        assert engine.tokenizer.decode(tokens) == "[fox]"
    engine.shutdown()


def test_a_file_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat_template must be .* does not exist"):
        AsyncEngine.from_config(EngineConfig(model=str(tiny_llama), chat_template="no/such.jinja"))
