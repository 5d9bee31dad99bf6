"""The adapters that jobs have made: on the disk in folders of job ids and step numbers, served under the names in the store."""

from __future__ import annotations

import shutil
from pathlib import Path

from quire.errors import AdapterError, QuireError
from quire.log import logger
from quire.lora.adapter import write_adapter
from quire.lora.manager import AdapterManager
from quire.lora.parts import Adapter
from quire.service.jobs import Jobs
from quire.service.stamp import Stamp

log = logger(__name__)


class Shelf:
    """See the module. manager: what the engine serves."""

    def __init__(self, folder: Path, manager: AdapterManager, jobs: Jobs, stamp: Stamp) -> None:
        self._folder, self._manager, self._jobs, self._stamp = folder, manager, jobs, stamp

    def open(self) -> None:
        """Serve what was made on this base; what was made on another waits for its base."""
        for row in self._jobs.models():
            folder = self._folder / row["folder"]
            try:
                if not (folder / "adapter_config.json").is_file():
                    raise AdapterError("its folder is not there.")
                if not self._stamp.fits(folder):
                    log.info("model %s was trained on another base and is not served", row["name"])
                    continue
                self._manager.add(row["name"], folder, replace=True)
            except QuireError as error:
                log.error("model %s cannot be served: %s", row["name"], error)

    def put(self, name: str, folder: str, adapter: Adapter) -> None:
        """Write an adapter and answer under its name; whole on the disk before anybody can ask for it."""
        place = self._folder / folder
        write_adapter(place, adapter, base_name=self._stamp.base_name)
        self._manager.add(name, adapter, replace=True, folder=place)

    def take_back(self, name: str, folder: str) -> None:
        """Undo `put`: the job has ended otherwise."""
        if name in self._manager:
            self._manager.remove(name)
        shutil.rmtree(self._folder / folder, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Forget a model that is in the store: first there, then its name, then its files."""
        rows = [row for row in self._jobs.models() if row["name"] == name]
        self._jobs.delete_model(name)
        for row in rows:
            self.take_back(name, row["folder"])
