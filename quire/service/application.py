"""The application: one engine with its names, limits, life cycle and health, as every door sees it.

Made before the engine exists, so that a server can answer for its health while the model loads. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.config import EngineConfig
from quire.errors import NotFound, QuireError, Refused, Unavailable
from quire.log import logger
from quire.metrics import Metrics
from quire.service.adapters import AdapterOptions, Adapters
from quire.service.admission import Admission, Ticket
from quire.service.fine_tuning import FineTuning
from quire.service.generation import Generation
from quire.service.lifecycle import Lifecycle, Stage
from quire.service.limits import Limits
from quire.service.prepare import prepare, render
from quire.service.requests import TextRequest

log = logger(__name__)

SMALL_TEXT = 4096
"""Characters below which tokenizing on the event loop is cheaper than a change of thread."""


def load_engine(config: EngineConfig) -> Any:
    """The engine, loaded and running. Blocks, and raises ConfigError, DoesNotFit or ModelError."""
    from quire.engine.async_engine import AsyncEngine  # brings torch, which a refusal of options must not wait for

    return AsyncEngine.from_config(config)


class Application:
    """Everything between the doors and the engine."""

    def __init__(
        self,
        limits: Limits,
        served_names: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        fine_tuning: FineTuning | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.limits = limits
        self.adapters = adapters or Adapters(AdapterOptions())
        self.fine_tuning = fine_tuning
        self.lifecycle = Lifecycle()
        self.admission = Admission(limits, self._rejected, clock)
        self.started_at = int(time.time())
        self._served_names = served_names
        self._engine: Any = None
        self._running: dict[str, Generation] = {}
        self._stall = _StallWatch(limits.stall_seconds, clock)

    # the engine

    def load(self, config: EngineConfig) -> Any:
        """The engine, with the adapters that are named at start. Blocks; `attach` follows."""
        engine = load_engine(config)
        try:
            self._open_adapters(engine)
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def _open_adapters(self, engine: Any) -> None:
        if not self.adapters.opened:
            engine.metrics.rename(self._names_of(engine)[0])
            self.adapters.open(engine.adapters, self._names_of(engine))

    def attach(self, engine: Any) -> None:
        """The model is loaded: from now on requests are taken."""
        self._open_adapters(engine)
        self._engine = engine
        engine.metrics.watch("queued_samples", "Samples admitted, waiting or running.", lambda: self.admission.samples)
        engine.metrics.watch(
            "queued_prompt_tokens",
            "Prompt tokens admitted and not computed yet.",
            lambda: self.admission.backlog_tokens,
        )
        engine.metrics.watch(
            "engine_heartbeat_age_seconds", "Since the engine's last sign of life.", lambda: engine.heartbeat().age_s
        )
        engine.metrics.watch("draining", "1 while shutting down.", lambda: self.lifecycle.stage is not Stage.READY)
        if self.fine_tuning is not None:
            self.fine_tuning.attach(engine, self.model_names)
        self.lifecycle.advance(Stage.READY)

    def fine_tuning_or_refusal(self) -> FineTuning:
        """Files and jobs; Unavailable while the model loads, Refused on a server that has none."""
        if self.fine_tuning is None:
            raise Refused(
                "This server takes no files and no fine-tuning jobs: start it with --enable-fine-tuning.",
                code="training_not_available",
            )
        self.lifecycle.check_open()
        return self.fine_tuning

    @property
    def engine(self) -> Any:
        """The engine; Unavailable while it loads."""
        if self._engine is None:
            self.lifecycle.check_open()
            raise Unavailable("the engine is not there.")
        return self._engine

    @property
    def metrics(self) -> Metrics | None:
        return None if self._engine is None else self._engine.metrics

    # names

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names under which the model is listed; the first one is written into answers."""
        return self._names_of(self.engine)

    def _names_of(self, engine: Any) -> tuple[str, ...]:
        if self._served_names:
            return self._served_names
        given = engine.config.model
        # A folder's path is nobody's business but the operator's.
        return (Path(given).resolve().name if Path(given).is_dir() else given,)

    def check_model(self, name: str | None, owner: str = "") -> str:
        """The name to answer under, the base's or an adapter's, or NotFound. No name means the base. owner: the asking key,
        for what jobs of other keys have made is not there."""
        known = self.model_names if self._served_names else (*self.model_names, self.engine.config.model)
        if not name or name in known:
            return self.model_names[0]
        if name in self.adapters and self._sees(owner, name):
            return name
        raise NotFound(f"The model `{name[:200]}` does not exist.", parameter="model")

    def adapter_names(self, owner: str) -> list[str]:
        """The adapters that a key may use."""
        return [name for name in self.adapters.names() if self._sees(owner, name)]

    def of_job(self, name: str) -> bool:
        """Whether a name is one of those that fine-tuning jobs give."""
        return self.fine_tuning is not None and name.startswith("ft:")

    def _sees(self, owner: str, name: str) -> bool:
        return self.fine_tuning is None or self.fine_tuning.sees(owner, name)

    def adapter_of(self, model: str) -> str | None:
        """The adapter behind a name that `check_model` gave; None: the base alone."""
        return model if model not in self.model_names and model in self.adapters else None

    # requests

    def arrive(self, key: str = "") -> Ticket:
        """Take a slot for a request that has just arrived, before anything of it is read."""
        try:
            self.lifecycle.check_open()
        except Unavailable:
            self._rejected("not_ready" if self.lifecycle.stage is Stage.STARTING else "draining")
            raise
        return self.admission.arrive(key)

    async def start(self, request: TextRequest, ticket: Ticket, *, stream: bool) -> Generation:
        """Prepare a request and book what it needs; nothing is queued in the engine until the result is read."""
        engine = self.engine
        prepared = await _off_loop(_size(request), lambda: prepare(request, engine, self.limits, stream=stream))
        ticket.extend(samples=prepared.drawn * len(prepared.prompts), tokens=prepared.prompt_tokens)
        return Generation(engine, request, prepared, ticket, self._running)

    async def tokenize(self, request: TextRequest) -> list[int]:
        """Token ids of a prompt or of a rendered conversation."""
        engine = self.engine

        def work() -> list[int]:
            text = render(request, engine) if request.messages is not None else request.prompts[0]
            return engine.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)

        return await _off_loop(_size(request), work)

    async def detokenize(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        engine = self.engine
        return await _off_loop(len(token_ids), lambda: engine.tokenizer.decode(token_ids, skip_special_tokens=False))

    # end

    def abort_all(self, reason: QuireError) -> int:
        """End every running request with `reason`; gives their number."""
        generations = set(self._running.values())
        for generation in generations:
            generation.abort(reason)
        return len(generations)

    def shutdown(self) -> None:
        """Stop the engine, if there is one."""
        self.lifecycle.advance(Stage.STOPPED)
        if self.fine_tuning is not None:
            self.fine_tuning.close()
        self.adapters.close()
        if self._engine is not None:
            self._engine.shutdown()

    # health

    def alive(self) -> bool:
        """False only when nothing but a restart will help."""
        return self._engine is None or self._engine.heartbeat().alive

    def failing(self) -> list[str]:
        """The names of failing checks; empty means ready. A busy engine is ready."""
        if self.lifecycle.stage is Stage.STARTING:
            return ["loading"]
        if self.lifecycle.stage is not Stage.READY:
            return [self.lifecycle.stage.value]
        heartbeat = self._engine.heartbeat()
        if not heartbeat.alive:
            return ["engine"]
        return ["stalled"] if self._stall.stalled(heartbeat) else []

    def _rejected(self, reason: str) -> None:
        if self._engine is not None:
            self._engine.metrics.reject(reason)


class _StallWatch:
    """Sees a running batch whose step counter stands still, or a loop that does not turn, which an idle one does too."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._steps, self._since = -1, clock()
        self._told = False

    def stalled(self, heartbeat: Any) -> bool:
        now = self._clock()
        if heartbeat.steps != self._steps or heartbeat.running == 0:
            self._steps, self._since = heartbeat.steps, now
        stalled = now - self._since > self._seconds or heartbeat.age_s > self._seconds
        if stalled and not self._told:
            log.error("the engine has not finished a step for %.0f s; stacks follow", max(now - self._since, heartbeat.age_s))
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        self._told = stalled
        return stalled


def _size(request: TextRequest) -> int:
    """Roughly how much text there is to render and tokenize."""
    if request.messages is not None:
        return sum(len(str(message.get("content") or "")) for message in request.messages) + 64 * len(request.messages)
    return sum(len(prompt) for prompt in request.prompts)


async def _off_loop(size: int, work: Callable[[], Any]) -> Any:
    """Run `work` here if it is small, else on another thread, so that other requests' streams go on."""
    return work() if size <= SMALL_TEXT else await asyncio.to_thread(work)
