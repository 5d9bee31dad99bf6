"""The benchmark's model in every form that an engine reads, made once in a work folder. Nothing is downloaded.

`Work(folder, shape).path(form)` says where a form lies, `make(form)` makes it. Forms: bf16 and adapters (ours), w8a8 and w4a16
(compressed-tensors), gguf-bf16, gguf-q8_0 and gguf-q4_0 (llama.cpp), ov-fp16, ov-int8 and ov-int4 (OpenVINO).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import peers
from benchmarks.random_model import SHAPES

REPOSITORY = Path(__file__).parents[2]
GGUF = {"gguf-bf16": "bf16", "gguf-q8_0": "Q8_0", "gguf-q4_0": "Q4_0"}
OPENVINO = {"ov-fp16": "fp16", "ov-int8": "int8", "ov-int4": "int4"}
FORMS = ("bf16", "adapters", "w8a8", "w4a16", *GGUF, *OPENVINO)
ADAPTERS = 8


class CannotMake(Exception):
    """A form cannot be made here."""


class Work:
    """The forms of one shape. folder: of all shapes; installed: the folder of peers, None if there is none."""

    def __init__(self, folder: Path, shape: str, installed: Path | None) -> None:
        self.shape, self._folder, self._peers = shape, folder / shape, installed
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, form: str) -> Path:
        return self._folder / (f"{GGUF[form]}.gguf" if form in GGUF else form)

    def there(self, form: str) -> bool:
        """Forms are made beside their place and moved there when complete."""
        return self.path(form).exists()

    def make(self, form: str) -> None:
        """Make a form, and what it is made of. Raises CannotMake."""
        if self.there(form):
            return
        print(f"making {form} of {self.shape} ...", file=sys.stderr, flush=True)
        part = self._folder / f"part-{self.path(form).name}"
        if part.is_dir():
            shutil.rmtree(part)
        if form != "bf16":
            self.make("bf16")
        if form in ("bf16", "adapters"):
            self._ours(form, part)
        elif form in GGUF:
            self._gguf(form, part)
        elif form in OPENVINO:
            self._openvino(form, part)
        else:
            statement = f"compressed.write({_is(self.path('bf16'))}, {_is(part)}, {form!r})"
            _separately("from benchmarks.engines import compressed", statement)
        part.rename(self.path(form))

    def weight_bytes(self, form: str) -> int:
        """What one step reads: with the head's matrix also the embedding's, that is the whole of the weights' file."""
        path = self.path(form)
        files = [path] if path.is_file() else [*path.glob("model*.safetensors"), *path.glob("openvino_model.bin")]
        return sum(file.stat().st_size for file in files)

    def _ours(self, form: str, part: Path) -> None:
        models, shape = "from benchmarks import random_model as made", f"made.SHAPES[{self.shape!r}]"
        assert self.shape in SHAPES
        if form == "bf16":
            _separately(models, f"made.write({_is(part)}, {shape}, full_tokenizer=True)")
        else:
            _separately(models, f"[made.write_adapter({_is(part)} / str(n), {shape}, 100 + n) for n in range({ADAPTERS})]")

    def _gguf(self, form: str, part: Path) -> None:
        folder = self._needed()
        if form == "gguf-bf16":
            script = Path(__file__).with_name("to_gguf.py")
            _run(folder / "hf/bin/python", script, peers.llama_source(folder), self.path("bf16"), part)
        else:
            self.make("gguf-bf16")
            _run(folder / "llama-build/bin/llama-quantize", self.path("gguf-bf16"), part, GGUF[form])

    def _openvino(self, form: str, part: Path) -> None:
        task = ("--task", "text-generation-with-past", "--weight-format", OPENVINO[form])
        _run(self._needed() / "ovx/bin/optimum-cli", "export", "openvino", "-m", self.path("bf16"), *task, part)

    def _needed(self) -> Path:
        if self._peers is None:
            raise CannotMake("needs the peers' own tools (--peers DIR)")
        return self._peers


def _is(path: Path) -> str:
    return f"pathlib.Path({str(path)!r})"


def _separately(imports: str, statement: str) -> None:
    """In a process of its own, whose memory is gone afterwards."""
    _run(sys.executable, "-c", f"import pathlib; {imports}; {statement}")


def _run(*words: str | Path) -> None:
    """A tool; what it prints is shown only if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [str(word) for word in words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CannotMake(f"{Path(words[0]).name}: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise CannotMake(f"{Path(words[0]).name} failed: {' | '.join(lines[-3:])[:400]}")
