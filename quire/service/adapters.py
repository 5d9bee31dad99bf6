"""The adapters that a server offers: those named at start, a directory that is watched, and those that requests bring.

What is on the disk under the directory is what is served: an upload is written aside, checked, then renamed, and a folder that
appears there, changes or vanishes is followed. Knows files and names; knows no HTTP and no slot. Every method may be called
from any thread, and all but `check_name` and look-ups read or write files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import AdapterError, ConfigError, InvalidRequest, NotFound, QuireError, Refused
from quire.log import logger

log = logger(__name__)

FILES = (
    "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "quire.json", "README.md",
)  # fmt: skip
"""What an upload may consist of; the first two it must have."""
_STORED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_UPLOAD, _OLD = ".upload-", ".old-"


class InvalidUserInput(InvalidRequest):
    """vLLM's type of error for its two LoRA routes."""

    type = "InvalidUserInput"


@dataclass(frozen=True)
class Module:
    """One `--lora-modules`: a name, its folder, and the base that it says it belongs to."""

    name: str
    path: str
    base_model_name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Module:
        """`name=path`, or a JSON object with name, path and base_model_name. Raises ConfigError."""
        if not text.lstrip().startswith("{"):
            name, _, path = text.partition("=")
            fields: dict[str, Any] = {"name": name, "path": path}
        else:
            try:
                fields = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"lora_modules must be name=path or a JSON object, got {text!r} ({error}).") from None
        unknown = set(fields) - {"name", "path", "base_model_name"}
        if unknown:
            raise ConfigError(f"lora_modules cannot have {sorted(unknown)[0]!r}; known are name, path and base_model_name.")
        values = {name: value for name, value in fields.items() if value is not None}
        if not all(isinstance(values.get(name), str) and values[name] for name in ("name", "path")):
            raise ConfigError(f"lora_modules must be name=path or a JSON object with both, got {text!r}.")
        return cls(**values)


@dataclass(frozen=True)
class AdapterOptions:
    """modules: registered at start. directory: watched, and where uploads go. allowed: folders below which a request may name a
    path; any_path: it may name any. max_bytes: of one upload."""

    modules: tuple[Module, ...] = ()
    directory: Path | None = None
    allowed: tuple[Path, ...] = ()
    any_path: bool = False
    max_bytes: int = 2 << 30
    watch_seconds: float = 2.0


