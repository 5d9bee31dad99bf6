"""PEFT's adapter folder, read and written. Knows no slot and no server.

What is read is checked whole before it is used: every tensor has its module, every module its tensors, all of them finite.
What is written is complete or not there: a temporary folder beside it, synchronized, then renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from quire import __version__
from quire.errors import AdapterError, ModelError
from quire.lora.base import written_names
from quire.lora.config import ALL_LINEAR, LoraConfig, parse_lora_config
from quire.lora.keys import parts_of, tensors_of
from quire.lora.parts import Adapter, ModulePart
from quire.models.decoder import CausalLM
from quire.weights.tensors import stored_tensors

__all__ = ["Adapter", "ModulePart", "read_adapter", "write_adapter"]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TEMPLATE, SPECIAL = "chat_template.jinja", "special_tokens_map.json"
# Our own file: what the folder was made on, and the hashes of its files.
NOTES = "quire.json"


def read_adapter(folder: Path, model: CausalLM, *, allow_pickle: bool = False, max_rank: int | None = None) -> Adapter:
    """The adapter in `folder` for `model`. Raises AdapterError naming the file, the tensor, what is expected and found.

    allow_pickle: read adapter_model.bin where there are no safetensors (plain tensors only, by the operator's leave).
    """
    config = read_config(folder)
    notes = _notes(folder)
    config, parts = parts_of(read_tensors(folder, allow_pickle=allow_pickle), config, model)
    adapter = Adapter(
        config,
        parts,
        notes.get("base_digest"),
        _chat_template(folder),
        _special_tokens(folder),
        written_names(model, parts),
    )
    if not parts:
        raise AdapterError(f"{TENSORS} has no tensors.")
    if max_rank is not None and adapter.rank > max_rank:
        message = f"the adapter's rank is {adapter.rank}; at most {max_rank} is served (max_lora_rank)."
        raise AdapterError(message, parameter="r")
    return adapter


def _notes(folder: Path) -> dict[str, Any]:
    """What Quire wrote beside PEFT's files, where it did. Raises AdapterError if the tensors are not those it wrote."""
    path = folder / NOTES
    if not path.is_file():
        return {}
    notes = _json(path)
    expected = notes.get("sha256", {}).get(TENSORS) if isinstance(notes.get("sha256"), dict) else None
    if expected is not None and (folder / TENSORS).is_file():
        found = _sha256(folder / TENSORS)
        if found != expected:
            raise AdapterError(f"{TENSORS} is damaged: its sha256 is {found}; {NOTES} says {expected}.")
    return notes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chat_template(folder: Path) -> str | None:
    """The template that lies in the folder: a file of its own, or in the tokenizer's configuration."""
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    stored = _json(path).get("chat_template") if path.is_file() else None
    if isinstance(stored, list):
        named = {one.get("name"): one.get("template") for one in stored if isinstance(one, dict)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by what they are for (`eos_token` and the like)."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", SPECIAL):
        for key, value in (_json(folder / name) if (folder / name).is_file() else {}).items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}.") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path.name} is not a JSON object.")
    return raw


def read_config(folder: Path) -> LoraConfig:
    """adapter_config.json of `folder`. Raises AdapterError."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"there is no {CONFIG} in {folder.name!r}.")
    return parse_lora_config(_json(folder / CONFIG))


def read_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of the folder by name, as they are stored. Raises AdapterError."""
    path = folder / TENSORS
    if not path.is_file():
        if not (folder / PICKLE).is_file():
            raise AdapterError(f"there is no {TENSORS} in {folder.name!r}.")
        if not allow_pickle:
            raise AdapterError(f"{PICKLE} is a pickle file, which is not read; convert it to {TENSORS}.")
        path = folder / PICKLE
    try:
        return {name: tensor.clone() for name, tensor in stored_tensors(path)}
    except ModelError as error:
        raise AdapterError(str(error)) from None


def write_adapter(
    folder: Path, adapter: Adapter, *, base_name: str | None = None, extra_files: Mapping[str, str | bytes] | None = None
) -> None:
    """PEFT's folder of `adapter` at `folder`; one that is there is replaced whole.

    base_name: what `base_model_name_or_path` says. extra_files: further files by name (a tokenizer, metrics).
    """
    files = _files(adapter, base_name)
    for name, content in (extra_files or {}).items():
        assert Path(name).name == name, f"{name} is not a file's name"
        files[name] = content.encode() if isinstance(content, str) else content
    notes = {
        "format": 1,
        "quire_version": __version__,
        "digest": adapter.digest,
        "base_digest": adapter.base_digest,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    files[NOTES] = _pretty(notes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        fresh, old = Path(place) / "new", Path(place) / "old"
        fresh.mkdir()
        for name, content in files.items():
            with (fresh / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _synchronize(fresh)
        if not _exchanged(fresh, folder):
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
        _synchronize(folder.parent)


def _files(adapter: Adapter, base_name: str | None) -> dict[str, bytes]:
    config = adapter.config
    if config.target_modules is None or config.target_modules == ALL_LINEAR:
        whole = tuple(sorted(adapter.written_as.get(name, name) for name, part in adapter.parts.items() if part.a is not None))
        config = replace(config, target_modules=whole)
    if base_name is not None:
        config = replace(config, base_model_name_or_path=base_name)
    files = {
        CONFIG: _pretty(config.to_json()),
        TENSORS: save(tensors_of(adapter.parts, config, adapter.written_as), metadata={"format": "pt"}),
        "README.md": _readme(adapter, config).encode(),
    }
    if adapter.chat_template is not None:
        files[TEMPLATE] = adapter.chat_template.encode()
    if adapter.special_tokens:
        files[SPECIAL] = _pretty(dict(adapter.special_tokens))
    return files


def _pretty(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _readme(adapter: Adapter, config: LoraConfig) -> str:
    """A model card, with the fields at its head that the hub reads."""
    base = config.base_model_name_or_path
    head = [f"base_model: {json.dumps(base)}"] if base else []
    head += ["library_name: peft", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in ("lora", "quire"))]
    count = sum(tensor.numel() for tensor in adapter.tensors().values())
    lines = [
        "---", *head, "---", "",
        f"# LoRA adapter{f' of {base}' if base else ''}", "",
        f"{count:,} parameters in {len(adapter.parts)} modules, largest rank {adapter.rank}, float32, by Quire {__version__}.",
        "",
        f"Serve it with `quire serve {base or 'BASE'} --enable-lora --lora-modules NAME=FOLDER`, or load it with PEFT:", "",
        "```python",
        "from peft import AutoPeftModelForCausalLM", "",
        'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")',
        "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _exchanged(fresh: Path, folder: Path) -> bool:
    """Whether the two folders could change places in one instant (Linux), so that there is never none."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return exchange is not None and exchange(here, os.fsencode(fresh), here, os.fsencode(folder), both) == 0


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
