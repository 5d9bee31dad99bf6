"""The offline door: `LLM(model).generate(prompts)`, with vLLM's signatures."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from quire import presets
from quire.config import EngineConfig
from quire.engine.adapters import AdapterControls, LoRARequests
from quire.engine.start import start
from quire.errors import InvalidRequest
from quire.log import progress
from quire.lora.request import LoRARequest
from quire.request import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSequence,
    EngineRequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from quire.text import chat
from quire.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM(AdapterControls):
    """A model in this process. Options are EngineConfig's (and vLLM's): `LLM("quire-tiny", max_model_len=1024)`."""

    def __init__(self, model: str, **options: Any) -> None:
        """Plan and load. Raises ConfigError (DoesNotFit) and ModelError."""
        started = start(EngineConfig.of(**{"model": model, "disable_log_stats": True, **options}))
        self.config, self.model_config, self.plan = started.config, started.model_config, started.plan
        self._engine, self._intake, self._tokenizer = started.engine, started.intake, started.tokenizer
        self._defaults = started.default_sampling
        self.slots = started.slots
        """The model's, for adapters that train on it."""
        self._adapters = started.adapters
        if self._adapters is not None:
            self._adapters.on_change = self._engine.sweep
            weakref.finalize(self, self._adapters.close, wait=False)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs in the order of the prompts. use_tqdm: show a progress bar.

        prompts: text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}, or a list of those. sampling_params: one for
        all or one for each; None: the model's recommended defaults. lora_request: the adapter of all, or of each (None: the
        base). Raises InvalidRequest before anything runs.
        """
        listed = _as_list(prompts)
        params = self._params_for(listed, sampling_params)
        if priority is not None and len(priority) != len(listed):
            raise InvalidRequest(f"priority must have one entry for each of the {len(listed)} prompts, got {len(priority)}.")
        adapters = self._lora_requests(lora_request, len(listed))
        requests = [
            self._accept(prompt, own.clone(output_kind=RequestOutputKind.FINAL_ONLY), priority=rank, lora_request=adapter)
            for prompt, own, rank, adapter in zip(listed, params, priority or [0] * len(listed), adapters, strict=True)
        ]
        return self._run(requests, bool(use_tqdm))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        lora_request: LoRARequests = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. Messages are {"role", "content"} mappings. An adapter that brings a chat
        template has its conversations written by it, unless one is given."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        adapters = self._lora_requests(lora_request, len(conversations))
        prompts = []
        for conversation, adapter in zip(conversations, adapters, strict=True):
            own = self.adapters.get(adapter.lora_name).chat_template if adapter else None
            text = chat.render(
                self._tokenizer,
                [dict(message) for message in conversation],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template or own or self.config.chat_template,
                chat_template_kwargs=dict(chat_template_kwargs or {}),
            )
            prompts.append({"prompt": text, "prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=adapters)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequests = None,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The best beams of every prompt, best first."""
        sampling = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, max_tokens=params.max_tokens)
        listed = _as_list(prompts)
        adapters = self._lora_requests(lora_request, len(listed))
        requests = [
            self._accept(prompt, sampling, beam=params, lora_request=adapter)
            for prompt, adapter in zip(listed, adapters, strict=True)
        ]
        return [
            BeamSearchOutput(
                [
                    BeamSequence(
                        output.prompt_token_ids + beam.token_ids,
                        beam.cumulative_logprob,
                        text=(output.prompt or "") + beam.text,
                        finish_reason=beam.finish_reason,
                    )
                    for beam in output.outputs
                ]
            )
            for output in self._run(requests, use_tqdm)
        ]

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's recommended parameters, under the preset and the overrides that this LLM was started with."""
        known = {f.name for f in fields(SamplingParams)}
        resolved = presets.resolve(
            flags=self.config.override_generation_config, preset=self.config.preset, generation_config=self._defaults
        )
        return SamplingParams(**{name: found.value for name, found in resolved.items() if name in known})

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes."""
        return self._engine.reset_prefix_cache()

    def _accept(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        beam: BeamSearchParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> EngineRequest:
        return self._intake.accept(
            prompt,
            params,
            str(next(self._numbers)),
            arrival_time=time.monotonic(),
            priority=priority,
            beam=beam,
            lora_request=lora_request,
        )

    def _params_for(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"sampling_params must be one or as many as the {len(prompts)} prompts, got {len(params)}.",
                parameter="sampling_params",
            )
        return params

    def _run(self, requests: list[EngineRequest], show: bool) -> list[RequestOutput]:
        """Run all to their ends; on Ctrl-C, or if one fails, none is left behind."""
        outputs: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self._engine.add(request)
            with progress("Generating", len(requests), quiet=not show) as advance:
                while self._engine.has_work():
                    for output in self._engine.step():
                        if output.error is not None:
                            raise output.error
                        outputs[output.request_id] = output
                        advance(1)
        finally:
            for request in requests:
                self._engine.abort(request.request_id)
        return [outputs[request.request_id] for request in requests]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(type(token) is int for token in listed) else listed
