"""The tokenizer of one model: text to token ids, token ids to text, and what a single token stands for.

It wraps the `tokenizers` library, whose work it trusts; `folder` reads the files, `decoder` spells tokens one by one. It speaks
enough of `transformers`' dialect for people who take it from `LLM.get_tokenizer()`. It knows no model and makes no tensors.
Encoding and decoding may be called from any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from tokenizers import Tokenizer as Backend

from quire.errors import InvalidRequest
from quire.text.chat import render
from quire.text.decoder import Decoder, Decoding
from quire.text.folder import Templates, TokenizerFiles, read_tokenizer


class Tokenizer:
    """See the module. `special_tokens` maps roles (`bos_token`, ...) to texts; `special_ids` are those that decoding skips."""

    def __init__(self, files: TokenizerFiles) -> None:
        backend = files.backend
        self.backend: Backend = backend
        self.special_tokens: dict[str, str] = dict(files.special_tokens)
        self.chat_template: Templates = files.chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(token for token, facts in added.items() if facts.special)
        specification = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self.decoder = Decoder(specification, backend.id_to_token)
        self._vocabulary: dict[str, int] | None = None

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a model folder; ModelError says what is missing or damaged."""
        return cls(read_tokenizer(Path(folder)))

    # ---- text and token ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens that are written out in it are recognised, as in `transformers`."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):
            reason = "it holds half of a surrogate pair" if isinstance(text, str) else f"it is {type(text).__name__}"
            raise InvalidRequest(f"text to be encoded must be valid Unicode, but {reason}.", parameter="prompt") from None

    def decode(
        self, ids: Sequence[int] | int, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of token ids; ids beyond the vocabulary (padded embeddings) have none."""
        ids = [ids] if isinstance(ids, int) else list(ids)
        if not spaces_between_special_tokens and not skip_special_tokens:
            decoding = Decoding(self.decoder, glue=self.added_ids)
            return "".join(decoding.feed(token) for token in ids) + decoding.finish()
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise InvalidRequest(
                f"token ids must be integers in [0, {self.vocab_size - 1}].", parameter="tokens", value=ids[:10]
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, as bytes; a token may end inside a character. Empty beyond the vocabulary."""
        piece = self.decoder.spell(token)
        return piece.encode() if isinstance(piece, str) else piece or b""

    def token_text(self, token: int) -> str:
        """One token as shown beside its logprob: with its leading space, bytes that are no character as U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    # ---- special tokens

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of("unk_token")

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        return [self.backend.id_to_token(token) for token in self.all_special_ids]

    # ---- transformers' dialect

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask` of one text, or lists of them for a list of texts."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        each = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": each, "attention_mask": [[1] * len(ids) for ids in each]}

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        """Vocabulary entries to ids, added tokens included; a fresh dictionary."""
        if self._vocabulary is None:
            self._vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return dict(self._vocabulary)

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(token) for token in ids]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of vocabulary entries; the unknown token's id for what is not one."""
        if isinstance(tokens, str):
            token = self.backend.token_to_id(tokens)
            return self.unk_token_id if token is None else token
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **chat_template_kwargs: Any,
    ) -> str | list[int]:
        """The conversation as the model's prompt: token ids, or text with `tokenize=False`."""
        text = render(
            self,
            conversation,
            tools=tools,
            documents=chat_template_kwargs.pop("documents", None),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text
