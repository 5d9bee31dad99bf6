"""The text of one sequence while it is generated: what may be shown, and whether a stop string has been completed.

Shown text is never taken back: half characters are held, and so is whatever may yet turn out to be the beginning of a stop
string, and nothing more than that. Stop strings are followed by one automaton each (Knuth, Morris, Pratt), so a token costs its
own characters and not the length of the text. The stream does not decide when a sequence ends for any other reason; it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from quire.text.decoder import Decoding

if TYPE_CHECKING:
    from quire.request import SamplingParams
    from quire.text.tokenizer import Tokenizer


@lru_cache(maxsize=1024)
def borders(word: str) -> tuple[int, ...]:
    """borders[k]: how much of `word`'s beginning still matches when its first k characters matched and the next does not."""
    table, border = [0, 0], 0
    for character in word[1:]:
        while border and word[border] != character:
            border = table[border]
        border += word[border] == character
        table.append(border)
    return tuple(table)


class StopWatch:
    """Follows the stop strings over a text that arrives in pieces. `depth`: so many last characters may belong to one."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._borders = [borders(word) for word in words]
        self._states = [0] * len(words)
        self._mark = self._states
        self.depth = 0

    def mark(self) -> None:
        """Remember this place for `back`."""
        self._mark = list(self._states)

    def back(self) -> None:
        """Forget what was scanned since `mark`."""
        self._states = list(self._mark)
        self.depth = max(self._states, default=0)

    def scan(self, text: str, allowed: bool) -> tuple[str, int] | None:
        """(stop string, characters of `text` up to its end) for the first one completed, ties by list order.

        A stop string that is completed while not `allowed` does not count, now or later.
        """
        states = self._states
        for place, character in enumerate(text, 1):
            for index, word in enumerate(self.words):
                table, state = self._borders[index], states[index]
                while state and word[state] != character:
                    state = table[state]
                state += word[state] == character
                if state == len(word):
                    if allowed:
                        return word, place
                    state = table[state]
                states[index] = state
        self.depth = max(states, default=0)
        return None


class TextStream:
    """Incremental detokenizer and stop strings of one sequence.

    The output continues the prompt: with SentencePiece, ` world` after `Hello` keeps its space, so prompt + text reads on, as
    decoding both together would. With empty `prompt_ids` the text is exactly `tokenizer.decode(output_ids)`.

    num_tokens: tokens taken in, the one that completed a stop string included; later ones of the same push are not.
    stop: the stop string that was completed, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        skip = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        glue = frozenset() if params.spaces_between_special_tokens else tokenizer.added_ids
        spell = tokenizer.decoder.spell
        fresh = not any(token not in skip and spell(token) for token in prompt_ids)
        self._decoding = Decoding(tokenizer.decoder, skip, glue=glue, fresh=fresh)
        self._watch = StopWatch(params.stop or [])
        self._include_stop = params.include_stop_str_in_output
        self._detokenize = params.detokenize
        self._chunks: list[str] = []
        self._taken = 0
        self._text, self._joined = "", 0
        self._held = ""  # settled, but perhaps the beginning of a stop string
        self._ahead = ""  # already scanned, not settled
        self._closed = False
        self.num_tokens = 0
        self.stop: str | None = None

    @property
    def text(self) -> str:
        """All text that may be shown."""
        if self._joined < len(self._chunks):
            self._text += "".join(self._chunks[self._joined :])
            self._joined = len(self._chunks)
        return self._text

    def take(self) -> str:
        """The text that may be shown and was not taken before."""
        fresh = "".join(self._chunks[self._taken :])
        self._taken = len(self._chunks)
        return fresh

    def push(self, ids: Sequence[int], *, min_tokens_reached: bool = True) -> str | None:
        """Take the next tokens; returns the stop string that they complete, at which the text ends, or None.

        Until min_tokens is reached stop strings are not looked for; one that was completed by then never counts.
        """
        for token in ids:
            if self._closed:
                break
            self.num_tokens += 1
            if self._detokenize:
                self._take_in(self._decoding.feed(token), min_tokens_reached)
        return self.stop

    def finish(self) -> None:
        """The sequence has ended: show what was held back, half a character as U+FFFD."""
        if not self._closed:
            self._closed = True
            self._show(self._held + self._decoding.finish())

    def _take_in(self, settled: str, allowed: bool) -> None:
        watch = self._watch
        if not watch.words:
            self._show(settled)
            return
        ahead, scanned = self._decoding.ahead, self._ahead
        view = settled + ahead
        if not view.startswith(scanned):  # the open run of bytes turned out to be no text
            watch.back()
            scanned = ""
        if ahead and not scanned:
            watch.mark()
        self._ahead = ahead
        found = watch.scan(view[len(scanned) :], allowed)
        pending = self._held + settled
        if found is not None:
            self.stop, place = found
            end = len(self._held) + len(scanned) + place
            self._closed = True
            self._show((pending + ahead)[: end if self._include_stop else end - len(self.stop)])
            return
        if ahead:  # nothing is settled, and the run may yet turn into other text
            return
        cut = len(pending) - watch.depth
        self._show(pending[:cut])
        self._held = pending[cut:]

    def _show(self, text: str) -> None:
        if text:
            self._chunks.append(text)