class Adapters:
    """See the module. `open` comes first, with the engine's adapters."""

    def __init__(self, options: AdapterOptions) -> None:
        self.options = options
        self.parents: dict[str, str] = {}
        self.opened = False
        self._manager: Any = None
        self._base_names: tuple[str, ...] = ()
        self._files = threading.RLock()
        """Held while something under the directory is read or changed."""
        self._seen: dict[str, tuple] = {}
        self._ours: set[str] = set()
        """Names that follow the directory."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def open(self, manager: Any, base_names: tuple[str, ...]) -> None:
        """Register what was named at start and what lies in the directory, and begin to watch it. manager: None if the engine
        serves no adapters. Raises ConfigError, AdapterError."""
        options, self.opened = self.options, True
        if manager is None:
            if options.modules or options.directory or options.allowed:
                raise ConfigError("lora_modules, lora_dir and allowed_lora_path need --enable-lora.")
            return
        self._manager, self._base_names = manager, base_names
        for module in options.modules:
            self._check_name(module.name, "lora_modules")
            try:
                manager.add(module.name, Path(module.path).expanduser())
            except (AdapterError, InvalidRequest) as error:
                raise ConfigError(f"lora_modules: {module.name}: {error}") from error
            if module.base_model_name is not None:
                self.parents[module.name] = module.base_model_name
        if options.directory is not None:
            options.directory.mkdir(parents=True, exist_ok=True)
            _clear_up(options.directory)
            self.look(settled=True)
            self._thread = threading.Thread(target=self._watch, name="quire-lora-dir", daemon=True)
            self._thread.start()
        log.info("%d adapters registered", len(manager.names()))

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    @property
    def served(self) -> bool:
        return self._manager is not None

    @property
    def manager(self) -> Any:
        """The engine's adapters. Raises Refused where there are none."""
        if self._manager is None:
            raise Refused("This server serves no adapters: start it with --enable-lora.")
        return self._manager

    # -- look-ups -----------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return self._manager is not None and name in self._manager

    def names(self) -> list[str]:
        return [] if self._manager is None else self._manager.names()

    def card(self, name: str) -> dict[str, Any]:
        """What is told of an adapter. Raises NotFound."""
        facts = self.manager.get(name)
        return {
            "id": name,
            "object": "adapter",
            "created": facts.created,
            "parent": self.parents.get(name, self._base_names[0]),
            "root": facts.folder.name if facts.folder is not None else name,
            "rank": facts.rank,
            "bytes": facts.bytes,
            "digest": facts.digest,
            "in_memory": self.manager.in_memory(facts.digest),
            "own_chat_template": facts.chat_template is not None,
        }

    # -- what requests ask --------------------------------------------------------------------------------------------

    def load(self, name: str, path: str, in_place: bool) -> None:
        """vLLM's load_lora_adapter. Raises InvalidUserInput, NotFound, AdapterError."""
        manager = self.manager
        self._check_name(name, "lora_name")
        if name in manager and not in_place:
            raise InvalidUserInput(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                parameter="lora_name",
            )
        folder = self._permitted(path)
        if not (folder / FILES[0]).is_file():
            raise NotFound(f"Loading lora {name} failed: No adapter found for {path[:200]}", parameter="lora_path")
        manager.add(name, folder, replace=in_place)

    def unload(self, name: str) -> None:
        """vLLM's unload_lora_adapter: the name is gone until the server starts again or the folder changes; files stay."""
        if name not in self.manager:
            raise NotFound(f"The lora adapter '{name[:200]}' cannot be found.", parameter="lora_name")
        self.manager.remove(name)
        self.parents.pop(name, None)

    def begin(self, name: str) -> Upload:
        """Room for an upload under `name`. Raises Refused without a directory, InvalidRequest for a name that cannot be."""
        self._check_name(name, "name")
        if self.manager is not None and self.options.directory is None:
            raise Refused("This server keeps no uploaded adapters: start it with --lora-dir FOLDER.")
        if not _STORED_NAME.fullmatch(name):
            raise InvalidRequest(
                f"name must have 1 to 128 letters, digits or any of ._:- and begin with a letter or digit, got {name[:140]!r}.",
                parameter="name",
            )
        return Upload(self.options.directory, name, self.options.max_bytes)

    def keep(self, upload: Upload) -> bool:
        """Check a whole upload and serve it; when this returns it is on the disk. True if the name is new."""
        manager, folder = self.manager, upload.target
        upload.finish()
        adapter = manager.read(upload.folder)
        with self._files:
            new = upload.name not in manager
            upload.place()
            manager.add(upload.name, adapter, replace=True, folder=folder)
            self._ours.add(upload.name)
            self._seen[upload.name] = _fingerprint(folder)
        return new

    def delete(self, name: str) -> None:
        """Forget an adapter, and its folder if that lies in the directory. Raises NotFound."""
        with self._files:
            facts = self.manager.get(name)
            directory = self.options.directory
            inside = directory is not None and facts.folder is not None and facts.folder.parent == directory
            if inside:
                gone = directory / f"{_UPLOAD}{uuid.uuid4().hex}"
                facts.folder.rename(gone)
                _synchronize(directory)
                self._seen.pop(name, None)
                self._ours.discard(name)
                shutil.rmtree(gone, ignore_errors=True)
            self.manager.remove(name)
            self.parents.pop(name, None)

    def _check_name(self, name: str, parameter: str) -> None:
        if name in self._base_names:
            raise InvalidUserInput(f"{parameter} is the name of the base model: {name!r}.", parameter=parameter)

    def _permitted(self, path: str) -> Path:
        """The folder that a request names, if the operator lets requests name it. Nothing is said of any other."""
        directory = self.options.directory
        places = [place for place in (directory, *self.options.allowed) if place is not None]
        try:
            folder = ((directory or Path()) / Path(path)).resolve()
            allowed = any(folder.is_relative_to(place.resolve()) and folder != place.resolve() for place in places)
        except (OSError, ValueError, RuntimeError):
            allowed = False
        if not (allowed or self.options.any_path):
            raise InvalidUserInput(
                "lora_path must lie below --lora-dir or an --allowed-lora-path of this server, and does not. With "
                "QUIRE_ALLOW_RUNTIME_LORA_UPDATING=1 it may be any path of its machine.",
                parameter="lora_path",
            )
        return folder

    # -- the directory ------------------------------------------------------------------------------------------------

    def look(self, *, settled: bool = False) -> None:
        """Follow the directory once. settled: nobody is writing now; else a folder must look the same twice."""
        directory = self.options.directory
        assert directory is not None
        with self._files:
            found = {path.name: path for path in sorted(directory.iterdir()) if not path.name.startswith(".") and path.is_dir()}
            for name in [name for name in self._ours if name not in found]:
                self._ours.discard(name)
                if name in self._manager:
                    self._manager.remove(name)
            self._seen = {name: seen for name, seen in self._seen.items() if name in found}
            for name, folder in found.items():
                self._follow(name, folder, settled)

    def _follow(self, name: str, folder: Path, settled: bool) -> None:
        now, before = _fingerprint(folder), self._seen.get(name)
        if now == before or not now:
            return
        if not settled and before != ("unsettled", now):
            self._seen[name] = ("unsettled", now)
            return
        self._seen[name] = now
        try:
            self._check_name(name, "lora_dir")
            if name in self._manager and name not in self._ours:
                raise InvalidRequest("the name is taken by an adapter from elsewhere.")
            self._manager.add(name, folder, replace=True)
            self._ours.add(name)
        except QuireError as error:
            log.warning("lora_dir: %s is not served: %s", name, error)

    def _watch(self) -> None:
        while not self._stop.wait(self.options.watch_seconds):
            try:
                self.look()
            except Exception:
                log.exception("the adapter directory could not be read")


