"""The engine behind a server: one thread runs the loop, requests and outputs cross by queues.

The event loop never waits for a step, and the step loop never waits for a reader. Whoever stops reading (closes or cancels
the iterator of `generate`) thereby aborts the request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quire.config import EngineConfig
from quire.engine.start import Started, start
from quire.errors import EngineDead
from quire.log import logger
from quire.lora.request import LoRARequest
from quire.request import BeamSearchParams, EngineRequest, RequestOutput, SamplingParams

log = logger(__name__)
Result = TypeVar("Result")
# Tokenizing this many characters takes longer than a turn of the event loop should.
TOKENIZE_OFF_LOOP = 8192


@dataclass(frozen=True)
class Heartbeat:
    """Signs of life, read without touching the engine thread. age_s: since the loop last turned, or the step began."""

    age_s: float
    running: int
    waiting: int
    steps: int
    alive: bool
    backlog_tokens: int


class _Reader:
    """Where one request's outputs go: a queue on the event loop that asked."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()


class AsyncEngine:
    """`generate` as an async iterator over an engine that runs in its own thread."""

    def __init__(self, started: Started) -> None:
        self.config, self.model_config, self.plan = started.config, started.model_config, started.plan
        self.tokenizer, self.metrics = started.tokenizer, started.metrics
        self.default_sampling = dict(started.default_sampling)
        self.slots, self.adapters = started.slots, started.adapters
        self._engine, self._intake = started.engine, started.intake
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._readers: dict[str, _Reader] = {}
        self._background: Callable[[bool], bool] | None = None
        self._more_background = False
        self._stopping = self._closed = False
        self._dead: Exception | None = None
        self._turned = time.monotonic()
        self._counts = (0, 0, 0)
        if self.adapters is not None:
            self.adapters.on_change = lambda: self._call(self._engine.sweep)
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        """Load and start. Raises ConfigError, DoesNotFit or ModelError."""
        return cls(start(config))

    async def generate(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        beam: BeamSearchParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one request as they come. Raises InvalidRequest before anything is queued, the request's own fault
        if it had one, EngineDead if the loop has ended."""
        self._check_alive()
        arrival = time.monotonic()
        await self._register(lora_request)

        def accept() -> EngineRequest:
            return self._intake.accept(
                prompt,
                params,
                request_id,
                arrival_time=arrival,
                priority=priority,
                cache_salt=cache_salt,
                beam=beam,
                lora_request=lora_request,
            )

        long = isinstance(prompt, str) and len(prompt) > TOKENIZE_OFF_LOOP
        request = await asyncio.to_thread(accept) if long else accept()
        reader = _Reader()
        if not self._call(lambda: self._add(request, reader)):
            self._check_alive()
        finished = False
        try:
            while not finished:
                output = await reader.queue.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finished
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            if not finished:
                self._call(lambda: self._abort_for(request_id, reader))

    async def _register(self, request: LoRARequest | None) -> None:
        """Read the adapter that a request brings by its path, if its name is new or it is to be read again."""
        if request is None or self.adapters is None or not request.lora_path:
            return
        if request.load_inplace or request.lora_name not in self.adapters:
            folder = Path(request.lora_path)
            await asyncio.to_thread(self.adapters.add, request.lora_name, folder, replace=request.load_inplace)

    def abort(self, request_id: str) -> None:
        """End a request: its reader gets a last output with finish_reason abort. Any thread, any state, any number of times."""
        self._call(lambda: self._abort_for(request_id, None))

    def heartbeat(self) -> Heartbeat:
        running, waiting, backlog = self._counts
        alive = self._dead is None and self._thread.is_alive()
        return Heartbeat(time.monotonic() - self._turned, running, waiting, self._engine.steps, alive, backlog)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        self._check_alive()
        done: list[bool] = []
        event = threading.Event()

        def reset() -> None:
            done.append(self._engine.reset_prefix_cache())
            event.set()

        if not self._call(reset):
            self._check_alive()
        event.wait(timeout=60)
        return bool(done and done[0])

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens at which an answer ends."""
        end = self._intake.eos
        return self._intake.also_stop | (frozenset() if end is None else {end})

    def between_steps(self, work: Callable[[], Result]) -> Future[Result]:
        """Have the engine thread do something once between two steps. The future fails with EngineDead if it has ended."""
        future: Future[Result] = Future()

        def run() -> None:
            if self._dead is not None:
                future.set_exception(self._dead)
                return
            try:
                future.set_result(work())
            except BaseException as error:  # whose work it is also judges its faults
                future.set_exception(error)

        if not self._call(run):
            future.set_exception(self._dead or EngineDead("the engine has been shut down."))
        return future

    def set_background(self, work: Callable[[bool], bool] | None) -> None:
        """Have the engine thread call `work(busy)` after every step and whenever nothing is asked of it.

        busy: whether requests are in progress. `work` does a little, the less while they are, and says whether it has more
        to do; after False it is called again at the next step or `wake`.
        """
        self._background = work
        self.wake()

    def wake(self) -> None:
        """Have the engine thread turn once, and so look at its background work."""
        self._call(lambda: None)

    def shutdown(self, timeout: float = 0.0) -> None:
        """Let running requests finish for up to `timeout` seconds, abort the rest, stop the thread."""
        deadline = time.monotonic() + timeout
        while self._readers and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)
            if self.adapters is not None:
                self.adapters.close()

    # -- the engine thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._end_all(EngineDead("the engine has been shut down."))
        except BaseException as error:
            log.exception("the engine loop has ended")
            self._end_all(EngineDead(f"the engine has ended: {error}"))

    def _turn(self) -> bool:
        """One turn of the loop: what was asked meanwhile, then a step. False when it is time to stop."""
        with self._wake:
            while not (self._calls or self._stopping or self._engine.has_work() or self._more_background):
                self._turned = time.monotonic()
                self._wake.wait(timeout=1.0)
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            call()
        if self._stopping:
            return False
        self._turned = time.monotonic()
        outputs = self._engine.step()
        scheduler = self._engine.scheduler
        self._counts = (scheduler.num_running, self._engine.num_waiting, scheduler.backlog())
        self._tell(outputs)
        self._more_background = self._in_background()
        return True

    def _in_background(self) -> bool:
        """A little of the background's work; a fault in it ends it and nothing else."""
        if self._background is None:
            return False
        try:
            return self._background(self._engine.has_work())
        except Exception:
            log.exception("background work has failed and is over")
            self._background = None
            return False

    def _add(self, request: EngineRequest, reader: _Reader) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # whatever it is, it is this request's own
            self._hand_over([(reader, error)])
            return
        self._readers[request.request_id] = reader

    def _abort_for(self, request_id: str, reader: _Reader | None) -> None:
        """Abort; a reader that has gone away may only abort its own request, not a later one of the same id."""
        if reader is not None and self._readers.get(request_id) is not reader:
            return
        output = self._engine.abort(request_id)
        if output is not None:
            self._tell([output])

    def _tell(self, outputs: Sequence[RequestOutput]) -> None:
        handed = []
        for output in outputs:
            reader = self._readers.get(output.request_id)
            if reader is None:
                continue
            if output.finished:
                del self._readers[output.request_id]
            handed.append((reader, output))
        self._hand_over(handed)

    def _hand_over(self, handed: list[tuple[_Reader, RequestOutput | Exception]]) -> None:
        """Into the readers' queues, with one wake-up for each event loop."""
        loops = {reader.loop for reader, _ in handed}
        for loop in loops:
            mine = [(reader.queue, output) for reader, output in handed if reader.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, mine)
            except RuntimeError:  # that loop has closed: nobody reads any more
                for reader, output in handed:
                    if reader.loop is loop and isinstance(output, RequestOutput):
                        self._engine.abort(output.request_id)
                        self._readers.pop(output.request_id, None)

    def _end_all(self, error: Exception) -> None:
        self._dead = error
        readers, self._readers = list(self._readers.values()), {}
        self._hand_over([(reader, error) for reader in readers])
        with self._wake:
            self._closed = True
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            call()  # late requests are told as well: see _add
        late, self._readers = list(self._readers.values()), {}
        self._hand_over([(reader, error) for reader in late])

    # -- crossing over ------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[], None]) -> bool:
        """Have the engine thread do something at the next turn; False if it has ended and nobody would."""
        with self._wake:
            if not self._closed:
                self._calls.append(call)
                self._wake.notify()
            return not self._closed

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(str(self._dead))


def _put_all(outputs: list[tuple[asyncio.Queue, RequestOutput | Exception]]) -> None:
    for queue, output in outputs:
        queue.put_nowait(output)
