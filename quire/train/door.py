"""`quire.train(...)`: from a model's name and a file to an adapter's folder. What `quire train` does, it does through here.

Everything that can be wrong is found before weights are read: options, every line of the data, memory, the output folder.
"""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from quire import envs
from quire.errors import ConfigError
from quire.log import logger
from quire.models.config import ModelConfig, read_json, read_model_config
from quire.plan.hardware import probe
from quire.plan.memory import ITEM_BYTES, plan_dtype
from quire.quant.scheme import scheme_of
from quire.text.tokenizer import Tokenizer
from quire.train import checkpoint
from quire.train.config import TrainingConfig
from quire.train.data import Dataset, read_dataset, shared_rows
from quire.train.report import METRICS, StepReport, write_whole
from quire.weights.files import weight_sizes
from quire.weights.hub import resolve

if TYPE_CHECKING:
    from quire.lora.slots import Slots
    from quire.train.estimate import Estimate
    from quire.train.run import Sampler, TrainingRun

log = logger(__name__)

Data = str | Path | Sequence[Mapping[str, Any]]
OPTIONS = "training_options.json"


@dataclass(frozen=True)
class Prepared:
    """All that is known before the weights are read."""

    model: str
    folder: Path
    shape: ModelConfig
    tokenizer: Tokenizer
    config: TrainingConfig
    training: Dataset
    validation: Dataset | None
    dtype: str
    quantization: str | None
    chat_template: str | None
    revision: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(dataset.longest for dataset in (self.training, self.validation) if dataset is not None)

    def notes(self) -> list[str]:
        """What a user should know of the data."""
        found = [self.training.summary(), *self.training.notes]
        if self.validation is not None:
            found += [self.validation.summary(), *self.validation.notes]
            shared = shared_rows(self.training, self.validation)
            if shared:
                found.append(f"{shared:,} rows of the validation data are in the training data too: its loss will flatter.")
        return found


@dataclass(frozen=True)
class Trained:
    """What came of it. finished: False where Ctrl-C stopped it; `resume=True` goes on."""

    output_dir: Path
    finished: bool
    steps: int
    loss: float | None
    validation_loss: float | None
    trainable: int
    seconds: float


def train(
    model: str,
    data: Data,
    output_dir: str | Path,
    *,
    validation: Data | None = None,
    resume: bool = False,
    slots: Slots | None = None,
    sampler: Sampler | None = None,
    show: bool = True,
    **options: Any,
) -> Trained:
    """Train an adapter for `model` (a folder, a hub id or quire-tiny) on a JSONL file, or on a list of rows.

    options: those of `prepare` and TrainingConfig, under the names of transformers, peft and trl. resume: go on where the
    run in `output_dir` stopped, to the same bytes. slots: of this model, if it is loaded already (`LLM.slots`). sampler:
    answers prompts with an adapter, for `sample_steps`.
    Raises DataError with all bad lines, ConfigError, AdapterError, DoesNotFit, ModelError.
    """
    prepared = prepare(model, data, validation, **options)
    return train_prepared(prepared, Path(output_dir), resume=resume, slots=slots, sampler=sampler, show=show)


def prepare(
    model: str,
    data: Data,
    validation: Data | None = None,
    *,
    validation_split: float = 0.0,
    dtype: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    chat_template: str | None = None,
    threads: int | None = None,
    config: TrainingConfig | None = None,
    **options: Any,
) -> Prepared:
    """Read options and data. validation_split: share of the rows that is held out where there is no validation data."""
    config = config or TrainingConfig.of(**options)
    if not 0 <= validation_split < 1:
        raise ConfigError(f"validation_split must be at least 0 and below 1, got {validation_split}.")
    _set_threads(threads)
    folder = resolve(model, revision)
    shape = read_model_config(folder)
    tokenizer = Tokenizer.from_folder(folder)
    template = _template(chat_template)

    def read(source: Data, name: str) -> Dataset:
        return read_dataset(
            Path(source).expanduser() if isinstance(source, (str, Path)) else source,
            tokenizer,
            config,
            longest=shape.max_position_embeddings,
            ends=stop_tokens(folder, shape),
            chat_template=template,
            name=None if isinstance(source, (str, Path)) else name,
        )

    training = read(data, "training data")
    held_out = None if validation is None else read(validation, "validation data")
    if held_out is None and validation_split:
        training, held_out = split(training, validation_split, config.seed)
    return Prepared(
        model,
        folder,
        shape,
        tokenizer,
        config,
        training,
        held_out,
        plan_dtype(dtype, shape.dtype, "cpu"),
        quantization,
        template,
    )


def stop_tokens(folder: Path, shape: ModelConfig) -> frozenset[int]:
    """Tokens at which a server ends an answer of this model, as its files say."""
    path = folder / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return frozenset(int(token) for token in (*listed, *shape.eos_token_ids))


