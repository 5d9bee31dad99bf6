"""One training run: its adapter in a slot, its optimizer, and the work of its steps, cut into shares of a packed batch.

`pieces()` trains it alone; `together.pieces_together` trains several in common batches. A run asks for shares (passes.Share)
one after the other and is told their losses; nothing else happens between it and the model. What it remembers is its step
number, the flat buffers and the best loss so far: order of data, dropout and rate follow from seed and step.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.errors import ConfigError, QuireError
from quire.log import logger
from quire.lora.adapter import write_adapter
from quire.lora.new import new_adapter
from quire.lora.parts import Adapter
from quire.lora.slots import Slots
from quire.models.decoder import CausalLM
from quire.train import checkpoint, objective
from quire.train.config import TrainingConfig
from quire.train.examples import Example, cut, sequences_of
from quire.train.fingerprint import differences, fingerprint
from quire.train.flat import FlatParameters
from quire.train.passes import Place, Share, places
from quire.train.report import Journal, StepReport
from quire.train.schedule import Order, rate

log = logger(__name__)

Sampler = Callable[[Adapter, Sequence[Sequence[int]]], Sequence[str]]
RESULT = ".result"


class TrainingRun:
    """See the module. Its slot is taken at construction; `close` gives it back."""

    def __init__(
        self,
        model: CausalLM,
        slots: Slots,
        config: TrainingConfig,
        training: Sequence[Example],
        validation: Sequence[Example] = (),
        directory: Path | None = None,
        *,
        stamp: Mapping[str, Any] | None = None,
        base_name: str | None = None,
        sampler: Sampler | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """directory: where checkpoints, metrics and the adapter go; None: nowhere. stamp: further fields of the Adapter
        (base_digest, chat_template, special_tokens). Raises ConfigError, AdapterError."""
        _check(config, training, validation)
        self.model, self.slots, self.config = model, slots, config
        self.training, self.validation, self.directory = training, validation, directory
        self.base_name, self.sampler, self.decode = base_name, sampler, decode
        fresh = new_adapter(model, replace(config.lora_config(), base_model_name_or_path=base_name), config.seed)
        self.flat = FlatParameters(replace(fresh, **(stamp or {})))
        self.trained = _by_place(model, self.flat)
        self.order = Order(len(training), config)
        self.total_steps = self.order.total_steps
        self.step, self.stopped_early, self.best = 0, False, (math.inf, 0)
        self.best_values: Tensor | None = None
        self.evaluations_without_gain = 0
        self.busy_seconds = 0.0
        self.references: dict[tuple[str, int], tuple[float, float]] = {}
        self.journal: Journal | None = None
        self.slot = slots.take()
        slots.place(self.slot, self.flat.adapter)
        self.closed = False

    @classmethod
    def resume(
        cls,
        model: CausalLM,
        slots: Slots,
        config: TrainingConfig,
        training: Sequence[Example],
        validation: Sequence[Example] = (),
        directory: Path | None = None,
        **options: Any,
    ) -> TrainingRun:
        """The run as its newest whole checkpoint in `directory` left it, or from its beginning where there is none. Raises
        ConfigError if data or options are not those that it was begun with."""
        run = cls(model, slots, config, training, validation, directory, **options)
        found = None if directory is None else checkpoint.newest(directory)
        if found is not None:
            try:
                run._restore(found)
            except BaseException:
                run.close()
                raise
        return run

    # ---- what a driver needs

    def pieces(self) -> Iterator[StepReport | None]:
        """Trains to the end: None after each piece of work, a StepReport after each optimizer step. A generator that is
        closed early loses the step it was in; the next one begins that step anew."""
        from quire.train.together import pieces_together

        yield from pieces_together([self])

    @property
    def finished(self) -> bool:
        return self.stopped_early or self.step >= self.total_steps

    def adapter(self) -> Adapter:
        """A frozen copy as it is now; of a finished run that keeps the best, the best."""
        if self.finished and self.best_values is not None:
            last = self.flat.values.clone()
            with torch.no_grad():
                self.flat.values.copy_(self.best_values)
                copy = self.flat.adapter.frozen()
                self.flat.values.copy_(last)
            return copy
        return self.flat.adapter.frozen()

    def save(self) -> Path:
        """Write a checkpoint of the step that was finished last; gives its folder. Raises ConfigError without a directory."""
        if self.directory is None:
            raise ConfigError("directory must be given to save a run, got None.")
        path = checkpoint.path_of(self.directory, self.step)
        if checkpoint.is_whole(path):
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = self.flat.state() | ({} if self.best_values is None else {"best": self.best_values})
        path = checkpoint.write(self.directory, self.step, self._state(), tensors, self._write_adapter)
        checkpoint.prune(self.directory, self.config.save_total_limit, [self.best[1]])
        return path

    def close(self) -> None:
        """Give the slot back."""
        if not self.closed:
            self.closed = True
            self.slots.give_back(self.slot)
            if self.journal is not None:
                self.journal.close()

    def score(self, examples: Sequence[Example]) -> list[list[float]]:
        """Log-probabilities of the supervised tokens of each example, by the forward pass of training."""
        from quire.train.passes import score

        found = []
        for example in examples:
            share = Share([example], self.slot)
            for _ in score(self.model, [share]):
                pass
            found.append((-share.losses).tolist())
        return found

    # ---- the work itself

    def work(self) -> Iterator[Share | StepReport]:
        """Shares to be computed, each filled in before the next is asked for, and a report after each step."""
        if self.directory is not None and self.journal is None:
            self.journal = Journal(self.directory, self.step)
        while not self.finished:
            report = yield from self._one_step()
            if self._due(self.config.eval_steps, self.order.steps_per_epoch) and self.validation:
                loss, accuracy = yield from self._evaluate()
                report = replace(report, validation_loss=loss, validation_accuracy=accuracy)
                self._judge(loss)
            if self.sampler is not None and self.config.sample_steps and self._due(self.config.sample_steps, 1):
                self._sample()
            if self.directory is not None and (self.finished or self._due(self.config.save_steps, self._tenth())):
                report = replace(report, saved=self.save())
            if self.journal is not None and (
                self.step % self.config.logging_steps == 0 or self.finished or report.validation_loss is not None
            ):
                self.journal.line(report)
            yield report
        if self.directory is not None:
            self.publish()

    def _one_step(self) -> Iterator[Share]:
        numbers = self.order.step(self.step)
        examples = [self.training[number] for number in numbers]
        if self.config.method == "dpo":
            yield from self._refer("training", numbers, self.training)
        self.flat.gradient.zero_()
        loss, right, place = 0.0, 0, 0
        total = self._total(examples)
        for count, micro in enumerate(cut(examples, self.config.micro_batch_tokens)):
            share = self._share(micro, numbers[place : place + len(micro)], total, count)
            yield share
            part, well = self._judged(share, "training", numbers[place : place + len(micro)], total)
            loss, right, place = loss + part, right + well, place + len(micro)
        begin = time.monotonic()
        learning_rate = rate(self.config, self.step, self.total_steps)
        norm = self.flat.update(self.config, self.step, learning_rate)
        if not math.isfinite(norm) or not math.isfinite(loss):
            lines = sorted({example.line for example in examples})
            raise QuireError(
                f"step {self.step + 1}: the loss is {loss}, the gradient's norm {norm}. Its rows are lines {lines} of the "
                f"data. A smaller --learning-rate (now {self.config.learning_rate}) may help."
            )
        self.step += 1
        seconds, self.busy_seconds = self.busy_seconds + time.monotonic() - begin, 0.0
        counted = sum(self._counted(example) for example in examples)
        return StepReport(
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.step / self.order.steps_per_epoch,
            loss=loss,
            accuracy=right / (len(examples) if self.config.method == "dpo" else max(1, counted)),
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=sum(example.length for example in examples),
            supervised_tokens=counted,
            seconds=seconds,
            run=self,
        )

    def _share(self, examples: Sequence[Example], numbers: Sequence[int], total: float, count: int) -> Share:
        share = Share(sequences_of(examples), self.slot, trained=self.trained)
        weights = share.weights()
        if self.config.method == "dpo":
            reference = self._reference("training", numbers)
            labelled = share.labelled()
            share.weigh = lambda losses: objective.preference(losses, labelled, reference, self.config.beta, total)[2]
        else:
            share.weigh = lambda losses: objective.supervised(losses, weights, total)[1]
        if self.config.lora_dropout:
            share.dropped = lambda: self._dropping(count)
        return share

    @contextmanager
    def _dropping(self, micro: int) -> Iterator[None]:
        """Within, what goes into this run's A matrices is thinned out."""
        self.slots.drop(self.slot, f"{self.config.seed}|{self.step}|{micro}")
        try:
            yield
        finally:
            self.slots.drop(self.slot, None)

    def _judged(self, share: Share, kind: str, numbers: Sequence[int], total: float) -> tuple[float, int]:
        """(loss, right ones) of a computed share."""
        if self.config.method == "dpo":
            reference = self._reference(kind, numbers)
            loss, right, _ = objective.preference(share.losses, share.labelled(), reference, self.config.beta, total)
            return loss, right
        loss, _ = objective.supervised(share.losses, share.weights(), total)
        return loss, int(share.right.sum())

    def _refer(self, kind: str, numbers: Sequence[int], source: Sequence[Example]) -> Iterator[Share]:
        """What the base without adapter thinks of these pairs; once in a run, for it does not change."""
        missing = [number for number in numbers if (kind, number) not in self.references]
        place = 0
        for micro in cut([source[number] for number in missing], self.config.micro_batch_tokens):
            share = Share(sequences_of(micro), -1)
            yield share
            sums = [-float(part.double().sum()) for part in share.losses.split(share.labelled())]
            for pair in zip(sums[0::2], sums[1::2], strict=True):
                self.references[kind, missing[place]] = pair
                place += 1

    def _reference(self, kind: str, numbers: Sequence[int]) -> list[float]:
        return [value for number in numbers for value in self.references[kind, number]]

    def _evaluate(self) -> Iterator[Share]:
        """Loss and accuracy on all of the validation data."""
        begin = self.busy_seconds
        numbers = range(len(self.validation))
        if self.config.method == "dpo":
            yield from self._refer("validation", numbers, self.validation)
        total, loss, right, place = self._total(self.validation), 0.0, 0, 0
        for micro in cut(self.validation, self.config.micro_batch_tokens):
            share = Share(sequences_of(micro), self.slot)
            yield share
            part, well = self._judged(share, "validation", numbers[place : place + len(micro)], total)
            loss, right, place = loss + part, right + well, place + len(micro)
        self.busy_seconds = begin  # evaluation is not a step's time
        counted = sum(self._counted(example) for example in self.validation)
        return loss, right / (len(self.validation) if self.config.method == "dpo" else max(1, counted))

    def _judge(self, loss: float) -> None:
        if loss < self.best[0]:
            self.best, self.evaluations_without_gain = (loss, self.step), 0
            if self.config.keeps_best:
                self.best_values = self.flat.values.clone()
            return
        self.evaluations_without_gain += 1
        patience = self.config.early_stopping_patience
        self.stopped_early = patience is not None and self.evaluations_without_gain >= patience

    def _sample(self) -> None:
        chosen = self.validation[: self.config.sample_prompts]
        prompts = [example.tokens[: example.prompt] for example in chosen if example.prompt]
        if not prompts or self.sampler is None:
            return
        for prompt, answer in zip(prompts, self.sampler(self.flat.adapter.frozen(), prompts), strict=True):
            if self.journal is not None:
                self.journal.sample(self.step, self.decode(prompt) if self.decode else str(list(prompt)), answer)

    def _total(self, examples: Sequence[Example]) -> float:
        if self.config.method == "dpo":
            return float(len(examples))
        return math.fsum(weight for example in examples for weight in example.weights[1:])

    def _counted(self, example: Example) -> int:
        return example.supervised + (0 if example.rejected is None else example.rejected.supervised)

    def _due(self, every: int | None, otherwise: int) -> bool:
        return self.step % (every or otherwise) == 0 or self.step >= self.total_steps

    def _tenth(self) -> int:
        return max(1, self.total_steps // 10)

    # ---- files

    def publish(self) -> None:
        """The result as PEFT's folder in `directory` itself, beside checkpoints and metrics, and the loss's picture."""
        assert self.directory is not None
        working = self.directory / RESULT
        write_adapter(working, self.adapter(), base_name=self.base_name)
        for path in sorted(working.iterdir(), reverse=True):  # weights before adapter_config.json, which says they are there
            os.replace(path, self.directory / path.name)
        shutil.rmtree(working)
        checkpoint.synchronize(self.directory)
        if self.journal is not None:
            self.journal.draw()

    def _write_adapter(self, folder: Path) -> None:
        write_adapter(folder, self.flat.adapter.frozen(), base_name=self.base_name)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "best": [self.best[0] if math.isfinite(self.best[0]) else None, self.best[1]],
            "evaluations_without_gain": self.evaluations_without_gain,
            "stopped_early": self.stopped_early,
            "begun_with": fingerprint(self.config, self.training, self.validation, self.flat.adapter),
        }

    def _restore(self, path: Path) -> None:
        state, tensors = checkpoint.read(path)
        other = differences(state["begun_with"], fingerprint(self.config, self.training, self.validation, self.flat.adapter))
        if other:
            raise ConfigError(f"the run in {path.parent} cannot be resumed: {'; '.join(other)}. Begin a new one elsewhere.")
        self.flat.restore(tensors)
        self.best_values = tensors.get("best")
        self.step, self.stopped_early = state["step"], state["stopped_early"]
        loss, step = state["best"]
        self.best = (math.inf if loss is None else loss, step)
        self.evaluations_without_gain = state["evaluations_without_gain"]


