"""What all commands share: help in sections, and an unknown flag answered with the one that was probably meant.

The tables of other tools' names live here, so that someone who comes from vLLM or llama.cpp is told what to type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from quire.errors import did_you_mean

# Names that mean the same elsewhere (older vLLM, llama.cpp, Text Generation Inference, SGLang).
SYNONYMS: dict[str, str] = {
    "--max-context-len": "--max-model-len",
    "--max-seq-len": "--max-model-len",
    "--max-total-tokens": "--max-model-len",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--n-ctx": "--max-model-len",
    "--max-batch-size": "--max-num-seqs",
    "--max-running-requests": "--max-num-seqs",
    "--max-concurrent-requests": "--max-num-seqs",
    "--parallel": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--max-batch-total-tokens": "--max-num-batched-tokens",
    "--ubatch-size": "--max-num-batched-tokens",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--cuda-memory-fraction": "--gpu-memory-utilization",
    "--memory-utilization": "--gpu-memory-utilization",
    "--kv-cache-memory": "--kv-cache-memory-bytes",
    "--kv-cache-space": "--kv-cache-memory-bytes",
    "--num-blocks": "--num-gpu-blocks-override",
    "--num-threads": "--threads",
    "--cpu-threads": "--threads",
    "--n-threads": "--threads",
    "--model-name": "--served-model-name",
    "--served-name": "--served-model-name",
    "--alias": "--served-model-name",
    "--cors-allowed-origins": "--allowed-origins",
    "--enable-caching": "--enable-prefix-caching",
    "--disable-prefix-caching": "--no-enable-prefix-caching",
    "--schedule-policy": "--scheduling-policy",
    "--max-new-tokens": "--max-tokens",
    "--max-length": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--temp": "--temperature",
    "--repeat-penalty": "--repetition-penalty",
    "--random-seed": "--seed",
    "--system-prompt": "--system",
    "--base-url": "--url",
    "--model-path": "--model",
    # trainers
    "--lr": "--learning-rate",
    "--epochs": "--num-train-epochs",
    "--n-epochs": "--num-train-epochs",
    "--batch-size": "--per-device-train-batch-size",
    "--rank": "--r",
    "--lora-r": "--r",
    "--lora-rank": "--r",
    "--alpha": "--lora-alpha",
    "--lora-target-modules": "--target-modules",
    "--max-seq-length": "--max-length",
    "--cutoff-len": "--max-length",
    "--dataset": "--data",
    "--train-file": "--data",
    "--training-file": "--data",
    "--validation-file": "--validation",
    "--output-dir": "--output",
    "--resume-from-checkpoint": "--resume",
}
# vLLM's options for what Quire does not do (yet). Saying so is kinder than guessing a neighbour.
_VLLM_ONLY = """
    fully-sharded-loras lora-target-modules
    swap-space cpu-offload-gb kv-offloading-size
    speculative-model num-speculative-tokens data-parallel-size distributed-executor-backend enable-expert-parallel
    quantization-param-path structured-outputs-config guided-decoding-backend reasoning-parser tool-call-parser
    enable-auto-tool-choice enable-sleep-mode hf-overrides trust-remote-code load-format tokenizer-mode
    skip-tokenizer-init limit-mm-per-prompt mm-processor-kwargs compilation-config hf-token otlp-traces-endpoint
    enable-request-id-headers enable-log-requests max-log-len middleware disable-fastapi-docs allow-credentials
    allowed-methods allowed-headers ssl-ca-certs ssl-cert-reqs logits-processors logprobs-mode
    chat-template-content-format tokenizer-revision model-impl runner convert api-server-count headless config
"""
NOT_BUILT: frozenset[str] = frozenset("--" + name for name in _VLLM_ONLY.split())


LAST_SECTIONS = ("Compatibility", "Options")


class SectionedCommand(click.Command):
    """A command whose help groups options by their `section`, and which knows what an unknown flag was meant to be."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title in sorted(sections, key=LAST_SECTIONS.__contains__):
            with formatter.section(title):
                formatter.write_dl(sections[title])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self.spread(args))
        except click.NoSuchOption as error:
            raise click.UsageError(suggestion(error.option_name, self.get_params(ctx)), ctx) from None

    def spread(self, args: list[str]) -> list[str]:
        """`--names a b` as `--names a --names b`, as vLLM takes it, where the positional argument already came first."""
        many = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        if not args or args[0].startswith("-"):
            return args
        spread: list[str] = []
        current: str | None = None
        for word in args:
            if word.startswith("-"):
                current = word if word in many else None
            elif current is not None and spread[-1] != current:
                spread.append(current)
            spread.append(word)
        return spread


class SectionedOption(click.Option):
    """An option that belongs to a section of the help."""

    def __init__(self, *arguments: Any, section: str = "Options", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.section = section


def suggestion(flag: str, parameters: Sequence[click.Parameter]) -> str:
    """What to say about a flag that this command does not have."""
    known = [name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")]
    plain = flag.replace("_", "-")
    if plain in known and plain != flag:
        return f'no option {flag}. Did you mean "{plain}"?'
    meant = SYNONYMS.get(plain)
    if meant in known:
        return f'no option {flag}. Did you mean "{meant}"?'
    if plain in NOT_BUILT or plain.replace("--no-", "--") in NOT_BUILT:
        return f"no option {flag}: vLLM has it, Quire does not do this yet."
    return f"no option {flag}.{did_you_mean(plain, known)}"


json_flag = click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
