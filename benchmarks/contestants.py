"""The contestants, each in a process of its own: so that one's memory and threads are not the other's.

A process loads its model, then generates whenever it is asked and answers with seconds, tokens and its peak of memory.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Prompts = list[list[int]]
NAMES = ("quire", "transformers")


@dataclass(frozen=True)
class Answer:
    """Of one round. profile: seconds by part of the step, where it was asked for."""

    seconds: float
    tokens: list[list[int]]
    peak_rss_bytes: int
    profile: dict[str, float] | None = None


class Peer:
    """A process with a model. `options`: what the contestant is started with."""

    def __init__(self, name: str, folder: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, folder, options, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is loaded

    def generate(self, prompts: Prompts, tokens: int, profile: bool = False) -> Answer:
        self._pipe.send((prompts, tokens, profile))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(name: str, folder: str, options: dict[str, Any], pipe: Connection) -> None:
    generate = {"quire": _quire, "transformers": _transformers}[name](folder, **options)
    pipe.send(True)
    while True:
        try:
            prompts, tokens, profile = pipe.recv()
        except EOFError:
            return
        parts: dict[str, float] | None = {} if profile else None
        begin = time.perf_counter()
        drawn = generate(prompts, tokens, parts)
        seconds = time.perf_counter() - begin
        pipe.send(Answer(seconds, drawn, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, parts))


Generate = Callable[[Prompts, int, dict[str, float] | None], list[list[int]]]


def _quire(folder: str, sequences: int, length: int) -> Generate:
    from benchmarks.parts import measured
    from quire import LLM, SamplingParams

    # The same prompts come in every round: a prefix cache would answer a question that is not asked.
    blocks = sequences * (length // 16 + 2)
    llm = LLM(
        folder,
        max_num_seqs=sequences,
        max_model_len=length,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=False,
    )

    def generate(prompts: Prompts, tokens: int, parts: dict[str, float] | None) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        with measured(parts):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return generate


def _transformers(folder: str, sequences: int, length: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    del sequences, length  # it takes what comes
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: Prompts, tokens: int, parts: dict[str, float] | None) -> list[list[int]]:
        del parts
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
        return out[:, ids.shape[1] :].tolist()

    return generate
