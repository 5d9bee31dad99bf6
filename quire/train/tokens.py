"""From a row to the tokens that a server would see, with the loss where the model would write.

No template is edited and none must know of training: for each turn that is learned, the template renders the prompt that a
server would build (with its generation prompt), and the conversation up to the turn's end; what the second has more is the
turn. Prompt and turn are made tokens apart, as they would be when the turn is generated. Turns share one sequence as long
as the server's prompt for the next one begins with the same tokens; where a template rewrites history (thinking that is cut
from earlier turns), the rest is a sequence of its own. The end-of-turn token is learned, what templates write after it not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.errors import InvalidRequest
from quire.text.chat import render
from quire.text.tokenizer import Tokenizer
from quire.train.examples import Example
from quire.train.rows import Conversation, Row, Written, Wrong


@dataclass
class Tokens:
    """A sequence in the making: learned[i] says whether token i counts."""

    ids: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    prompt: int = 0

    def example(self, line: int) -> Example:
        weights = (0.0, *(float(flag) for flag in self.learned[1:]))
        return Example(tuple(self.ids), weights, line, self.prompt)


@dataclass
class Encoder:
    """Rows to sequences. ends: tokens at which a server stops. unended: rows whose template ends no turn with a token."""

    tokenizer: Tokenizer
    ends: frozenset[int]
    train_on: str = "assistant"
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    unended: int = 0
    strange_ends: set[int] = field(default_factory=set)

    def examples(self, row: Row) -> list[Example]:
        """The sequences of a row, one mostly. Raises Wrong."""
        try:
            if row.rejected is not None:
                return [self._pair(row)]
            if isinstance(row.wanted, Written):
                return [self._text(row.wanted).example(row.line)]
            return [tokens.example(row.line) for tokens in self._turns(row.wanted)]
        except InvalidRequest as error:
            raise Wrong(error.parameter or "", error.message) from None

    def _pair(self, row: Row) -> Example:
        assert row.rejected is not None
        wanted, rejected = (
            self._text(one) if isinstance(one, Written) else self._turns(one)[-1] for one in (row.wanted, row.rejected)
        )
        if wanted.ids == rejected.ids:
            raise Wrong("", "has the same answer as preferred and as rejected.")
        whole = wanted.example(row.line)
        return Example(whole.tokens, whole.weights, row.line, whole.prompt, rejected.example(row.line))

    def _text(self, written: Written) -> Tokens:
        """The prompt as /v1/completions reads it, the completion with an end."""
        encode, end = self.tokenizer.encode, self.tokenizer.eos_token_id
        if written.prompt is None:
            ids = encode(written.completion)
            tokens = Tokens(ids, [True] * len(ids))
        else:
            prompt, answer = encode(written.prompt), encode(written.completion, add_special_tokens=False)
            tokens = Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), len(prompt))
        if end is not None and (not tokens.ids or tokens.ids[-1] != end):
            tokens.ids.append(end)
            tokens.learned.append(True)
        return tokens

    def _turns(self, conversation: Conversation) -> list[Tokens]:
        if self.train_on == "all":
            return [self._everything(conversation)]
        learned = sorted(conversation.learned)
        finished: list[Tokens] = []
        tokens = Tokens()
        for turn in learned[-1:] if self.train_on == "last" else learned:
            prompt, answer = self._turn(conversation, turn)
            before = len(tokens.ids)
            if prompt[:before] != tokens.ids:
                self._close(tokens)
                finished.append(tokens)
                tokens, before = Tokens(), 0
            tokens.ids += prompt[before:] + answer
            tokens.learned += [False] * (len(prompt) - before) + [True] * len(answer)
            tokens.prompt = len(prompt)
        self._close(tokens)
        return [*finished, tokens]

    def _turn(self, conversation: Conversation, turn: int) -> tuple[list[int], list[int]]:
        """(tokens of the server's prompt, tokens that the model is to write) of one message."""
        if turn == 0:
            raise Wrong(
                "messages[0]", "is the assistant's: no prompt stands before it. Begin with a user's, or give it weight 0."
            )
        prompt = self._render(conversation, turn, generation=True)
        whole = self._render(conversation, turn + 1, generation=False)
        if not whole.startswith(prompt):
            history = self._render(conversation, turn, generation=False)
            common = next(place for place, (own, other) in enumerate(zip(prompt, whole + "\0", strict=False)) if own != other)
            if common < len(history.rstrip()):
                raise Wrong(
                    f"messages[{turn}]",
                    "changes what the chat template writes before it, so no server could come to this answer.",
                )
        else:
            common = len(prompt)
        answer = self.tokenizer.encode(whole[common:], add_special_tokens=False)
        return self.tokenizer.encode(prompt, add_special_tokens=False), self._to_its_end(answer)

    def _to_its_end(self, answer: list[int]) -> list[int]:
        """The turn up to its end token; newlines and the like that a template writes after it are nobody's."""
        for place in reversed(range(len(answer))):
            token = answer[place]
            if token in self.ends or token in self.tokenizer.special_ids:
                if token not in self.ends:
                    self.strange_ends.add(token)
                return answer[: place + 1]
            if self.tokenizer.token_bytes(token).strip():
                break
        return answer

    def _close(self, tokens: Tokens) -> None:
        """Where the template ends a turn with no token, the last turn gets the end-of-text token, or nothing would end it."""
        last, end = tokens.ids[-1], self.tokenizer.eos_token_id
        if last not in self.ends and last not in self.tokenizer.special_ids and end is not None:
            self.unended += 1
            tokens.ids.append(end)
            tokens.learned.append(True)

    def _everything(self, conversation: Conversation) -> Tokens:
        ids = self.tokenizer.encode(
            self._render(conversation, len(conversation.messages), generation=False), add_special_tokens=False
        )
        turn = max(conversation.learned)
        prompt = len(self._turn(conversation, turn)[0]) if turn else 0
        return Tokens(ids, [True] * len(ids), min(prompt, len(ids)))

    def _render(self, conversation: Conversation, count: int, *, generation: bool) -> str:
        return render(
            self.tokenizer,
            conversation.messages[:count],
            tools=conversation.tools,
            add_generation_prompt=generation,
            chat_template=self.template,
            chat_template_kwargs=self.variables,
        )
