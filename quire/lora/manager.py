"""The adapters of one base by their names, and which of them are in memory.

A name stands for a content, known by its digest; putting new weights under a name changes what the name stands for and nothing
else. Contents that have a folder are read when a request needs them and dropped again, least recently used first, so that at
most `max_cpu_loras` are in memory; those that were made in memory stay there. What a request uses is never dropped. Reading is
done by a thread of its own. Every method may be called from any thread. Knows no slot, no step and no route.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quire.errors import AdapterError, InvalidRequest, NotFound, QuireError, did_you_mean
from quire.log import logger
from quire.lora.adapter import Adapter, read_adapter
from quire.lora.combine import Combination, combine
from quire.lora.request import check_name
from quire.lora.slots import Slots
from quire.weights.memory import give_back_freed

log = logger(__name__)
MOST_REGISTERED = 4096
# So many requests whose adapter is in memory may begin before one that came first and waits for memory.
MOST_PASSES = 32
# After a content was dropped, its slot is emptied between two steps; then its memory can go back to the system.
SETTLE_SECONDS = 0.5


@dataclass(frozen=True)
class Registered:
    """What a name stands for. folder: where it can be read again, None if it is in memory only. created: Unix time."""

    name: str
    digest: str
    rank: int
    bytes: int
    folder: Path | None
    chat_template: str | None
    created: int


class Lease:
    """One request's hold on an adapter: first `settled`, then either in memory until it is given back, or failed."""

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest
        self.settled = self.held = False
        self.error: QuireError | None = None
        self.num_passed = 0