class Upload:
    """One adapter on its way in: files under a name that nobody looks at, until `place`."""

    def __init__(self, directory: Path, name: str, most: int) -> None:
        self.name, self.target = name, directory / name
        self.folder = directory / f"{_UPLOAD}{uuid.uuid4().hex}"
        self.size = 0
        self._most = most
        self._files: dict[str, Any] = {}
        self.folder.mkdir(mode=0o700)

    def write(self, name: str, piece: bytes) -> None:
        """Add to one of FILES. Raises InvalidRequest for another name, or too many bytes."""
        if name not in FILES:
            raise InvalidRequest(f"an adapter has the files {', '.join(FILES)}; got {name[:100]!r}.", parameter=name[:100])
        self.size += len(piece)
        if self.size > self._most:
            raise InvalidRequest(f"an adapter may have {self._most} bytes (--max-adapter-bytes).", parameter=name)
        if name not in self._files:
            self._files[name] = (self.folder / name).open("xb")
        self._files[name].write(piece)

    def has(self, name: str) -> bool:
        return name in self._files

    def finish(self) -> None:
        """All has come. Raises InvalidRequest if something is missing."""
        for name in FILES[:2]:
            if name not in self._files:
                raise InvalidRequest(f"the file {name} is required.", parameter=name)
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def place(self) -> None:
        """Put it where it is found, in place of what was there. After a crash in between, `_clear_up` brings the old back."""
        self.folder.chmod(0o755)
        _synchronize(self.folder)
        old = self.target.parent / f"{_OLD}{uuid.uuid4().hex}-{self.name}"
        if self.target.exists():
            self.target.rename(old)
        self.folder.rename(self.target)
        _synchronize(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was not placed."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _clear_up(directory: Path) -> None:
    """Remove what uploads of an earlier life have left."""
    for left in directory.glob(f"{_UPLOAD}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(f"{_OLD}*"):
        target = directory / left.name.removeprefix(_OLD).partition("-")[2]
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(target)
            _synchronize(directory)


def _fingerprint(folder: Path) -> tuple:
    """What changes when a file of the folder does; empty while there is no adapter."""
    if not (folder / FILES[0]).is_file():
        return ()
    return tuple(sorted((path.name, *_facts(path)) for path in _entries(folder)))


def _entries(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())


def _facts(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _synchronize(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
