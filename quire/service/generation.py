"""One request running in the engine: its outputs as pieces (streamed) or as one result, and its end in every case.

Closing or cancelling either way aborts the engine's work at once. Knows the engine's `generate` and nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from quire.errors import InvalidRequest, QuireError, Unavailable
from quire.lora.request import LoRARequest
from quire.request import CompletionOutput, RequestOutput
from quire.service import logprobs
from quire.service.admission import Ticket
from quire.service.prepare import Prepared, PreparedPrompt, in_clients_words
from quire.service.requests import Choice, Piece, PromptResult, Result, TextRequest, TokenLogprob, Usage
from quire.text import chat

MERGE_QUEUE = 64


class Generation:
    """A prepared request in the engine. `usage` grows as outputs arrive."""

    def __init__(
        self, engine: Any, request: TextRequest, prepared: Prepared, ticket: Ticket, running: dict[str, Generation]
    ) -> None:
        self.request, self.prepared = request, prepared
        self.usage = Usage(prompt_tokens=prepared.prompt_tokens)
        self._engine, self._ticket, self._running = engine, ticket, running
        # The client's id may repeat; the engine's must not.
        self._ids = [f"{request.request_id}-{uuid.uuid4().hex[:8]}-{index}" for index in range(len(prepared.prompts))]
        self._aborted: QuireError | None = None
        self._computed: set[int] = set()

    def abort(self, reason: QuireError) -> None:
        """End this request in the engine; whoever reads it gets `reason`. Valid at any time."""
        self._aborted = reason
        for id in self._ids:
            self._engine.abort(id)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything new, as it comes; each index has exactly one `first` and one finish reason."""
        opened: set[int] = set()
        done: set[int] = set()
        async with aclosing(self._outputs()) as outputs:
            async for prompt_index, output in outputs:
                for sample in output.outputs:
                    index = prompt_index * self.prepared.n + sample.index
                    if index in done:
                        continue
                    piece = self._piece(prompt_index, index, output, sample, first=index not in opened)
                    opened.add(index)
                    if piece.finish_reason is not None:
                        done.add(index)
                    yield piece

    async def result(self) -> Result:
        """Everything at once, at the end."""
        last: dict[int, RequestOutput] = {}
        async with aclosing(self._outputs()) as outputs:
            async for prompt_index, output in outputs:
                last[prompt_index] = output
        choices: list[Choice] = []
        for prompt_index in range(len(self.prepared.prompts)):
            samples = self._best(last[prompt_index].outputs)
            self._count(last[prompt_index].outputs)
            for place, sample in enumerate(samples):
                choices.append(self._choice(prompt_index, place, last[prompt_index], sample))
        prompts = [
            PromptResult(prompt.token_ids, last[index].prompt_logprobs) for index, prompt in enumerate(self.prepared.prompts)
        ]
        return Result(choices=choices, prompts=prompts, usage=self.usage)

    # the engine's side

    async def _outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(prompt index, output) of all prompts together; a refusal by the engine is told in the client's words."""
        streams = [self._output_of(index, prompt) for index, prompt in enumerate(self.prepared.prompts)]
        unfinished = len(streams)
        for id in self._ids:
            self._running[id] = self
        try:
            async with aclosing(merged(streams)) as merging:
                async for prompt_index, output in merging:
                    self._observe(prompt_index, output)
                    unfinished -= output.finished
                    yield prompt_index, output
            if unfinished:
                raise self._aborted or Unavailable("the request was aborted by the server.", retry_after=1.0)
        except InvalidRequest as error:
            raise in_clients_words(error, self.request) from error
        finally:
            for id in self._ids:
                self._running.pop(id, None)

    def _output_of(self, index: int, prompt: PreparedPrompt) -> AsyncIterator[RequestOutput]:
        return self._engine.generate(
            prompt.token_ids,
            prompt.params,
            self._ids[index],
            priority=self.request.priority,
            cache_salt=self.request.cache_salt,
            beam=prompt.beam,
            lora_request=LoRARequest(self.request.adapter) if self.request.adapter else None,
        )

    def _observe(self, prompt_index: int, output: RequestOutput) -> None:
        if self._aborted is not None:
            raise self._aborted
        if output.error is not None:
            raise output.error
        if any(sample.finish_reason == "abort" for sample in output.outputs):
            raise Unavailable("the request was aborted by the server.", retry_after=1.0)
        if prompt_index not in self._computed:
            self._computed.add(prompt_index)
            self._ticket.computed(len(self.prepared.prompts[prompt_index].token_ids))
            self.usage.cached_tokens += output.num_cached_tokens

    # the client's side

    def _piece(self, prompt_index: int, index: int, output: RequestOutput, sample: CompletionOutput, *, first: bool) -> Piece:
        prompt = self.prepared.prompts[prompt_index]
        only = self.request.echo_only
        if not only:
            self.usage.completion_tokens += len(sample.token_ids)
        piece = Piece(
            index=index,
            prompt_index=prompt_index,
            text="" if only else sample.text,
            token_ids=[] if only else list(sample.token_ids),
            logprobs=self._logprobs(prompt, sample, only),
            finish_reason="length" if only and sample.finish_reason else sample.finish_reason,
            stop_reason=None if only else sample.stop_reason,
            first=first,
        )
        if first:
            piece.prompt_token_ids = prompt.token_ids
            piece.opening, piece.opening_logprobs = self._opening(prompt, output)
        return piece

    def _choice(self, prompt_index: int, place: int, output: RequestOutput, sample: CompletionOutput) -> Choice:
        prompt = self.prepared.prompts[prompt_index]
        only = self.request.echo_only
        opening, opening_logprobs = self._opening(prompt, output)
        own = self._logprobs(prompt, sample, only)
        return Choice(
            index=prompt_index * self.prepared.n + place,
            prompt_index=prompt_index,
            text=opening + ("" if only else sample.text),
            token_ids=[] if only else list(sample.token_ids),
            logprobs=None if own is None else (opening_logprobs or []) + own,
            finish_reason="length" if only else sample.finish_reason or "stop",
            stop_reason=None if only else sample.stop_reason,
        )

    def _opening(self, prompt: PreparedPrompt, output: RequestOutput) -> tuple[str, list[TokenLogprob] | None]:
        """What an echo puts before the answer: of a completion the prompt, of a chat the message that is continued."""
        if not self.request.echo:
            return "", None
        if self.request.messages is not None:
            final = chat.normalise(self.request.messages[-1:])[0]
            return (final.get("content", ""), None) if final["role"] == "assistant" else ("", None)
        if output.prompt_logprobs is None or prompt.params.logprobs is None:
            return prompt.text, None
        shown = logprobs.of_sample(self._engine.tokenizer, prompt.token_ids, output.prompt_logprobs, prompt.params.logprobs)
        return prompt.text, shown

    def _logprobs(self, prompt: PreparedPrompt, sample: CompletionOutput, only_echo: bool) -> list[TokenLogprob] | None:
        asked = self.request.sampling.get("logprobs")
        if asked is None:
            return None
        if only_echo or sample.logprobs is None:
            return []
        return logprobs.of_sample(self._engine.tokenizer, sample.token_ids, sample.logprobs, asked)

    def _best(self, samples: Sequence[CompletionOutput]) -> list[CompletionOutput]:
        """The `n` samples to answer: in their own order, or of `best_of` those likeliest for each token."""
        ordered = sorted(samples, key=lambda sample: sample.index)
        if self.prepared.drawn == self.prepared.n or self.request.use_beam_search:
            return ordered[: self.prepared.n]
        ordered.sort(key=lambda sample: -(sample.cumulative_logprob or 0.0) / max(1, len(sample.token_ids)))
        return ordered[: self.prepared.n]

    def _count(self, samples: Sequence[CompletionOutput]) -> None:
        if not self.request.echo_only:
            self.usage.completion_tokens += sum(len(sample.token_ids) for sample in samples)


async def merged(streams: Sequence[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """Items of all streams with the number of their stream, in order of arrival. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any, BaseException | None, bool]] = asyncio.Queue(MERGE_QUEUE)

    async def pump(index: int, stream: AsyncIterator[Any]) -> None:
        try:
            async with aclosing(stream):  # type: ignore[type-var]
                async for item in stream:
                    await queue.put((index, item, None, False))
        except Exception as error:
            await queue.put((index, None, error, True))
        else:
            await queue.put((index, None, None, True))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            index, item, error, ended = await queue.get()
            if error is not None:
                raise error
            if ended:
                open_streams -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
