"""`quire train`: a LoRA adapter from a model and a file of examples. Brings rooms together and knows no arithmetic."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire import log
from quire.cli.command import SectionedCommand, SectionedOption, json_flag
from quire.cli.flags import HumanInteger, build, options_of, with_options
from quire.config import DTYPES, QUANTIZATIONS, EngineConfig
from quire.errors import ConfigError
from quire.train.config import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.lora.parts import Adapter
    from quire.lora.slots import Slots
    from quire.train.door import Prepared
    from quire.train.run import Sampler

SAMPLE_TOKENS = 128
SECTIONS = {
    "Adapter": (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias", "use_rslora", "use_dora",
        "modules_to_save", "lora",
    ),
    "What is learned": ("method", "beta", "train_on", "max_length", "chat_template_kwargs"),
    "Steps": (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_tokens",
        "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "loraplus_lr_ratio", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "gradient_checkpointing",
    ),
    "Watching and saving": (
        "logging_steps", "eval_steps", "save_steps", "save_total_limit", "early_stopping_patience",
        "load_best_model_at_end", "sample_steps", "sample_prompts",
    ),
}  # fmt: skip


def _options() -> list[click.Option]:
    names = [f.name for f in fields(TrainingConfig)]
    return [
        option
        for section, chosen in SECTIONS.items()
        for option in options_of(TrainingConfig, section, skip=set(names) - set(chosen))
    ]


def _model_option(*names: str, **options: Any) -> Any:
    return click.option(*names, cls=SectionedOption, section="Model", **options)


@with_options(_options())
@click.command("train", cls=SectionedCommand)
@click.argument("model")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="JSONL file of examples.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for adapter, checkpoints and metrics: new.")
@click.option("--validation", type=click.Path(path_type=Path), help="JSONL file to measure the loss on.")
@click.option("--validation-split", type=float, help="Or hold out that share of the rows.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output where it stopped, to the same bytes.")
@click.option("--dry-run", is_flag=True, help="Check the data, and say what the run will cost; train nothing.")
@click.option("--preview", is_flag=True, help="Show the first example as tokens, those in colour that are learned.")
@_model_option("--dtype", type=click.Choice(DTYPES), default="auto", help="Type of the base's weights. [default: its own]")
@_model_option("--quantization", "-q", type=click.Choice(QUANTIZATIONS), help="Round the base's weights at load (QLoRA).")
@_model_option("--revision", help="Hub revision of the model.")
@_model_option("--chat-template", help="A jinja template (text or a file) instead of the model's.")
@_model_option("--threads", type=HumanInteger(), help="Compute threads. [default: OMP_NUM_THREADS, or all cores]")
@json_flag
def command(
    model: str,
    data: Path,
    output: Path | None,
    validation: Path | None,
    validation_split: float | None,
    resume: bool,
    dry_run: bool,
    preview: bool,
    dtype: str,
    quantization: str | None,
    revision: str | None,
    chat_template: str | None,
    threads: int | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Train a LoRA adapter for MODEL (a folder, a hub id or quire-tiny) on a file of examples.

    A line of the file is {"messages": [...]} as for OpenAI, {"prompt", "completion"}, {"text"}, ShareGPT's
    {"conversations"}, or for --method dpo a pair. The output is a folder that PEFT, vLLM and `quire serve --lora-modules`
    read. Ctrl-C finishes the step and saves.
    """
    config: TrainingConfig = build(TrainingConfig, values)
    if output is None and not (dry_run or preview):
        raise click.UsageError("Missing option '--output'. --dry-run and --preview do without.")
    log.setup("WARNING")
    from quire.train.door import check_output, prepare

    if output is not None and not (dry_run or preview):
        check_output(output, resume)
    prepared = prepare(
        model,
        data,
        validation,
        validation_split=validation_split or 0.0,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        chat_template=chat_template,
        threads=threads,
        config=config,
    )
    if preview:
        from quire.train.show import preview as show

        show(prepared.tokenizer, prepared.training.examples[0])
    if dry_run:
        _say_cost(prepared, as_json)
    if preview or dry_run:
        return
    assert output is not None
    _train(prepared, output, resume, as_json)


def _say_cost(prepared: Prepared, as_json: bool) -> None:
    from quire.train.door import estimated
    from quire.train.show import histogram

    cost = estimated(prepared, timed=True)
    if as_json:
        click.echo(json.dumps({**asdict(cost), "rows": prepared.training.rows, "layout": prepared.training.layout}, indent=2))
        return
    for line in (*prepared.notes(), *histogram(prepared.training), cost.parameters_line(), *cost.lines()):
        click.echo(line)
    warning = cost.warning(prepared.training.supervised)
    if warning is not None:
        click.echo(warning)


def _train(prepared: Prepared, output: Path, resume: bool, as_json: bool) -> None:
    from quire.train.door import train_prepared

    slots = sampler = None
    if prepared.config.sample_steps:
        if prepared.validation is None:
            raise ConfigError("--sample-steps needs --validation or --validation-split: its prompts are answered.")
        slots, sampler = _engine(prepared)
    done = train_prepared(prepared, output, resume=resume, slots=slots, sampler=sampler)
    if as_json:
        click.echo(json.dumps({**asdict(done), "output_dir": str(done.output_dir)}, indent=2))
    elif done.finished:
        loss = "" if done.loss is None else f"; last loss {done.loss:.4f}"
        checked = "" if done.validation_loss is None else f", validation loss {done.validation_loss:.4f}"
        click.echo(f"Wrote {output}{loss}{checked}.")
        click.echo(f"Serve it: quire serve {prepared.model} --enable-lora --lora-modules mine={output}")
    else:
        raise click.Abort


def _engine(prepared: Prepared) -> tuple[Slots, Sampler]:
    """The paged engine on the model that trains, and how it answers prompts with the adapter as it is by then."""
    from quire.config import LORA_RANKS
    from quire.engine.llm import LLM
    from quire.lora.request import LoRARequest
    from quire.request import SamplingParams

    config, most = prepared.config, prepared.shape.max_position_embeddings
    length = min(most, prepared.longest + SAMPLE_TOKENS)
    ranks = [rank for rank in LORA_RANKS if rank >= max(config.r, *config.lora_config().rank_pattern.values(), 1)]
    llm = LLM(
        prepared.model,
        revision=prepared.revision,
        dtype=prepared.dtype,
        quantization=prepared.quantization,
        enable_lora=True,
        max_lora_rank=(ranks or [max(LORA_RANKS)])[0],
        max_model_len=length,
        max_num_seqs=config.sample_prompts,
        num_gpu_blocks_override=config.sample_prompts * -(-length // EngineConfig.block_size),
    )

    def sample(adapter: Adapter, prompts: Sequence[Sequence[int]]) -> list[str]:
        llm.add_adapter("in training", adapter, replace=True)
        params = SamplingParams(temperature=0.0, max_tokens=SAMPLE_TOKENS)
        adapters = LoRARequest("in training")
        outputs = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False, lora_request=adapters)
        return [output.outputs[0].text for output in outputs]

    return llm.slots, sample
