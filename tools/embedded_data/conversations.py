"""Conversations of one to many turns, put together from the skills by weight. Knows messages, not the chat template."""

from __future__ import annotations

from random import Random

from embedded_data import arithmetic, code, dialogue, editing, facts, records, stories
from embedded_data.exchange import Exchange, Skill, draw, held_out

Messages = list[dict[str, str]]

SKILLS: dict[str, dict[Skill, float]] = {
    "arithmetic": {
        arithmetic.calculation: 9,
        arithmetic.comparison: 1.5,
        arithmetic.property_of_number: 2,
        arithmetic.word_problem: 2.5,
        arithmetic.next_in_sequence: 1,
    },
    "counting": {arithmetic.counting: 2},
    "json": {records.json_extraction: 8},
    "sql": {records.sql: 8},
    "python-describe": {code.description: 4},
    "python-write": {code.writing: 4},
    "python-evaluate": {code.evaluation: 2},
    "facts": {facts.fact: 12},
    "translation": {facts.translation: 2},
    "editing": {
        editing.case_change: 2.5,
        editing.order: 3,
        editing.reversal: 2,
        editing.count: 2,
        editing.position: 2,
        editing.copying: 3,
        editing.joining: 1.5,
    },
    "spelling": {editing.spelling: 1},
    "lists": {editing.enumeration: 2},
    "summary": {editing.summary: 2},
    "email": {stories.email: 1.5},
    "stories": {stories.story: 2.5},
    "poems": {stories.poem: 0.8, stories.slogan: 0.8, stories.description: 0.8},
    "small-talk": {dialogue.small_talk: 9},
    "out-of-reach": {dialogue.out_of_reach: 1.5},
}
"""Kind -> the skills measured under that name, each with its share of the training."""

MEASURED_BY_FORM = ("stories",)
"""Kinds in which no single answer is right, so that exact match says nothing."""

REMEMBERED_SHARE = 0.06
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are quire-tiny, a small and friendly assistant.",
    "Answer briefly.",
    "You are a helpful, polite assistant.",
    "You are an assistant. Be concise.",
    "You are a Python expert.",
    "You are a friendly chatbot.",
)
TURNS = (1, 1, 1, 2, 3, 4, 6, 9)


def _flat() -> tuple[list[tuple[str, Skill]], list[float]]:
    pairs = [(kind, skill, weight) for kind, skills in SKILLS.items() for skill, weight in skills.items()]
    return [(kind, skill) for kind, skill, _ in pairs], [weight for _, _, weight in pairs]


CHOICES, CHOICE_WEIGHTS = _flat()


def _turns(exchanges: list[Exchange]) -> Messages:
    return [
        {"role": role, "content": text}
        for one in exchanges
        for role, text in (("user", one.question), ("assistant", one.answer))
    ]


def opening(random: Random) -> Messages:
    return [{"role": "system", "content": random.choice(SYSTEM_PROMPTS)}] if random.random() < 0.3 else []


def _memory(random: Random, want_held_out: bool) -> list[Exchange]:
    while True:
        exchanges = dialogue.remembered(random)
        if held_out("memory", exchanges[-1].key) == want_held_out:
            return exchanges


def conversation(random: Random) -> Messages:
    """A training conversation: independent exchanges one after another, sometimes with something to remember."""
    exchanges = []
    for _ in range(random.choice(TURNS)):
        kind, skill = random.choices(CHOICES, CHOICE_WEIGHTS)[0]
        exchanges.append(draw(kind, skill, random, want_held_out=False))
    if random.random() < REMEMBERED_SHARE:
        told, asked = _memory(random, want_held_out=False)
        place = random.randrange(min(len(exchanges), 2) + 1)
        exchanges = [told, *exchanges[:place], asked, *exchanges[place:]]
    return opening(random) + _turns(exchanges)


def examination(kind: str, random: Random) -> tuple[Messages, Exchange]:
    """A held-out question of one kind as a conversation that waits for its answer, and the exchange it belongs to."""
    if kind == "memory":
        told, asked = _memory(random, want_held_out=True)
        return [*_turns([told]), {"role": "user", "content": asked.question}], asked
    skills = SKILLS[kind]
    skill = random.choices(list(skills), list(skills.values()))[0]
    exchange = draw(kind, skill, random, want_held_out=True)
    return [*opening(random), {"role": "user", "content": exchange.question}], exchange


KINDS = (*SKILLS, "memory")
