"""The other contestants of the training benchmark, in environments of their own without Quire: TRL with PEFT, and Unsloth.

Same rows, rank, targets, learning rate and batch; batches are counted as the loader makes them. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if "--unsloth" in sys.argv:  # it changes the others, and wants to come first
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_CPU_COMPILE": "1" if "--compile" in sys.argv else "0"}
    import unsloth

import datasets
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


def template() -> str:
    """The chat template of `training.py`, which cannot be imported here."""
    source = (Path(__file__).parent / "training.py").read_text(encoding="utf-8")
    literal = source.partition("TEMPLATE = (")[2].partition("\n)")[0]
    return "".join(json.loads(line.strip()) for line in literal.strip().splitlines())


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def unsloth_model(options: argparse.Namespace) -> Any:
    checkpointing = False if options.no_checkpointing else "unsloth"
    common = {"use_gradient_checkpointing": checkpointing}
    load = unsloth.FastLanguageModel.from_pretrained
    model, _ = load(options.model, max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=False, **common)
    return unsloth.FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, **common)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--by-length", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--float32", action="store_true", help="the base in float32, without autocast")
    parser.add_argument("--unsloth", action="store_true", help="Unsloth's model instead of PEFT's")
    parser.add_argument("--compile", action="store_true", help="Unsloth's layers compiled by torch")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = template()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            max_steps=options.warmup + options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            max_length=1024,
            assistant_only_loss=True,
            gradient_checkpointing=not options.no_checkpointing,
            train_sampling_strategy="group_by_length" if options.by_length else "random",
            bf16=not options.float32,
            model_init_kwargs=None if options.unsloth else {"dtype": "float32" if options.float32 else "bfloat16"},
        )
        clock, counted = Clock(), []
        peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=unsloth_model(options) if options.unsloth else options.model,
            args=config,
            train_dataset=datasets.load_dataset("json", data_files=options.data, split="train"),
            processing_class=tokenizer,
            peft_config=None if options.unsloth else peft,
            callbacks=[clock],
        )
        collate = trainer.data_collator

        def counting(rows: list[Any]) -> Any:
            batch = collate(rows)
            counted.append((int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] != -100).sum())))
            return batch

        trainer.data_collator = counting
        trainer.train()
    used = counted[options.warmup : options.warmup + options.steps]
    seconds = clock.ends[-1] - clock.ends[options.warmup]
    numbers = {
        "tokens_per_second": round(sum(tokens for tokens, _ in used) / seconds, 1),
        "learned_tokens_per_second": round(sum(learned for _, learned in used) / seconds, 1),
        "seconds": round(seconds, 3),
        "tokens": sum(tokens for tokens, _ in used),
        "losses": [round(loss, 4) for loss in clock.losses],
        "threads": torch.get_num_threads(),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
