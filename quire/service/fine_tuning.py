"""Files and fine-tuning jobs of one server: the data folder, and the trainer once there is an engine.

A folder belongs to one process at a time. Everything under it is Quire's: names from requests never become paths. Knows no
HTTP; what brings torch is imported when the engine is there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quire.errors import ConfigError, InvalidRequest, NotFound
from quire.log import logger
from quire.service.blobs import Blobs
from quire.service.files import Files
from quire.service.job_request import JobRequest, resolved, training_config
from quire.service.jobs import Job, Jobs
from quire.service.permissions import Permissions
from quire.service.store import Store
from quire.service.uploads import Uploads

if TYPE_CHECKING:
    from quire.service.trainer import Trainer

log = logger(__name__)


class FineTuning:
    """latency_budget: seconds that training may add to a step in which requests run. most_bytes: of a file in parts."""

    def __init__(
        self, folder: Path, *, latency_budget: float, most_training: int, most_unfinished: int, most_bytes: int
    ) -> None:
        self.folder, self.latency_budget, self.most_training = folder, latency_budget, most_training
        self.uploads = 0
        self._lock = _own(folder)
        self._store = Store(folder)
        self.files = Files(self._store, Blobs(folder))
        self.parts = Uploads(self._store, self.files, folder, most_bytes)
        self.jobs = Jobs(self._store, self.files, most_unfinished)
        self.permissions = Permissions(self._store, self.jobs)
        self._names: tuple[str, ...] = ()
        self._most_rank = 0
        self._engine: Any = None
        self._trainer: Trainer | None = None

    def attach(self, engine: Any, names: Sequence[str]) -> None:
        """The model is loaded under `names`: serve what was trained on it, go on with the jobs that were not finished."""
        from quire.service.trainer import Trainer

        if engine.adapters is None:
            raise ConfigError("enable_fine_tuning needs enable_lora: what is trained could not be served.")
        self._most_rank = engine.config.max_lora_rank
        self._names, self._engine = tuple(names), engine
        self._trainer = Trainer(engine, self.jobs, self.files, self.folder, self.latency_budget, self.most_training)
        self._trainer.start()
        gaps, trainer = self._trainer.gaps, self._trainer
        watch = engine.metrics.watch
        watch("training_jobs", "Fine-tuning jobs that train now.", lambda: trainer.num_active)
        watch("training_piece_seconds", "How long a piece of training is expected to take.", lambda: gaps.typical)
        watch(
            "training_added_seconds_max",
            "The most that training has added to a step in which requests ran.",
            lambda: gaps.longest_between_steps,
        )

    def create_job(self, owner: str, request: JobRequest) -> Job:
        """A new job on the served model."""
        if request.model not in self._names:
            raise InvalidRequest(
                f"Model {request.model[:200]} is not available for fine-tuning or does not exist. "
                f"This server trains {', '.join(self._names)}.",
                parameter="model",
                code="model_not_available",
            )
        training = training_config(request, resolved(request.hyperparameters, 1), 0)
        config = training.lora_config()
        rank = max((config.r, *config.rank_pattern.values()))
        if rank > self._most_rank:
            raise InvalidRequest(
                f"lora.r must be at most {self._most_rank} on this server (--max-lora-rank), got {rank}.", parameter="lora.r"
            )
        assert self._trainer is not None
        from quire.service.room import refuse_what_never_fits

        refuse_what_never_fits(self._engine, training)
        return self.jobs.create(owner, request, base_part(self._names[0]), self._trainer.base_digest)

    @property
    def training(self) -> int:
        """Jobs whose runs are in memory."""
        return 0 if self._trainer is None else self._trainer.num_active

    def sees(self, owner: str, name: str) -> bool:
        """Whether `owner` may use the adapter `name`: all but what jobs of other keys have made."""
        return not name.startswith("ft:") or self.jobs.model(owner, name) is not None

    def remove_model(self, owner: str, name: str) -> None:
        """Serve a model that a job of `owner` made no longer, and forget its files. Raises NotFound."""
        if self.jobs.model(owner, name) is None or self._trainer is None:
            raise NotFound(f"The model `{name[:200]}` does not exist.", parameter="model")
        self._trainer.shelf.remove(name)

    def close(self) -> None:
        """Stop training where it stands and close the folder; what was told is on the disk already."""
        if self._trainer is not None:
            self._trainer.stop()
        self._store.close()
        self._lock.close()


def base_part(name: str) -> str:
    """A model's name as a part of others: without the characters that divide them."""
    return name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-") or "model"


def _own(folder: Path) -> IO[str]:
    """Take the folder for this process; the system gives it back when the process ends, however it does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = (folder / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"data_dir cannot be used: {error.strerror} ({folder}).") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ConfigError(f"data_dir is in use by another server (process {holder}): {folder}.") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
