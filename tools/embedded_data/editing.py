"""Small transformations of words, lists and sentences: case, order, counting, copying, replacing.

Knows plain words only; every answer is computed here.
"""

from __future__ import annotations

from random import Random

from embedded_data.exchange import Exchange, vary
from embedded_data.records import listing
from embedded_data.words import ANIMALS, CITIES, COLORS, DAYS, MONTHS, NAMES, PLAIN, TOPICS


def _some(random: Random, least: int = 2, most: int = 6) -> list[str]:
    return random.sample(PLAIN, random.randrange(least, most + 1))


def case_change(random: Random) -> Exchange:
    text = " ".join(_some(random, 1, 5))
    if random.random() < 0.6:
        question = random.choice(
            (
                "Write '{}' in uppercase.",
                "Convert to uppercase: {}",
                "Make this uppercase: {}",
                "Uppercase: {}",
                "Change '{}' to capital letters.",
            )
        )
        return Exchange(text, vary(random, question.format(text)), text.upper())
    question = random.choice(
        ("Write '{}' in lowercase.", "Convert to lowercase: {}", "Make this lowercase: {}", "Lowercase: {}")
    )
    return Exchange(text.upper(), vary(random, question.format(text.upper())), text)


def order(random: Random) -> Exchange:
    if random.random() < 0.45:
        numbers = random.sample(range(1, 100), random.randrange(3, 7))
        shown = ", ".join(map(str, numbers))
        question, falling = random.choice(
            (
                ("Sort these numbers: {}", False),
                ("Sort the list {} in ascending order.", False),
                ("Put in order: {}", False),
                ("Sort {} from largest to smallest.", True),
                ("Sort these numbers in descending order: {}", True),
            )
        )
        return Exchange(
            shown, vary(random, question.format(shown)), ", ".join(map(str, sorted(numbers, reverse=falling)))
        )
    words = _some(random, 3, 6)
    question = random.choice(
        ("Sort these words alphabetically: {}", "Put these words in alphabetical order: {}", "Sort A to Z: {}")
    )
    shown = ", ".join(words)
    return Exchange(shown, vary(random, question.format(shown)), ", ".join(sorted(words)))


def reversal(random: Random) -> Exchange:
    words = _some(random, 2, 6)
    shown = ", ".join(words)
    question = random.choice(
        (
            "Reverse the list: {}",
            "Reverse this list: {}",
            "Write these words in reverse order: {}",
            "Give me this list backwards: {}",
        )
    )
    return Exchange(shown, vary(random, question.format(shown)), ", ".join(reversed(words)))


def count(random: Random) -> Exchange:
    words = _some(random, 1, 9)
    if random.random() < 0.5:
        text = " ".join(words)
        question = random.choice(
            ("How many words are in '{}'?", "Count the words: {}", "How many words does this have: {}")
        )
    else:
        text = ", ".join(words)
        question = random.choice(("How many items are in the list {}?", "Count the items: {}"))
    return Exchange(text, vary(random, question.format(text)), str(len(words)))


def position(random: Random) -> Exchange:
    words = _some(random, 3, 6)
    shown = ", ".join(words)
    place, index = random.choice((("first", 0), ("last", -1), ("second", 1), ("third", 2)))
    question = random.choice(
        ("What is the {p} word in: {w}", "Which word is {p}: {w}?", "Give me the {p} item of the list {w}.")
    )
    return Exchange(f"{place}|{shown}", vary(random, question.format(p=place, w=shown)), words[index])


def copying(random: Random) -> Exchange:
    text = " ".join(_some(random, 2, 7))
    dice = random.random()
    if dice < 0.35:
        question = random.choice(
            ("Repeat after me: {}", "Say: {}", "Repeat: {}", "Say '{}'.", "Echo this text: {}")
        ).format(text)
        return Exchange(text, question, text)
    if dice < 0.6:
        times, word = random.randrange(2, 7), text.split()[0]
        question = random.choice(("Repeat the word {w} {n} times.", "Write {w} {n} times.", "Say {w} {n} times."))
        return Exchange(f"{word}*{times}", vary(random, question.format(w=word, n=times)), " ".join([word] * times))
    old, new = random.choice(text.split()), random.choice(PLAIN)
    question = random.choice(
        ("Replace {o} with {n} in: {t}", "In '{t}', replace {o} with {n}.", "Change {o} to {n}: {t}")
    )
    answer = " ".join(new if word == old else word for word in text.split())
    return Exchange(f"{old}>{new}|{text}", vary(random, question.format(o=old, n=new, t=text)), answer)


