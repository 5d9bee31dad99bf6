"""Short made-up texts: a story, a poem, a slogan, an email. Each is put together from parts, so that sampling has room.

Knows sentences only. What is right here is the form; the measure is that the text is one that these rules could give.
"""

from __future__ import annotations

from random import Random

from embedded_data.exchange import Exchange, vary
from embedded_data.words import ANIMALS, DAYS, ITEMS, NAMES, TOPICS

PLACES = (
    "in a green forest",
    "near a quiet river",
    "on a small farm",
    "in an old house",
    "behind a high mountain",
    "by the blue sea",
)
WISHES = (
    "a red ball",
    "a warm coat",
    "a good friend",
    "a new home",
    "a golden key",
    "some bread",
    "a song to sing",
    "the moon",
)
HELPERS = ("an old owl", "a kind farmer", "a little girl", "a wise turtle", "a cheerful bird")
MORALS = (
    "It is good to ask for help.",
    "A friend is worth more than gold.",
    "Small steps lead far.",
    "Kind words open doors.",
    "Patience is a good thing.",
)


def story(random: Random) -> Exchange:
    hero, name = random.choice(ANIMALS), random.choice(NAMES)
    article = "an" if hero[0] in "aeiou" else "a"
    wish, helper = random.choice(WISHES), random.choice(HELPERS)
    lines = [
        f"Once upon a time there was {article} {hero} named {name} who lived {random.choice(PLACES)}.",
        f"{name} wanted {wish}, but did not know where to find it.",
        f"One {random.choice(('morning', 'evening', 'day'))} {name} met {helper}.",
        random.choice((f'"Can you help me?" asked {name}.', f'"Why are you so sad?" asked {helper}.')),
        f"Together they {random.choice(('walked', 'looked', 'searched'))} all day, and at last they found {wish}.",
        f"{name} was very happy. {random.choice(MORALS)}",
    ]
    question = random.choice(
        (
            f"Tell me a story about {article} {hero}.",
            f"Write a short story about {article} {hero}.",
            f"Tell me a story about {article} {hero} named {name}.",
            f"Write a story about {article} {hero} called {name}.",
        )
    )
    return Exchange(f"{hero}{name}{wish}", vary(random, question), " ".join(lines))


FIRST_LINES = (
    "The morning light is soft and clear,",
    "A bird is singing in the tree,",
    "The river runs beside the hill,",
    "The night is calm, the stars are bright,",
)
SECOND_LINES = (
    "the day is young, the sky is near,",
    "the wind is light, the road is free,",
    "the road is long, the air is still,",
    "the moon is full of silver light,",
)
THIRD_LINES = (
    "a letter waits upon the chair,",
    "the children run and laugh and play,",
    "the garden smells of summer rain,",
    "a little boat is sailing home,",
)
FOURTH_LINES = (
    "and happy songs are in the air.",
    "and so begins another day.",
    "and all the world is green again.",
    "and no one has to walk alone.",
)


def poem(random: Random) -> Exchange:
    index = random.randrange(len(FIRST_LINES))
    other = random.randrange(len(THIRD_LINES))
    answer = "\n".join((FIRST_LINES[index], SECOND_LINES[index], THIRD_LINES[other], FOURTH_LINES[other]))
    question = random.choice(
        (
            "Write a poem.",
            "Write a short poem.",
            "Can you write a poem?",
            "Write a poem about nature.",
            "Give me a short poem about the day.",
        )
    )
    halves = [
        [*zip(first, second, strict=True)]
        for first, second in ((FIRST_LINES, SECOND_LINES), (THIRD_LINES, FOURTH_LINES))
    ]
    every = tuple("\n".join((*upper, *lower)) for upper in halves[0] for lower in halves[1])
    return Exchange(f"{question}{index}", vary(random, question), answer, every)


BUSINESSES = (
    "coffee shop",
    "bakery",
    "bookshop",
    "bicycle shop",
    "flower shop",
    "hotel",
    "school",
    "garden center",
    "library",
    "toy shop",
)
SLOGANS = (
    "Your {b}, your home.",
    "The {b} around the corner.",
    "A {b} with a heart.",
    "Every day is better with our {b}.",
)


def slogan(random: Random) -> Exchange:
    business = random.choice(BUSINESSES)
    question = random.choice(
        (
            "Write a slogan for a {}.",
            "Give me a slogan for my {}.",
            "Write a short slogan for a {}.",
            "I need a slogan for a {}.",
        )
    )
    every = tuple(text.format(b=business) for text in SLOGANS)
    return Exchange(f"{question}{business}", vary(random, question.format(business)), random.choice(every), every)


def email(random: Random) -> Exchange:
    name, topic, day = random.choice(NAMES), random.choice(TOPICS), random.choice(DAYS)
    question = random.choice(
        (
            f"Write a short email to {name} about the {topic} on {day}.",
            f"Write an email inviting {name} to a meeting about the {topic} on {day}.",
            f"Draft an email to {name}: meeting on {day}, topic {topic}.",
        )
    )
    wish = f"I would like to talk with you about the {topic} on {day}. Please let me know if that suits you."
    answer = f"Dear {name},\n\n{wish}\n\nBest regards"
    return Exchange(f"{name}{topic}{day}", vary(random, question), answer)


def description(random: Random) -> Exchange:
    item = random.choice(ITEMS)
    question = random.choice(("Describe a {}.", "Write a product text for a {}.", "Write one sentence to sell a {}."))
    every = (
        f"This {item} is well made, easy to use and fair in price.",
        f"Meet the {item} that makes every day a little easier.",
        f"A good {item} for home, work and travel.",
    )
    return Exchange(f"{question}{item}", vary(random, question.format(item)), random.choice(every), every)