class _Content:
    """One adapter's weights, whatever it is called. uses: leases that hold it; loading: its place in memory is taken."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.folder: Path | None = None
        self.adapter: Adapter | None = None
        self.uses = 0
        self.loading = False


class AdapterManager:
    """See the module. on_change: called (from any thread) when a lease has settled or a content is gone. on_read: with the
    seconds that reading a folder took and whether it was good. base_digest, base_template: of the base (`base.base_digest`),
    to compare with what adapters say."""

    def __init__(
        self,
        slots: Slots,
        *,
        max_cpu_loras: int,
        max_rank: int,
        base_digest: str | None = None,
        base_template: str | None = None,
        on_read: Callable[[float, bool], None] = lambda seconds, ok: None,
    ) -> None:
        self.max_cpu_loras, self.max_rank = max_cpu_loras, max_rank
        self._on_read = on_read
        self.on_change: Callable[[], None] = lambda: None
        self._slots, self._base_digest, self._base_template = slots, base_digest, base_template
        self._names: dict[str, Registered] = {}
        self._contents: dict[str, _Content] = {}
        self._kept: OrderedDict[str, None] = OrderedDict()
        """Contents with a folder that are in memory or being read, least recently used first."""
        self._queue: deque[Lease] = deque()
        self._changed = threading.Condition()
        self._dropped: float | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    # -- names --------------------------------------------------------------------------------------------------------

    def add(self, name: str, source: Path | Adapter, *, replace: bool = False, folder: Path | None = None) -> Registered:
        """Register a folder or an adapter under a name; `folder`: where the given adapter can be read again.

        Reads and checks the whole adapter before anything changes. Raises AdapterError or InvalidRequest.
        """
        check_name(name, "lora_name")
        self._check_free(name, replace)
        if isinstance(source, Adapter):
            adapter = source.frozen() if source.trainable else source
            self._check(adapter)
            self._slots.prepare(adapter)
        else:
            folder = Path(source)
            adapter = self.read(folder)
        facts = Registered(name, adapter.digest, adapter.rank, adapter.bytes, folder, adapter.chat_template, int(time.time()))
        with self._changed:
            self._check_free(name, replace)
            content = self._contents.setdefault(facts.digest, _Content(facts.digest))
            content.folder = folder or content.folder
            if content.adapter is None and not content.loading:
                self._keep(content, adapter)
            before = self._names.get(name)
            self._names[name] = facts
            if before is not None and before.digest != facts.digest:
                self._drop_if_unused(before.digest)
            self._advance()
        self._tell(facts, before)
        return facts

    def remove(self, name: str) -> Registered:
        """Forget a name. Requests that began with it finish; then its memory is free. Raises NotFound."""
        with self._changed:
            facts = self.get(name)
            del self._names[name]
            self._drop_if_unused(facts.digest)
            self._advance()
        log.info("adapter %s removed", name)
        self.on_change()
        return facts

    def get(self, name: str) -> Registered:
        """What a name stands for. Raises NotFound."""
        facts = self._names.get(name)
        if facts is None:
            raise NotFound(f"The model `{name[:200]}` does not exist.{did_you_mean(name, self.names())}", parameter="model")
        return facts

    def names(self) -> list[str]:
        """All names, in the order in which they came."""
        with self._changed:
            return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def adapter(self, name: str) -> Adapter:
        """The adapter of a name itself, read anew if it is not in memory."""
        facts = self.get(name)
        content = self._contents.get(facts.digest)
        adapter = content.adapter if content is not None else None
        if adapter is not None:
            return adapter
        if facts.folder is None:
            raise NotFound(f"The model `{name}` does not exist.", parameter="model")
        return self.read(facts.folder)

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: str = "linear",
        *,
        rank: int | None = None,
        density: float | None = None,
        replace: bool = False,
    ) -> Registered:
        """Register a weighted combination of registered adapters under a name. method, rank, density: see `combine`."""
        how = Combination(method, rank, density)
        return self.add(name, combine([self.adapter(part) for part in weights], list(weights.values()), how), replace=replace)

    # -- leases: for the engine's thread ------------------------------------------------------------------------------

    def lease(self, name: str, digest: str) -> Lease:
        """Ask for the content `digest`, which `name` stood for when it was looked up. If nothing has that content any more,
        what the name stands for now. The lease settles at once or in time; give it back in any case."""
        lease = Lease(name, digest)
        with self._changed:
            self._queue.append(lease)
            self._advance()
        return lease

    def give_back(self, lease: Lease) -> None:
        """The request has ended, whatever became of its lease."""
        with self._changed:
            if not lease.settled:
                self._settle(lease, NotFound("the request has ended."))
            elif lease.held:
                lease.held = False
                self._contents[lease.digest].uses -= 1
                self._drop_if_unused(lease.digest)
            self._advance()

    def leased(self, digest: str) -> Adapter:
        """A content that a settled lease holds."""
        adapter = self._contents[digest].adapter
        assert adapter is not None, "a content in use was dropped"
        return adapter

    def in_memory(self, digest: str) -> bool:
        content = self._contents.get(digest)
        return content is not None and content.adapter is not None

    @property
    def bytes_in_memory(self) -> int:
        with self._changed:
            return sum(content.adapter.bytes for content in self._contents.values() if content.adapter is not None)

    @property
    def num_in_memory(self) -> int:
        with self._changed:
            return sum(content.adapter is not None for content in self._contents.values())

    def wait(self, seconds: float) -> None:
        """Until something has changed, at most so long."""
        with self._changed:
            self._changed.wait(seconds)

    def close(self, *, wait: bool = True) -> None:
        """End the reading thread, which keeps the model alive."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if wait and self._thread is not None:
            self._thread.join(timeout=60)

    # -- memory: under the lock ---------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Settle what can be settled, and have the next content read. Contents in memory are asked for all the time: they let
        who waits for memory go first after a while, or else they would never leave it."""
        loading, short = any(content.loading for content in self._contents.values()), []
        for lease in list(self._queue):
            content = self._content_for(lease)
            if content is None:
                self._settle(lease, NotFound(f"The model `{lease.name}` does not exist any more.", parameter="model"))
            elif content.adapter is not None:
                if any(other.num_passed >= MOST_PASSES for other in short):
                    continue
                for other in short:
                    other.num_passed += 1
                content.uses += 1
                lease.held = True
                self._touch(content)
                self._settle(lease, None)
            elif not content.loading and not self._has_room():
                short.append(lease)
            elif not content.loading and not loading:
                self._make_room()
                content.loading = loading = True
                self._kept[content.digest] = None
                self._start_thread()
                self._changed.notify_all()

    def _content_for(self, lease: Lease) -> _Content | None:
        content = self._contents.get(lease.digest)
        if content is None and lease.name in self._names:
            lease.digest = self._names[lease.name].digest
            content = self._contents.get(lease.digest)
        return content

    def _settle(self, lease: Lease, error: QuireError | None) -> None:
        self._queue.remove(lease)
        lease.settled, lease.error = True, error
        self._changed.notify_all()

    def _keep(self, content: _Content, adapter: Adapter) -> None:
        """Keep what was read, if it must be or there is room for it."""
        if content.folder is None:
            content.adapter = adapter
        elif self._make_room():
            content.adapter = adapter
            self._kept[content.digest] = None

    def _touch(self, content: _Content) -> None:
        if content.digest in self._kept:
            self._kept.move_to_end(content.digest)

    def _has_room(self) -> bool:
        """Whether a place is free, or has a content that nobody uses."""
        return len(self._kept) < self.max_cpu_loras or self._oldest_unused() is not None

    def _make_room(self) -> bool:
        """Have a place free, dropping the content that nobody has used for longest; False if all are in use."""
        if len(self._kept) < self.max_cpu_loras:
            return True
        oldest = self._oldest_unused()
        if oldest is not None:
            self._contents[oldest].adapter = None
            del self._kept[oldest]
        return oldest is not None

    def _oldest_unused(self) -> str | None:
        contents = (self._contents[digest] for digest in self._kept)
        return next((content.digest for content in contents if not content.uses and not content.loading), None)

    def _drop_if_unused(self, digest: str) -> None:
        """Forget a content that no name stands for and no request uses."""
        content = self._contents.get(digest)
        if content is None or content.uses or content.loading or any(f.digest == digest for f in self._names.values()):
            return
        del self._contents[digest]
        self._kept.pop(digest, None)
        self._dropped = time.monotonic()
        self._start_thread()
        self._changed.notify_all()

    def _check_free(self, name: str, replace: bool) -> None:
        if name in self._names:
            if not replace:
                raise InvalidRequest(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                    "'load_inplace' to True.",
                    parameter="lora_name",
                )
        elif len(self._names) >= MOST_REGISTERED:
            raise InvalidRequest(f"at most {MOST_REGISTERED} adapters can be registered.", parameter="lora_name")

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, folder: Path) -> Adapter:
        """The adapter in a folder, ready to be placed. Raises AdapterError."""
        begin, ok = time.monotonic(), False
        try:
            adapter = read_adapter(folder, self._slots.model)
            self._check(adapter)
            self._slots.prepare(adapter)
            _ = adapter.digest  # computed here, not where others wait for it
            ok = True
        finally:
            self._on_read(time.monotonic() - begin, ok)
        return adapter

    def _check(self, adapter: Adapter) -> None:
        if adapter.rank > self.max_rank:
            raise AdapterError(f"LoRA rank {adapter.rank} is greater than max_lora_rank {self.max_rank}.", parameter="r")
        if None not in (adapter.base_digest, self._base_digest) and adapter.base_digest != self._base_digest:
            raise AdapterError(
                f"the adapter was trained on another base: base_digest in its quire.json is {adapter.base_digest[:12]}, this "
                f"model's is {self._base_digest[:12]}. Without quire.json it is served all the same, if its shapes fit.",
                parameter="base_digest",
            )

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_all, name="quire-adapters", daemon=True)
            self._thread.start()

    def _read_all(self) -> None:
        # What is read stays in no variable of this frame: while it waits, that would keep an adapter alive.
        while not self._closed:
            self._read_next()

    def _read_next(self) -> None:
        with self._changed:
            digest = self._next_to_read()
            content = None if digest is None else self._contents[digest]
        if content is None:
            give_back_freed()
            return
        adapter, error = None, None
        try:
            assert content.folder is not None
            adapter = self.read(content.folder)
        except QuireError as found:
            error = found
        except Exception as found:
            log.exception("reading the adapter in %s failed", content.folder)
            error = AdapterError(f"the adapter cannot be read: {type(found).__name__}.")
        with self._changed:
            self._take(content, adapter, error)
            self._advance()
            self._drop_if_unused(content.digest)
        self.on_change()

    def _next_to_read(self) -> str | None:
        """Wait for a content that is to be read; None: contents were dropped a moment ago, and memory is to be given back."""
        while not self._closed:
            digest = next((content.digest for content in self._contents.values() if content.loading), None)
            if digest is not None:
                return digest
            left = None if self._dropped is None else self._dropped + SETTLE_SECONDS - time.monotonic()
            if left is not None and left <= 0:
                self._dropped = None
                return None
            self._changed.wait(left)
        return None

    def _take(self, content: _Content, adapter: Adapter | None, error: QuireError | None) -> None:
        """What the thread has read, or why it could not."""
        content.loading = False
        if adapter is not None and adapter.digest == content.digest:
            content.adapter = adapter
            return
        del self._kept[content.digest]
        if adapter is not None:
            self._follow_folder(content, adapter)
        mine = [lease for lease in self._queue if lease.digest == content.digest]
        if adapter is not None:
            del self._contents[content.digest]  # the leases look for what their name stands for now
        else:
            for lease in mine:
                self._settle(lease, error)
            self._drop_if_unused(content.digest)

    def _follow_folder(self, content: _Content, adapter: Adapter) -> None:
        """The folder holds another adapter than it did when it was registered: so do the names that stand for it."""
        changed = self._contents.setdefault(adapter.digest, _Content(adapter.digest))
        changed.folder = changed.folder or content.folder
        for name, facts in list(self._names.items()):
            if facts.digest == content.digest:
                log.warning("adapter %s: its folder has changed; it is served as it is now", name)
                self._names[name] = Registered(
                    name, adapter.digest, adapter.rank, adapter.bytes, facts.folder, adapter.chat_template, int(time.time())
                )
        if changed.adapter is None and not changed.loading:
            self._keep(changed, adapter)
        self._drop_if_unused(changed.digest)

    def _tell(self, facts: Registered, before: Registered | None) -> None:
        log.info(
            "adapter %s %s: rank %d, %.1f MiB, content %s",
            facts.name,
            "added" if before is None else "replaced",
            facts.rank,
            facts.bytes / (1 << 20),
            facts.digest[:12],
        )
        if facts.chat_template is not None and facts.chat_template != self._base_template:
            log.warning("adapter %s has a chat template of its own, which is used for that name", facts.name)
        self.on_change()
