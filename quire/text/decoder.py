"""Tokens to text, one token at a time, with exactly the text that the `tokenizers` library gives for the whole list.

`Decoder` reads the decoder section of a tokenizer.json once; `Decoding` follows one sequence. Text comes out only when no later
token can change it. What makes that hard is bytes: a byte-level token may end inside a character, and with byte fallback one
bad byte turns its whole run of byte tokens into U+FFFD, so a run stays open (`Decoding.ahead`) until a token of another kind.

This file knows no stop strings, no prompts and no files.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, decoders

from quire.errors import ModelError

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")
_UTF8 = codecs.getincrementaldecoder("utf-8")

Stage = Callable[[str, bool], str]  # (text of one token, is it the first of the sequence) -> text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: each byte is written as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


class Decoder:
    """The rules of one tokenizer: what each token is spelled as, and which stages work on it. Shared, never changes.

    specification: the `decoder` of tokenizer.json (None joins tokens with spaces). token_of: token id to its vocabulary entry.
    """

    def __init__(self, specification: Mapping[str, Any] | None, token_of: Callable[[int], str | None]) -> None:
        self._token_of = token_of
        self._before: list[Stage] = []  # stages ahead of byte fallback, which therefore also see the byte tokens
        self._after: list[Stage] = []
        self.byte_level = False
        self.byte_fallback = False
        self.strip: tuple[str, int] = ("", 0)  # (character, how many) taken off the front of the whole text
        self._fused = False
        self._pieces: dict[int, bytes | str | None] = {}
        if specification is None:
            self._after.append(lambda text, first: text if first else " " + text)
        else:
            self._read(specification)

    def _read(self, step: Mapping[str, Any]) -> None:
        kind = step.get("type")
        if kind == "Sequence":
            for inner in step["decoders"]:
                self._read(inner)
        elif kind == "ByteLevel" and not self._before and not self._after:
            self.byte_level = True
        elif kind == "ByteFallback" and not self._fused:
            self.byte_fallback = True
        elif kind == "Fuse":
            self._fused = True
        elif kind == "Strip" and self._fused and step.get("stop", 0) == 0 and not self.strip[1]:
            self.strip = (step["content"], step["start"])
        elif kind in _STAGES and not self._fused and not self.byte_level:
            (self._after if self.byte_fallback else self._before).append(_STAGES[kind](step))
        else:
            raise ModelError(
                f"tokenizer.json has a decoder step {kind!r} that Quire cannot follow token by token; "
                f"known are ByteLevel, ByteFallback, Fuse, {', '.join(_STAGES)}."
            )

    def spell(self, token: int) -> bytes | str | None:
        """A token inside a sequence: bytes where it stands for bytes, else text; None when there is no such token."""
        try:
            return self._pieces[token]
        except KeyError:
            piece = self._pieces[token] = self._spell(token, first=False)
            return piece

    def spell_first(self, token: int) -> bytes | str | None:
        """The same for the first token of a sequence, which may lose its leading space."""
        return self._spell(token, first=True)

    def _spell(self, token: int, first: bool) -> bytes | str | None:
        text = self._token_of(token)
        if text is None:
            return None
        if self.byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in text)
            except KeyError:  # an added token in characters outside the alphabet is spelled as it is
                return text.encode()
        for stage in self._before:
            text = stage(text, first)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return self.after(text, first)

    def after(self, text: str, first: bool) -> str:
        for stage in self._after:
            text = stage(text, first)
        return text


def _metaspace(step: Mapping[str, Any]) -> Stage:
    mark, keep = step.get("replacement", "▁"), step.get("prepend_scheme", "always") == "never"
    return lambda text, first: text.replace(mark, "" if first and not keep else " ")


def _replace(step: Mapping[str, Any]) -> Stage:
    pattern, content = step["pattern"], step["content"]
    if "String" in pattern:
        return lambda text, first: text.replace(pattern["String"], content)
    rule = decoders.Replace(Regex(pattern["Regex"]), content)  # the library's own regular expressions, not Python's
    return lambda text, first: rule.decode([text])


def _strip(step: Mapping[str, Any]) -> Stage:
    rule = decoders.Strip(step["content"], step["start"], step["stop"])
    return lambda text, first: rule.decode([text]) if text else ""


def _word_piece(step: Mapping[str, Any]) -> Stage:
    rule = decoders.WordPiece(prefix=step["prefix"], cleanup=step["cleanup"])
    anchor = len(rule.decode(["x"]))
    return lambda text, first: rule.decode([text]) if first else rule.decode(["x", text])[anchor:]


_STAGES: dict[str, Callable[[Mapping[str, Any]], Stage]] = {
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip,
    "WordPiece": _word_piece,
}


class Decoding:
    """The text of one sequence as its tokens arrive.

    skip: token ids that are passed over (special tokens). glue: ids that stand next to each other without a space between.
    fresh: the sequence begins a text; otherwise it continues one, and a leading space is kept.
    ahead: text of the open run of byte tokens, as it is if the sequence ends here; not settled yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        skip: frozenset[int] = frozenset(),
        *,
        glue: frozenset[int] = frozenset(),
        fresh: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skip = skip
        self._glue = glue
        self._glued = False
        self._first = fresh
        self._strip = decoder.strip[1] if fresh else 0
        self._utf8 = _UTF8("replace" if decoder.byte_level else "strict")
        self._run = 0  # byte tokens in the open run
        self._run_first = False
        self._run_text = ""
        self._broken = False
        self.ahead = ""

    def feed(self, token: int) -> str:
        """Take one token; returns the text that is settled by it."""
        if token in self._skip:
            return ""
        glued, self._glued = self._glued, token in self._glue
        first = self._first or (glued and self._glued)
        piece = self._decoder.spell_first(token) if first else self._decoder.spell(token)
        if piece is None:
            return ""
        if self._decoder.byte_level:
            return self._utf8.decode(piece)
        self._first = False
        if isinstance(piece, bytes):
            return self._feed_byte(piece, first)
        return self._settle(self._end_run() + piece)

    def finish(self) -> str:
        """Settle what is open: half a character becomes U+FFFD."""
        if self._decoder.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._settle(self._end_run())

    def _feed_byte(self, byte: bytes, first: bool) -> str:
        if not self._run:
            self._run_first = first
        self._run += 1
        if self._broken:
            return self._settle(REPLACEMENT)
        try:
            character = self._utf8.decode(byte)
        except UnicodeDecodeError:  # nothing can mend it: every byte of this run, so far and to come, is U+FFFD
            self._broken, self.ahead = True, ""
            return self._settle(REPLACEMENT * self._run)
        if character:
            self._run_text += character
            self.ahead = self._stripped(self._decoder.after(self._run_text, self._run_first))
        return ""

    def _end_run(self) -> str:
        if not self._run:
            return ""
        text = ""
        if not self._broken:
            whole = not self._utf8.getstate()[0]
            text = self._decoder.after(self._run_text, self._run_first) if whole else REPLACEMENT * self._run
        self._utf8.reset()
        self._run, self._run_text, self._broken, self.ahead = 0, "", False, ""
        return text

    def _stripped(self, text: str) -> str:
        """`text` without what is still to be taken off the front."""
        character, place = self._decoder.strip[0], 0
        while place < min(self._strip, len(text)) and text[place] == character:
            place += 1
        return text[place:]

    def _settle(self, text: str) -> str:
        if not self._strip or not text:
            return text
        rest = self._stripped(text)
        self._strip = 0 if rest else self._strip - len(text)
        return rest