def _check(config: TrainingConfig, training: Sequence[Example], validation: Sequence[Example]) -> None:
    if not training:
        raise ConfigError("training must have at least one example, got none.")
    if config.keeps_best and not validation:
        raise ConfigError("early_stopping_patience and load_best_model_at_end need validation data, got none.")
    for example in (*training, *validation):
        if (example.rejected is not None) != (config.method == "dpo"):
            wanted = "pairs of a preferred and a rejected answer" if config.method == "dpo" else "single answers"
            raise ConfigError(f"method {config.method!r} needs {wanted}, but line {example.line} is none.")
        if not example.supervised or (example.rejected is not None and not example.rejected.supervised):
            raise ConfigError(f"line {example.line} has no token to learn.")


def _by_place(model: CausalLM, flat: FlatParameters) -> dict[Place, list[tuple[Tensor, Tensor]]]:
    """The trainable tensors with their gradients' places in the buffer, by the part of the model they work in."""
    gradients = {id(tensor): flat.gradients[name] for name, tensor in flat.tensors.items()}
    where = places(model, list(flat.adapter.parts))
    found: dict[Place, list[tuple[Tensor, Tensor]]] = {}
    for module, part in flat.adapter.parts.items():
        pairs = found.setdefault(where[module], [])
        there = {id(tensor) for tensor, _ in pairs}  # two linears of a layer may share a tensor: its gradient is their sum
        pairs += [(tensor, gradients[id(tensor)]) for _, tensor in part.tensors() if id(tensor) not in there]
    return found
