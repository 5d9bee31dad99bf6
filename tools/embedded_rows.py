"""Text and conversations as token rows, and the rows of each training step.

A step's rows are a pure function of (seed, step): nothing has to be saved for an exact resume. Half of the tokens are
library text (windows of 1,024 and 2,048 tokens), a twelfth are meaningless repetitions, the rest conversations. Every
token of a text is learned; of a repetition all but its first round; of a conversation only what the assistant says, its
end-of-turn token included. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from embedded_data import conversations, corpus, facts
from embedded_folder import render
from tokenizers import Tokenizer

BEGIN_ID, END_ID, TURN_ID = 1, 2, 3
LONGEST = 2048
TEXT_WINDOWS = ((1024, 1024), (1024, 1024), (1024, 1024), (2048,))
"""The lengths of the text windows in each of four consecutive steps."""
REPETITIONS, REPEATED = 5, range(8, 33)
"""Repetitions in a step, and how many tokens are repeated in one."""
LONG_CONVERSATION_EVERY, LONG_CONVERSATION_PARTS = 8, 12
STATEMENTS = 4
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Row:
    """One sequence; learned[i] says whether token i is to be predicted (from what stands before it)."""

    tokens: list[int]
    learned: list[bool]

    def cut(self, length: int) -> Row:
        return Row(self.tokens[:length], self.learned[:length])


class RowMaker:
    """Tokens of the training text, and rows made of it and of generated conversations."""

    def __init__(self, tokenizer: Tokenizer, seed: int, step_tokens: int) -> None:
        self.tokenizer, self.seed, self.step_tokens = tokenizer, seed, step_tokens
        train, _ = corpus.split(corpus.documents())
        self.stream = stream(tokenizer, train)
        self.assistant = self.ids("assistant\n")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(self, messages: conversations.Messages) -> Row:
        tokens = self.ids(render(messages))
        return Row(tokens, answered(tokens, self.assistant))

    def text_window(self, number: int, length: int) -> Row:
        """The number-th window: golden-ratio steps visit the whole stream evenly, whatever the number of windows."""
        start = int((number * GOLDEN % 1.0) * (len(self.stream) - length))
        tokens = [BEGIN_ID, *self.stream[start : start + length - 1]]
        return Row(tokens, [False] + [True] * (length - 1))

    def statements(self, random: Random) -> Row:
        tokens = [BEGIN_ID, *self.ids("\n".join(facts.statement(random) for _ in range(STATEMENTS))), END_ID]
        return Row(tokens, [False] + [True] * (len(tokens) - 1))

    def repetition(self, random: Random) -> Row:
        """Tokens without meaning, over and over. Only looking back predicts them, and to copy from a question is the
        same: small models find it late by themselves (Olsson et al. 2022, induction heads)."""
        count = random.choice(REPEATED)
        if random.random() < 0.5:
            once = random.sample(range(TURN_ID + 1, self.tokenizer.get_vocab_size()), count)
        else:
            once = random.choices(self.stream, k=count)
        tokens = [BEGIN_ID, *once * random.choice((2, 2, 3))]
        return Row(tokens, [False] * (1 + count) + [True] * (len(tokens) - 1 - count))

    def step(self, step: int) -> list[Row]:
        random = Random(f"{self.seed}:{step}")
        lengths = TEXT_WINDOWS[step % len(TEXT_WINDOWS)]
        rows = [self.text_window(step * 2 + index, length) for index, length in enumerate(lengths)]
        rows += [self.statements(random), *(self.repetition(random) for _ in range(REPETITIONS))]
        room = self.step_tokens - sum(len(row.tokens) for row in rows)
        if step % LONG_CONVERSATION_EVERY == LONG_CONVERSATION_EVERY // 2:
            messages = [
                message for _ in range(LONG_CONVERSATION_PARTS) for message in conversations.conversation(random)
            ]
            rows.append(self.conversation(messages).cut(min(LONGEST, room)))
            room -= len(rows[-1].tokens)
        while room > 32:
            row = self.conversation(conversations.conversation(random)).cut(room)
            rows.append(row)
            room -= len(row.tokens)
        return rows


def stream(tokenizer: Tokenizer, files: list[tuple[str, str]]) -> list[int]:
    """All files end to end, each between a begin and an end token."""
    tokens: list[int] = []
    for encoding in tokenizer.encode_batch([text for _, text in files], add_special_tokens=False):
        tokens += [BEGIN_ID, *encoding.ids, END_ID]
    return tokens


def answered(tokens: list[int], assistant: list[int]) -> list[bool]:
    """Which tokens the assistant says: from after its role line to its end-of-turn token."""
    learned = [False] * len(tokens)
    inside, index = False, 0
    while index < len(tokens):
        if tokens[index] == TURN_ID:
            inside = tokens[index + 1 : index + 1 + len(assistant)] == assistant
            index += 1 + len(assistant) if inside else 1
            continue
        learned[index] = inside
        if tokens[index] == END_ID:
            inside = False
        index += 1
    return learned
