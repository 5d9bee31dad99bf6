"""The engine's front gate: prompt and parameters -> one validated, tokenized EngineRequest.

Everything that can be wrong with a request is found here, before it is queued; the step loop only meets requests that fit.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.errors import InvalidRequest
from quire.lora.manager import AdapterManager
from quire.lora.request import LoRARequest
from quire.request import BeamSearchParams, EngineRequest, SamplingParams, as_prompt
from quire.sampling.processors import bad_word_ids
from quire.text.tokenizer import Tokenizer

MOST_SALT = 256


@dataclass
class Intake:
    """What a request is checked against. eos: the token that ends a text; also_stop: further ones of the model's files."""

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos: int | None
    also_stop: frozenset[int]
    seed: int = 0
    adapters: AdapterManager | None = None
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def accept(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        params: SamplingParams,
        request_id: str,
        *,
        arrival_time: float,
        priority: int = 0,
        cache_salt: str = "",
        beam: BeamSearchParams | None = None,
        lora_request: LoRARequest | None = None,
    ) -> EngineRequest:
        """The request, ready to run. Raises InvalidRequest naming field, range and value, NotFound for an unknown adapter."""
        params = params.clone()
        params.check_model(vocab_size=self.vocab_size, max_logprobs=self.max_logprobs)
        if len(cache_salt) > MOST_SALT:
            raise InvalidRequest(f"cache_salt must have at most {MOST_SALT} characters.", parameter="cache_salt")
        text, ids = as_prompt(prompt)
        if ids is None:
            ids = self.tokenizer.encode(text)
        ids = self._fit_prompt(ids, params)
        room = self.max_model_len - len(ids)
        if beam is not None:
            params = params.clone(n=1, max_tokens=min(beam.max_tokens, room), temperature=0.0, ignore_eos=beam.ignore_eos)
        else:
            params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most {params.max_tokens}, the room that the prompt of {len(ids)} tokens leaves, "
                f"got {params.min_tokens}.",
                parameter="min_tokens",
                value=params.min_tokens,
            )
        if params.seed is None:
            params.seed = self._random.getrandbits(62)
        if params.prompt_logprobs is not None:
            # A cached prefix has no logits to score.
            params.skip_reading_prefix_cache = True
        if not params.ignore_eos:
            params.stop_token_ids = sorted({*params.stop_token_ids, *self.also_stop})
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(ids),
            params=params,
            arrival_time=arrival_time,
            prompt=text,
            priority=priority,
            cache_salt=cache_salt,
            beam=beam,
            stop_token_ids=self._masked_until_min_tokens(params),
            bad_words=bad_word_ids(self.tokenizer, params.bad_words) if params.bad_words else (),
            adapter=self._digest_of(lora_request),
            lora_request=lora_request,
        )

    def _digest_of(self, lora_request: LoRARequest | None) -> str:
        if lora_request is None:
            return ""
        if self.adapters is None:
            raise InvalidRequest("adapters are not served: start with enable_lora.", parameter="lora_request")
        return self.adapters.get(lora_request.lora_name).digest

    def _masked_until_min_tokens(self, params: SamplingParams) -> frozenset[int]:
        stops = set(params.stop_token_ids)
        if self.eos is not None and not params.ignore_eos:
            stops.add(self.eos)
        return frozenset(stops)

    def _fit_prompt(self, ids: list[int], params: SamplingParams) -> list[int]:
        if not ids:
            raise InvalidRequest("prompt must have at least one token, got an empty prompt.", parameter="prompt")
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise InvalidRequest(
                f"prompt has token ids {outside[:5]} outside the vocabulary of {self.vocab_size}.", parameter="prompt"
            )
        keep = params.truncate_prompt_tokens
        if keep is not None:
            most = self.max_model_len - 1
            if keep > most:
                raise InvalidRequest(
                    f"truncate_prompt_tokens must be at most {most} (max_model_len - 1), got {keep}.",
                    parameter="truncate_prompt_tokens",
                    value=keep,
                )
            ids = ids[-(most if keep == -1 else keep) :]
        if len(ids) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens, which leaves no room for output: max_model_len is {self.max_model_len} "
                f"tokens for prompt and output together.",
                parameter="prompt",
                value=len(ids),
            )
        return ids