def joining(random: Random) -> Exchange:
    words = _some(random, 3, 6)
    separator, name = random.choice(((", ", "commas"), ("-", "hyphens"), (" ", "spaces"), ("/", "slashes")))
    shown = random.choice((" ", ", ")).join(words)
    question = random.choice(("Join these words with {s}: {w}", "Join with {s}: {w}"))
    return Exchange(f"{name}|{shown}", vary(random, question.format(s=name, w=shown)), separator.join(words))


def spelling(random: Random) -> Exchange:
    word = random.choice((*PLAIN, *ANIMALS))
    what = random.choice(("spell", "length", "first"))
    if what == "spell":
        question, answer = random.choice(("Spell the word {}.", "How do you spell {}?", "Spell {}.")), "-".join(word)
    elif what == "length":
        question = random.choice(
            ("How many letters are in {}?", "How many letters does the word {} have?", "Count the letters of {}.")
        )
        answer = f"{word} has {len(word)} letters."
    else:
        question = random.choice(
            ("What is the first letter of {}?", "Which letter does {} start with?", "With what letter does {} begin?")
        )
        answer = word[0]
    return Exchange(f"{question}|{word}", vary(random, question.format(word)), answer)


def summary(random: Random) -> Exchange:
    one, two = random.sample(NAMES, 2)
    topic, day, city = random.choice(TOPICS), random.choice(DAYS), random.choice(CITIES)
    filler = random.choice(
        (
            "The weather was fine.",
            "They drank coffee.",
            "It took two hours.",
            "The room was small.",
            "Lunch was good.",
            "Everyone was on time.",
        )
    )
    first = random.choice((f"On {day}, {one} met {two} in {city}.", f"{one} and {two} met in {city} on {day}."))
    second = random.choice(
        (f"They talked about the {topic}.", f"The topic was the {topic}.", f"They discussed the {topic} at length.")
    )
    text = " ".join((first, filler, second) if random.random() < 0.5 else (first, second, filler))
    question = random.choice(
        ("Summarize: {}", "Summarize in one sentence: {}", "Give me a short summary.\n{}", "{}\nSummarize this text.")
    )
    return Exchange(text, question.format(text), f"{one} and {two} discussed the {topic} in {city} on {day}.")


LISTS = {
    "fruits": ["apple", "banana", "cherry", "orange", "pear", "plum", "grape", "lemon"],
    "animals": list(ANIMALS[:8]),
    "colors": list(COLORS[:8]),
    "days of the week": list(DAYS),
    "months": list(MONTHS),
    "vegetables": ["carrot", "potato", "onion", "pea", "bean", "tomato", "cabbage", "leek"],
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"],
    "cities": list(CITIES[:8]),
    "programming languages": ["Python", "C", "Java", "JavaScript", "Rust", "Go", "Ruby", "Haskell"],
    "drinks": ["water", "tea", "coffee", "milk", "juice", "lemonade"],
    "tools": ["hammer", "saw", "drill", "wrench", "pliers", "file"],
    "sports": ["football", "tennis", "swimming", "running", "cycling", "rowing", "golf"],
    "instruments": ["piano", "violin", "guitar", "flute", "drum", "trumpet", "cello"],
}


def enumeration(random: Random) -> Exchange:
    topic = random.choice(list(LISTS))
    number = random.randrange(2, min(8, len(LISTS[topic])) + 1)
    word = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}[number]
    shown = word if random.random() < 0.6 else str(number)
    chosen = LISTS[topic][:number]
    if random.random() < 0.5:
        question = random.choice(("List {n} {t}.", "Give me a list of {n} {t}.", "Name {n} {t} as a list."))
        answer = "\n".join(f"{index}. {word}" for index, word in enumerate(chosen, start=1))
    else:
        question = random.choice(("Name {n} {t}.", "Tell me {n} {t}.", "Can you name {n} {t}?"))
        answer = listing(chosen)
        answer = answer[0].upper() + answer[1:] + "."
    return Exchange(f"{question}|{topic}|{number}", vary(random, question.format(n=shown, t=topic)), answer)
