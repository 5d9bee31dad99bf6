"""Answers from an engine in this process, through the same preparation as the server's (quire/service/prepare).

The engine is asynchronous, a command line is not: one private event loop is turned only while an answer is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from quire.cli.answer import Answer
from quire.config import EngineConfig
from quire.service.limits import Limits
from quire.service.prepare import prepare
from quire.service.requests import TextRequest


class LocalModel:
    """A loaded model. Raises ConfigError, DoesNotFit or ModelError at construction."""

    def __init__(self, config: EngineConfig) -> None:
        from quire.cli.plan import plan_local

        plan_local(config)  # what does not fit is refused before torch is imported
        from quire.engine.async_engine import AsyncEngine

        self.engine: Any = AsyncEngine.from_config(config)
        self.name = config.model
        self._loop = asyncio.new_event_loop()

    def stream(self, request: TextRequest, answer: Answer) -> Iterator[str]:
        """Pieces of text; Ctrl-C, or closing the iterator, aborts the request in the engine."""
        pieces = self._pieces(request, answer)
        try:
            while True:
                task = self._loop.create_task(anext(pieces))
                try:
                    text = self._loop.run_until_complete(task)
                except StopAsyncIteration:
                    return
                except KeyboardInterrupt:
                    task.cancel()
                    self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
                    raise
                yield text
        finally:
            self._loop.run_until_complete(pieces.aclose())
            answer.end()

    async def _pieces(self, request: TextRequest, answer: Answer) -> AsyncIterator[str]:
        prepared = prepare(request, self.engine, Limits(), stream=True)
        prompt = prepared.prompts[0]
        answer.prompt_tokens = prepared.prompt_tokens
        outputs = self.engine.generate(prompt.token_ids, prompt.params, request.request_id)
        try:
            async for output in outputs:
                (sample,) = output.outputs
                answer.cached_tokens = output.num_cached_tokens
                answer.tokens += len(sample.token_ids)
                answer.finish_reason = sample.finish_reason
                answer.add(sample.text)
                yield sample.text
        finally:
            await outputs.aclose()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.shutdown()
        self._loop.close()
