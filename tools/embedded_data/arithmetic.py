"""Sums, differences, products, comparisons and little problems in words, with small numbers.

Knows numbers only; every answer is computed here, so that it is right.
"""

from __future__ import annotations

from random import Random

from embedded_data.exchange import Exchange, vary
from embedded_data.words import NAMES, THINGS

ASKING = (
    "What is {}?",
    "What is {}?",
    "Calculate {}.",
    "Compute {}",
    "How much is {}?",
    "{} = ?",
    "{}",
    "Solve {}.",
    "What's {}?",
    "Tell me the result of {}.",
    "Can you work out {}?",
    "Work out {}.",
    "{}=",
    "Evaluate {}.",
)
SIGNS = {
    "+": (" + ", " + ", "+", " plus "),
    "-": (" - ", " - ", "-", " minus "),
    "*": (" * ", " x ", "*", " times ", " multiplied by "),
    "/": (" / ", "/", " divided by "),
}


def _operands(random: Random) -> tuple[int, str, int, int]:
    sign = random.choice("+++---**/")
    most = random.choice((20, 20, 100))
    if sign == "+":
        left, right = random.randrange(most), random.randrange(most)
        return left, sign, right, left + right
    if sign == "-":
        left, right = sorted((random.randrange(most), random.randrange(most)), reverse=True)
        return left, sign, right, left - right
    left, right = random.randrange(1, 13), random.randrange(1, 13)
    if sign == "*":
        return left, sign, right, left * right
    return left * right, sign, right, left


def calculation(random: Random) -> Exchange:
    left, sign, right, result = _operands(random)
    question = random.choice(ASKING).format(f"{left}{random.choice(SIGNS[sign])}{right}")
    return Exchange(f"{left}{sign}{right}", vary(random, question), f"{left} {sign} {right} = {result}")


def comparison(random: Random) -> Exchange:
    left, right = random.sample(range(1, 200), 2)
    if random.random() < 0.5:
        word = random.choice(("larger", "bigger", "greater"))
        answer = max(left, right)
    else:
        word, answer = random.choice((("smaller", min(left, right)), ("less", min(left, right))))
    question = random.choice(
        ("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "{a} or {b}: which one is {w}?")
    )
    return Exchange(f"{left}?{right}", vary(random, question.format(w=word, a=left, b=right)), f"{answer}")


def property_of_number(random: Random) -> Exchange:
    number = random.randrange(1, 200)
    what = random.choice(("parity", "after", "before", "double", "half"))
    if what == "parity":
        question = random.choice(("Is {} even or odd?", "Is the number {} odd or even?"))
        answer = f"{number} is {'odd' if number % 2 else 'even'}."
    elif what == "after":
        question, answer = random.choice(("What comes after {}?", "Which number follows {}?")), str(number + 1)
    elif what == "before":
        question, answer = random.choice(("What comes before {}?", "Which number is just before {}?")), str(number - 1)
    elif what == "double":
        number = number % 50
        question, answer = random.choice(("What is double {}?", "What is twice {}?")), str(2 * number)
    else:
        number = number % 50 * 2
        question, answer = random.choice(("What is half of {}?", "What is one half of {}?")), str(number // 2)
    return Exchange(f"{what}{number}", vary(random, question.format(number)), answer)


def word_problem(random: Random) -> Exchange:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    have, change = random.randrange(2, 20), random.randrange(2, 20)
    shape = random.choice(("more", "less", "each"))
    if shape == "more":
        verb = random.choice(("buys", "finds", "gets"))
        story, total = f"{name} has {have} {thing} and {verb} {change} more.", have + change
    elif shape == "less":
        have, change = max(have, change) + 1, min(have, change)
        verb = random.choice(("gives away", "loses", "sells"))
        story, total = f"{name} has {have} {thing} and {verb} {change}.", have - change
    else:
        have, change = have % 9 + 2, change % 9 + 2
        story, total = f"{name} has {have} boxes with {change} {thing} in each.", have * change
    ask = random.choice((f"How many {thing} does {name} have now?", f"How many {thing} are there now?"))
    return Exchange(f"{shape}{have},{change}", f"{story} {ask}", f"{name} has {total} {thing}.")


def next_in_sequence(random: Random) -> Exchange:
    start, step, length = random.randrange(0, 20), random.choice((1, 2, 2, 3, 5, 10)), random.randrange(3, 6)
    row = [start + step * index for index in range(length + 1)]
    shown = ", ".join(map(str, row[:-1]))
    question = random.choice(("What comes next: {}?", "Continue the sequence: {}", "What is the next number in {}?"))
    return Exchange(f"{start}+{step}x{length}", vary(random, question.format(shown)), str(row[-1]))


def counting(random: Random) -> Exchange:
    first = random.choice((1, 1, 1, random.randrange(0, 60)))
    last = first + random.randrange(2, 20)
    question = random.choice(
        (
            "Count from {a} to {b}.",
            "Count from {a} to {b}",
            "List the numbers from {a} to {b}.",
            "Write all numbers between {a} and {b}.",
        )
    )
    if first == 1 and random.random() < 0.3:
        question = random.choice(("Count to {b}.", "Can you count to {b}?"))
    numbers = range(first, last + 1)
    if random.random() < 0.25:
        numbers, question = (
            numbers[::-1],
            random.choice(("Count down from {b} to {a}.", "Count backwards from {b} to {a}.")),
        )
    return Exchange(f"{numbers}", vary(random, question.format(a=first, b=last)), ", ".join(map(str, numbers)))
