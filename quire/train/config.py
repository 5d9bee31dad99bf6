"""The wishes for one training run, frozen as given, under the names that `transformers`, `peft` and `trl` made usual.

Knows no torch and reads no file. The fields are the flags of `quire train` and the keyword arguments of `quire.train`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from quire.errors import AdapterError, ConfigError, did_you_mean
from quire.lora.config import ALL_LINEAR, LoraConfig, parse_lora_config

METHODS = ("supervised", "dpo")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
TRAIN_ON = ("assistant", "last", "all")
CHECKPOINTING = ("auto", "on", "off")
# The default warm-up: short, as far as the run is.
WARMUP_SHARE, WARMUP_MOST = 0.03, 20

# Other trainers' options for what is a fact here, or is not done: name -> (accepted values, why no other).
FACTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((True, False), "sequences are laid end to end and never see each other"),
    "padding_free": ((True,), "there is no padding here"),
    "group_by_length": ((False, True), "there is no padding here"),
    "assistant_only_loss": ((True,), "use train_on: assistant, last or all"),
    "completion_only_loss": ((True, None), "the loss is on the completion; the format text has loss on all of it"),
    "optim": (("adamw_torch", "adamw_torch_fused", "adamw"), "the optimizer is AdamW in float32"),
    "fp16": ((False,), "the base keeps its type, and the adapter is trained in float32"),
    "bf16": ((True, False), "the base keeps its type (dtype), and the adapter is trained in float32"),
    "report_to": (("none", "tensorboard", None), "metrics.jsonl and loss.svg are always written"),
    "task_type": (("CAUSAL_LM", None), "only causal language models are trained"),
    "push_to_hub": ((False,), "nothing is uploaded; the output folder is what to upload"),
    "dataset_text_field": (("text",), "the field is called text"),
    "remove_unused_columns": ((True, False), "columns that are not known are named and left alone"),
    "use_cpu": ((True, False), "the device is the one that serves"),
}
OTHER_NAMES = {
    "rank": "r",
    "alpha": "lora_alpha",
    "epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "lr_scheduler": "lr_scheduler_type",
    "weight_decay_rate": "weight_decay",
    "random_state": "seed",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target_modules": "target_modules",
    "eval_strategy": "eval_steps",
    "save_strategy": "save_steps",
    "dpo_beta": "beta",
}


@dataclass(frozen=True)
class TrainingConfig:
    """One run's options. None means "not said": the data or the run's length decides."""

    r: int = 16
    """Rank of the adapter."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is left out at random while training."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Linears that get an adapter: names, endings of paths, one regular expression, or all-linear."""
    exclude_modules: tuple[str, ...] = ()
    """Linears that get none."""
    bias: str = "none"
    """Which biases of the base are trained: none, all or lora_only."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapter."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of peft's LoraConfig: {"layers_to_transform": [10, 11], "rank_pattern": {...}}."""

    method: str = "supervised"
    """supervised, or dpo (rows with a preferred and a rejected answer)."""
    beta: float = 0.1
    """DPO: how strongly the base holds the adapter back."""
    train_on: str = "assistant"
    """Which tokens of a conversation are learned: all turns of the assistant, its last one, or all tokens."""
    max_length: int | None = None
    """Cut rows to that many tokens, and say how many were cut; otherwise a row longer than the model's limit is an error."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template: {"enable_thinking": false}."""

    num_train_epochs: float = 3.0
    """Times that the data is gone through."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: int = 8
    """Rows of one step, times gradient_accumulation_steps. It does not decide the memory: see micro_batch_tokens."""
    gradient_accumulation_steps: int = 1
    """Factor on the rows of a step; gradients are the same for all ways to write one product."""
    micro_batch_tokens: int = 2048
    """Tokens that go through the model at once (a longer row goes alone). More take memory and change last bits only."""
    learning_rate: float = 2e-4
    """Learning rate of AdamW."""
    lr_scheduler_type: str = "constant_with_warmup"
    """constant, constant_with_warmup, linear or cosine."""
    warmup_steps: int | None = None
    """Steps in which the rate rises. If not given: 3 % of the run, 20 at most, with constant_with_warmup; else 0."""
    warmup_ratio: float | None = None
    """The same as a share of the run."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the B matrices over that of the A matrices (LoRA+)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's memory of gradients."""
    adam_beta2: float = 0.999
    """AdamW's memory of their squares."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to that norm; 0: never."""
    seed: int = 0
    """Source of the adapter's start, the order of the data and dropout."""
    gradient_checkpointing: str = "auto"
    """Compute activations again in the backward pass: on, off, or auto (for the layers whose activations find no room)."""

    logging_steps: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_steps: int | None = None
    """Steps between two evaluations on the validation data. If not given: after each epoch."""
    save_steps: int | None = None
    """Steps between two checkpoints. If not given: a tenth of the run. The last step has one always."""
    save_total_limit: int = 3
    """Checkpoints that are kept (the best one besides)."""
    early_stopping_patience: int | None = None
    """Stop after that many evaluations in a row without a better loss, and keep the best adapter."""
    load_best_model_at_end: bool = False
    """Keep the adapter of the lowest validation loss instead of the last one."""
    sample_steps: int | None = None
    """Steps between two rounds of sample answers to prompts of the validation data (samples.jsonl)."""
    sample_prompts: int = 3
    """Prompts of such a round."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        if isinstance(self.gradient_checkpointing, bool):
            object.__setattr__(self, "gradient_checkpointing", "on" if self.gradient_checkpointing else "off")
        if self.max_steps == -1:  # transformers' way to say "not given"
            object.__setattr__(self, "max_steps", None)
        self._check_numbers()
        for name, choices in (
            ("method", METHODS),
            ("train_on", TRAIN_ON),
            ("lr_scheduler_type", SCHEDULES),
            ("gradient_checkpointing", CHECKPOINTING),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(str(value), choices)}"
                )
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"warmup_ratio must not be given beside warmup_steps={self.warmup_steps}, got {self.warmup_ratio}."
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.warmup_ratio):
            raise ConfigError("lr_scheduler_type must be constant_with_warmup where there is a warm-up, got 'constant'.")
        try:
            self.lora_config()
        except AdapterError as error:
            raise ConfigError(str(error)) from None

    def _check_numbers(self) -> None:
        for name, low in (
            ("max_length", 2),
            ("max_steps", 1),
            ("per_device_train_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("micro_batch_tokens", 1),
            ("warmup_steps", 0),
            ("seed", 0),
            ("logging_steps", 1),
            ("eval_steps", 1),
            ("save_steps", 1),
            ("save_total_limit", 1),
            ("early_stopping_patience", 1),
            ("sample_steps", 1),
            ("sample_prompts", 1),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}.")
        for name, low, high, open_low in (
            ("beta", 0, math.inf, True),
            ("num_train_epochs", 0, math.inf, True),
            ("learning_rate", 0, math.inf, True),
            ("warmup_ratio", 0, 1, False),
            ("loraplus_lr_ratio", 0, math.inf, True),
            ("weight_decay", 0, math.inf, False),
            ("adam_beta1", 0, 1, False),
            ("adam_beta2", 0, 1, False),
            ("adam_epsilon", 0, math.inf, True),
            ("max_grad_norm", 0, math.inf, False),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not known or value < low or value > high or (open_low and value == low) or (high == 1 and value == 1):
                least = f"above {low}" if open_low else f"at least {low}"
                raise ConfigError(f"{name} must be {least}{' and below 1' if high == 1 else ''}, got {value!r}.")

    @classmethod
    def of(cls, **options: Any) -> TrainingConfig:
        """A config from keyword options, other trainers' names for facts among them; an unknown one suggests the nearest."""
        known = [f.name for f in fields(cls)]
        chosen: dict[str, Any] = {}
        for name, value in options.items():
            if name in known:
                chosen[name] = value
            elif name in FACTS:
                accepted, reason = FACTS[name]
                if value not in accepted:
                    raise ConfigError(f"{name}={value!r} is not possible: {reason}.")
            else:
                near = OTHER_NAMES.get(name)
                hint = f' Did you mean "{near}"?' if near else did_you_mean(name, known)
                raise ConfigError(f"unknown option {name!r}.{hint}")
        return cls(**chosen)

    def lora_config(self) -> LoraConfig:
        """The adapter's configuration in PEFT's words."""
        own = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
        twice = sorted(set(self.lora) & {*own, "target_modules", "exclude_modules", "modules_to_save"})
        if twice:
            raise ConfigError(f"lora must not have {twice[0]!r}: give --{twice[0].replace('_', '-')}.")
        return parse_lora_config(
            {
                **self.lora,
                **{name: getattr(self, name) for name in own},
                "target_modules": _names_or_pattern(self.target_modules),
                "exclude_modules": _names_or_pattern(self.exclude_modules),
                "modules_to_save": list(self.modules_to_save) or None,
            }
        )

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def keeps_best(self) -> bool:
        """Whether the result is the adapter with the lowest validation loss."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def warmup(self, total_steps: int) -> int:
        """Steps of rising rate."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        if self.lr_scheduler_type != "constant_with_warmup":
            return 0
        return min(WARMUP_MOST, math.ceil(WARMUP_SHARE * total_steps))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _names_or_pattern(names: tuple[str, ...]) -> str | list[str] | None:
    """One entry that no module could be called is a regular expression; so is all-linear."""
    if len(names) == 1 and (names[0] == ALL_LINEAR or not names[0].replace(".", "").replace("_", "").isalnum()):
        return names[0]
    return list(names) or None
