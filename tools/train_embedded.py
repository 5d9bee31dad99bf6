"""Trains quire-tiny, the model inside the package, with Quire's own model definition, on what every machine has.

    python tools/train_embedded.py --minutes 75 --checkpoint /tmp/quire-tiny.pt

Float32 on the CPU, one packed batch a step and process. The learning rate follows the clock, so that the run anneals
within its minutes; `--replay schedule.json` repeats a run step for step. Ctrl-C leaves a checkpoint, and the same
command goes on from it exactly.
The data, the optimizer and the measurements have rooms of their own (embedded_rows, embedded_optimizer, embedded_eval).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # whoever imports this has chosen already
    os.environ.setdefault("QUIRE_OPS", "plain")

import torch
from embedded_data import corpus
from embedded_folder import FOLDER
from embedded_optimizer import Optimizer, Schedule
from embedded_rows import Row, RowMaker, stream
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from quire.batch import packed
from quire.models.config import read_model_config
from quire.models.registry import build_model

REPLAN_EVERY, SHOW_EVERY, VALIDATE_EVERY = 20, 20, 200
VALIDATION_TOKENS = 8_192
SPEED_MEMORY = 0.97
MOST_NORM = 1.0
MEETING_SECONDS = 900
HEAD_ROWS = 128


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="training time, checkpoints and earlier parts included"
    )
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where configuration and tokenizer are and weights go"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="file that is written and resumed from")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument(
        "--export-minutes", type=float, default=10.0, help="write the weights so far that often; 0: only at the end"
    )
    parser.add_argument("--replay", type=Path, help="schedule.json of an earlier run: follow it instead of the clock")
    parser.add_argument("--step-tokens", type=int, default=4096)
    parser.add_argument(
        "--matrix-rate", type=float, default=0.02, help="Muon's learning rate, for the layers' matrices"
    )
    parser.add_argument("--other-rate", type=float, default=0.004, help="Adam's learning rate, for embedding and norms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--processes", type=int, default=2, help="one thread each; the gradient's order of summation depends on it"
    )
    return parser.parse_args()


@dataclass
class Progress:
    """What a checkpoint remembers beside weights and optimizer state."""

    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    seconds: float = 0.0
    anchors: list[tuple[int, float]] = field(default_factory=list)


def initialize(model: nn.Module, layers: int, seed: int) -> None:
    """Normal weights of 0.02; the two projections that write into the residual stream smaller, by the depth."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = 0.02 / math.sqrt(2 * layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            nn.init.normal_(parameter, std=scale, generator=generator)


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of hidden [R, E] times head [V, E] against targets [R].

    In chunks of rows whose logits stay in the processor's cache; each chunk's gradient is made while they are there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        loss = hidden.new_zeros(())
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
        for rows, goals, row_grads in zip(
            *(tensor.split(HEAD_ROWS) for tensor in (hidden, targets, hidden_grad)), strict=True
        ):
            logits = rows @ head.t()
            logits -= logits.amax(-1, keepdim=True)
            loss -= logits.gather(1, goals[:, None]).sum()
            total = logits.exp_().sum(-1, keepdim=True)
            loss += total.log().sum()
            logits.div_(total)
            logits[torch.arange(len(goals)), goals] -= 1
            torch.mm(logits, head, out=row_grads)
            head_grad.addmm_(logits.t(), rows)
        ctx.save_for_backward(hidden_grad, head_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        return hidden_grad.mul_(grad), head_grad.mul_(grad), None


def loss_of(model: nn.Module, rows: list[Row]) -> tuple[Tensor, int]:
    """Summed cross-entropy over the learned tokens, and how many they are. Only their rows get logits."""
    batch = packed([row.tokens for row in rows])
    learned = torch.tensor([flag for row in rows for flag in (*row.learned[1:], False)])
    wanted = learned.nonzero()[:, 0]
    return HeadLoss.apply(model(batch)[wanted], model.lm_head.weight, batch.tokens[wanted + 1]), len(wanted)


@torch.no_grad()
def validation_loss(model: nn.Module, rows: list[Row]) -> float:
    """Nats per token on held-out text."""
    parts = [loss_of(model, [row]) for row in rows]
    return float(sum(loss for loss, _ in parts)) / sum(count for _, count in parts)


def validation_rows(tokenizer: Tokenizer) -> list[Row]:
    tokens = stream(tokenizer, corpus.split(corpus.documents())[1])
    return [
        Row(tokens[start : start + 512], [True] * 512)
        for start in range(0, min(VALIDATION_TOKENS, len(tokens) - 512), 512)
    ]


def shares(rows: list[Row], ranks: int) -> list[list[Row]]:
    """The rows dealt out, longest first, each to the rank with the fewest tokens so far."""
    dealt: list[list[Row]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        min(dealt, key=lambda share: sum(len(one.tokens) for one in share)).append(row)
    return dealt


@dataclass
class Clock:
    """Seconds of training so far, earlier parts of the run included, and the smoothed duration of a step."""

    seconds: float
    seconds_per_step: float = 0.0
    last: float = field(default_factory=time.perf_counter)

    def tick(self) -> float:
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        self.seconds += passed
        known = self.seconds_per_step or passed
        self.seconds_per_step = SPEED_MEMORY * known + (1 - SPEED_MEMORY) * passed
        return self.seconds


def write_atomically(path: Path, write: Any) -> None:
    """A reader sees the old file or the whole new one, whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    write(new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


def export(model: nn.Module, folder: Path) -> None:
    """Weights in bfloat16, without the head, which is the embedding; readable for everybody, as packages want it."""
    tensors = {
        name: p.detach().to(torch.bfloat16).contiguous()
        for name, p in model.named_parameters()
        if name != "lm_head.weight"
    }

    def write(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)

    write_atomically(folder / "model.safetensors", write)


class Trainer:
    """One run, shared by all processes after the fork: weights, gradients and optimizer state lie in shared memory.

    Each rank computes the gradient of its share of a step's rows and moves the parameters it owns. One thread a process:
    where others use the machine, threads that wait for each other in every product cost more than a few meetings.
    """

    def __init__(self, wishes: argparse.Namespace) -> None:
        self.wishes, self.ranks = wishes, wishes.processes
        config = read_model_config(wishes.folder)
        tokenizer = Tokenizer.from_file(str(wishes.folder / "tokenizer.json"))
        self.rows = RowMaker(tokenizer, wishes.seed, wishes.step_tokens)
        self.validation = validation_rows(tokenizer)
        self.model = build_model(config).float().train()
        initialize(self.model, config.num_layers, wishes.seed)
        self.model.share_memory()
        self.named = dict(self.model.named_parameters())
        self.optimizer = Optimizer(self.model, wishes.matrix_rate, wishes.other_rate, self.ranks)
        self.gradients = [
            {name: torch.zeros_like(p.data).share_memory_() for name, p in self.named.items()}
            for _ in range(self.ranks)
        ]
        self.losses = torch.zeros(self.ranks).share_memory_()
        # What rank 0 decides for all before a step: go on (1) or stop (0), and the factor of the learning rate.
        self.decision = torch.zeros(2, dtype=torch.float64).share_memory_()
        self.meeting = multiprocessing.get_context("fork").Barrier(self.ranks, timeout=MEETING_SECONDS)
        self.progress, self.stopping = Progress(), False
        if wishes.checkpoint.exists():
            self.resume()
        anchors = json.loads(wishes.replay.read_text())["anchors"] if wishes.replay else self.progress.anchors
        self.schedule = Schedule(anchors=anchors)

    def resume(self) -> None:
        saved = torch.load(self.wishes.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for name, tensor in saved["optimizer"].items():
            self.optimizer.state[name].copy_(tensor)
        self.progress = Progress(**saved["progress"])
        print(f"resumed at step {self.progress.step}", flush=True)

    def save(self) -> None:
        self.progress.anchors = self.schedule.anchors
        content = {"model": self.model.state_dict(), "optimizer": self.optimizer.state, "progress": vars(self.progress)}
        write_atomically(self.wishes.checkpoint, lambda path: torch.save(content, path))
        wishes = {key: value for key, value in vars(self.wishes).items() if isinstance(value, (int, float))}
        record = json.dumps({**vars(self.progress), "options": wishes}, indent=1)
        write_atomically(self.wishes.checkpoint.with_suffix(".json"), lambda path: path.write_text(record + "\n"))

    def step(self, rank: int) -> None:
        """One step's share of this rank: gradient of its rows, meeting, movement of its parameters, meeting."""
        number = self.progress.step
        rows = self.rows.step(number)
        learned = sum(sum(row.learned[1:]) for row in rows)
        for name, parameter in self.named.items():
            parameter.grad = self.gradients[rank][name].zero_()
        loss, _ = loss_of(self.model, shares(rows, self.ranks)[rank])
        (loss / learned).backward()
        self.losses[rank] = loss.detach() / learned
        self.meeting.wait()
        summed = {name: sum((one[name] for one in self.gradients[1:]), self.gradients[0][name]) for name in self.named}
        norm = float(torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in summed.values()])))
        if norm > MOST_NORM:
            for gradient in summed.values():
                gradient.mul_(MOST_NORM / norm)
        self.optimizer.update(rank, summed, number, float(self.decision[1]))
        self.progress.step += 1
        self.progress.tokens += sum(len(row.tokens) for row in rows)
        self.progress.learned_tokens += learned
        self.meeting.wait()

    def follow(self, rank: int) -> None:
        """The life of every rank but 0."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            self.meeting.wait()
            if not self.decision[0]:
                return
            self.step(rank)

    def lead(self) -> None:
        """The life of rank 0: decides, takes part, keeps time, saves."""
        budget, clock = self.wishes.minutes * 60, Clock(self.progress.seconds)
        last_save = last_export = self.progress.seconds
        smooth_loss = 0.0
        while not self.schedule.finished(self.progress.step) and not self.stopping:
            self.decision[0], self.decision[1] = 1, self.schedule.factor(self.progress.step)
            self.meeting.wait()
            self.step(0)
            step, loss = self.progress.step, float(self.losses.sum())
            smooth_loss = 0.95 * smooth_loss + 0.05 * loss if smooth_loss else loss
            self.progress.seconds = clock.tick()
            left = budget - clock.seconds
            if step % REPLAN_EVERY == 0 and not self.wishes.replay:
                self.schedule.follow_clock(step, clock.seconds / budget, left, clock.seconds_per_step)
            if step % SHOW_EVERY == 0:
                self.show(smooth_loss, clock.seconds_per_step, left)
            if step % VALIDATE_EVERY == 0:
                bits = validation_loss(self.model, self.validation) / math.log(2)
                print(f"step {step} held-out text {bits:.3f} bits/token", flush=True)
            if clock.seconds - last_save > self.wishes.checkpoint_minutes * 60:
                self.save()
                last_save = clock.seconds
            if self.wishes.export_minutes and clock.seconds - last_export > self.wishes.export_minutes * 60:
                export(self.model, self.wishes.folder)
                last_export = clock.seconds
        self.decision[0] = 0
        self.meeting.wait()
        self.save()
        if not self.stopping:
            export(self.model, self.wishes.folder)
        print("stopped; the same command goes on" if self.stopping else "finished", flush=True)

    def show(self, loss: float, seconds_per_step: float, left: float) -> None:
        progress, speed = self.progress, self.wishes.step_tokens / seconds_per_step
        print(
            f"step {progress.step} loss {loss:.3f} rate {self.schedule.factor(progress.step - 1):.3f}"
            f" tokens {progress.tokens / 1e6:.2f}M {speed:.0f} tokens/s, {left / 60:.1f} minutes left",
            flush=True,
        )


def main() -> None:
    wishes = options()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trainer = Trainer(wishes)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=trainer.follow, args=(rank,), daemon=True) for rank in range(1, trainer.ranks)]
    for process in others:
        process.start()

    def stop(*_: Any) -> None:
        trainer.stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        trainer.lead()
    except BaseException:
        trainer.meeting.abort()  # nobody waits for a rank 0 that has failed
        raise
    for process in others:
        process.join()


if __name__ == "__main__":
    main()