def split(whole: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, a share of the lines), the same for the same seed."""
    lines = sorted({example.line for example in whole.examples})
    count = max(1, round(share * len(lines)))
    if count >= len(lines):
        raise ConfigError(f"validation_split must leave rows to train on, got {share} of {len(lines)} rows.")
    held = set(random.Random(f"split {seed}").sample(lines, count))
    parts = []
    for name, kept in ((whole.name, set(lines) - held), (f"{whole.name}, held out", held)):
        examples = [example for example in whole.examples if example.line in kept]
        parts.append(replace(whole, name=name, rows=len(kept), examples=examples, notes=whole.notes if not parts else ()))
    return parts[0], parts[1]


def estimated(prepared: Prepared, *, timed: bool = False) -> Estimate:
    """What it will cost; timed: also how long, from a measured matrix rate. Raises DoesNotFit, AdapterError."""
    import torch

    from quire.models.registry import build_model
    from quire.train.estimate import EFFICIENCY, estimate, matrix_rate

    scheme = scheme_of(prepared.shape.raw, prepared.quantization)
    sizes = weight_sizes(prepared.folder, prepared.shape).of(scheme)
    with torch.device("meta"):
        tree = build_model(prepared.shape)
    trainable = _trainable(tree, prepared.config)
    found = estimate(
        tree,
        trainable,
        prepared.training,
        prepared.validation,
        prepared.config,
        dtype=prepared.dtype,
        weight_bytes=sizes.bytes_as(ITEM_BYTES[prepared.dtype]),
        memory_free=probe().memory_free,
    )
    return replace(found, seconds=found.flops / (EFFICIENCY * matrix_rate(prepared.dtype))) if timed else found


def _trainable(tree: Any, config: TrainingConfig) -> int:
    """Numbers that will be trained."""
    from quire.lora.targets import target_modules

    lora = config.lora_config()
    total = 0
    for name in target_modules(lora, tree):
        module = tree.get_submodule(name)
        rows, columns = (module.inputs, module.outputs) if hasattr(module, "inputs") else module.weight.shape
        total += lora.rank_of(name) * (rows + columns)
    return total


def open_run(
    prepared: Prepared, output: Path, *, resume: bool, slots: Slots | None = None, sampler: Sampler | None = None
) -> TrainingRun:
    """The model loaded, if it is not, and a run on it that begins, or goes on."""
    from quire.assemble import assemble
    from quire.lora.base import base_digest
    from quire.lora.slots import Slots
    from quire.train.run import TrainingRun

    check_output(output, resume)
    if slots is None:
        shape = prepared.shape.for_length(prepared.longest)
        slots = Slots(assemble(prepared.folder, shape, prepared.dtype, prepared.quantization))
    template = prepared.chat_template or prepared.tokenizer.chat_template
    begin = TrainingRun.resume if resume else TrainingRun
    return begin(
        slots.model,
        slots,
        prepared.config,
        prepared.training.examples,
        () if prepared.validation is None else prepared.validation.examples,
        output,
        stamp={
            "base_digest": base_digest(prepared.folder),
            "chat_template": template if isinstance(template, str) else None,
            "special_tokens": dict(prepared.tokenizer.special_tokens),
        },
        base_name=prepared.model,
        sampler=sampler,
        decode=lambda ids: prepared.tokenizer.decode(list(ids), skip_special_tokens=False),
    )


def check_output(output: Path, resume: bool) -> None:
    """Raises ConfigError where a new run would mix with another one's files."""
    begun = output.is_dir() and (checkpoint.steps(output) or any((output / name).exists() for name in (OPTIONS, METRICS)))
    if begun and not resume:
        raise ConfigError(
            f"output {str(output)!r} has a run already. Go on with it (--resume, resume=True), or give a new folder."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output must be a folder, got {str(output)!r}, which is a file.")


def train_prepared(
    prepared: Prepared,
    output: Path,
    *,
    resume: bool = False,
    slots: Slots | None = None,
    sampler: Sampler | None = None,
    show: bool = True,
) -> Trained:
    """The run itself: with a progress bar, stopped cleanly by Ctrl-C."""
    from quire.train.show import Progress, say

    check_output(output, resume)
    cost = estimated(prepared)
    say([*prepared.notes(), *cost.lines()], show)
    warning = cost.warning(prepared.training.supervised)
    if warning is not None:
        log.warning("%s", warning)
    run = open_run(prepared, output, resume=resume, slots=slots, sampler=sampler)
    try:
        trainable = len(run.flat)
        say(
            [replace(cost, trainable=trainable, parameters=cost.parameters - cost.trainable + trainable).parameters_line()],
            show,
        )
        output.mkdir(parents=True, exist_ok=True)
        options = {"model": prepared.model, "dtype": prepared.dtype, "quantization": prepared.quantization}
        write_whole(output / OPTIONS, json.dumps({**options, **prepared.config.as_dict()}, indent=1) + "\n")
        if run.step:
            say([f"Going on after step {run.step:,} of {run.total_steps:,}."], show)
        with _stopping() as stop, Progress(run.total_steps, run.step, show) as progress:
            last, checked, seconds = _drive(run, stop, progress)
        if not run.finished:
            path = run.save()
            say([f"Stopped after step {run.step:,}; saved {path}. The same with --resume (resume=True) goes on."], show)
        elif last is None:
            run.publish()
        return Trained(
            output,
            run.finished,
            run.step,
            None if last is None else last.loss,
            run.best[0] if run.config.keeps_best else checked,
            trainable,
            seconds,
        )
    finally:
        run.close()


def _drive(
    run: TrainingRun, stop: threading.Event, progress: Callable[[StepReport], None]
) -> tuple[StepReport | None, float | None, float]:
    """(last report, last validation loss, seconds of the steps); ends early after the step in which `stop` is set."""
    last, checked, seconds = None, None, 0.0
    for report in run.pieces():
        if report is None:
            continue
        last, seconds = report, seconds + report.seconds
        checked = checked if report.validation_loss is None else report.validation_loss
        progress(report)
        if stop.is_set() and not run.finished:
            break
    return last, checked, seconds


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Ctrl-C (and SIGTERM) set the event, once; a second one interrupts at once. Only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        log.warning("Stopping after this step (again: at once, without saving).")

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_threads(threads: int | None) -> None:
    import torch

    count = threads or envs.threads() or probe().cores
    torch.set_num_threads(count)


def _template(given: str | None) -> str | None:
    """The template's text, if a file was named."""
    if given is None or "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template must be a template or the path of a file, got {given!r}, which does not exist.")
    return path.read_text(encoding="utf-8")
