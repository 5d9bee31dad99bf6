"""Beam search over one request's sequences. The scheduler forks their blocks; this file only decides who lives on.

As vLLM's: each round every beam offers its 2 * width likeliest tokens; offers that end the text are finished beams, the best
`width` others go on. At the end finished and running beams are ranked by cumulative log-probability / length ** penalty,
the length being that of prompt and output without the ending token.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.request import BeamSearchParams, BeamSequence


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...]
    logprob: float


class BeamSearch:
    """The beams of one request, by sequence number."""

    def __init__(
        self, params: BeamSearchParams, prompt: tuple[int, ...], first: int, max_tokens: int, stops: frozenset[int]
    ) -> None:
        self.params = params
        self.max_tokens = max_tokens
        self.rounds = 0
        self.done: list[BeamSequence] = []
        self._stops = frozenset() if params.ignore_eos else stops
        self._beams = {first: _Beam(prompt, 0.0)}
        self._offers: dict[int, tuple[tuple[int, float], ...]] = {}
        self._chosen: list[tuple[float, int, int]] = []

    @property
    def width_of_offer(self) -> int:
        return 2 * self.params.beam_width

    def offer(self, sequence: int, candidates: tuple[tuple[int, float], ...]) -> bool:
        """Take one beam's (token, log-probability) candidates; True when every beam has made its offer."""
        if sequence in self._beams:
            self._offers[sequence] = candidates
        return len(self._offers) == len(self._beams)

    def choose(self) -> list[tuple[int, int]]:
        """The round's survivors as (parent, token), best first; empty when the search is over."""
        grown = [
            (beam.logprob + logprob, parent, token)
            for parent, beam in self._beams.items()
            for token, logprob in self._offers[parent]
        ]
        for logprob, parent, token in grown:
            if token in self._stops:
                self._finish(_Beam((*self._beams[parent].tokens, token), logprob), "stop")
        # Ties go to the earlier beam and the lower token: the order of the sort must not depend on anything else.
        places = {parent: place for place, parent in enumerate(self._beams)}
        running = sorted(
            (entry for entry in grown if entry[2] not in self._stops), key=lambda entry: (-entry[0], places[entry[1]], entry[2])
        )
        self._chosen = running[: self.params.beam_width]
        self.rounds += 1
        if self.rounds >= self.max_tokens:
            for logprob, parent, token in self._chosen:
                self._finish(_Beam((*self._beams[parent].tokens, token), logprob), "length")
            self._chosen = []
        return [(parent, token) for _, parent, token in self._chosen]

    def advance(self, children: list[int]) -> None:
        """The sequences that `choose`'s survivors have become, in the same order."""
        self._beams = {
            child: _Beam((*self._beams[parent].tokens, token), logprob)
            for child, (logprob, parent, token) in zip(children, self._chosen, strict=True)
        }
        self._offers = {}

    def best(self) -> list[BeamSequence]:
        """The best beams, best first."""
        return sorted(self.done, key=self._score, reverse=True)[: self.params.beam_width]

    def _finish(self, beam: _Beam, reason: str) -> None:
        self.done.append(BeamSequence(list(beam.tokens), beam.logprob, finish_reason=reason))

    def _score(self, beam: BeamSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return beam.cum_logprob / length**self.params.length_penalty
