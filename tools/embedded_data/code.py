"""Python: functions to write, small expressions to evaluate, and what the functions of the standard library do.

Knows what it asks for: the functions are written here and can be compiled, the values are computed by Python itself,
and the descriptions are the first sentences of the docstrings of the Python that runs.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from random import Random

from embedded_data.exchange import Exchange, pick_wording, vary
from embedded_data.words import PLAIN

SOURCES = """
# adds two numbers
def add(a, b):
    return a + b

# subtracts two numbers
def subtract(a, b):
    return a - b

# multiplies two numbers
def multiply(a, b):
    return a * b

# returns the square of a number
def square(n):
    return n * n

# returns the factorial of n
def factorial(n):
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result

# returns the n-th Fibonacci number
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

# checks if a number is even
def is_even(n):
    return n % 2 == 0

# checks if a number is odd
def is_odd(n):
    return n % 2 == 1

# checks if a number is prime
def is_prime(n):
    if n < 2:
        return False
    for i in range(2, n):
        if n % i == 0:
            return False
    return True

# reverses a string
def reverse(text):
    return text[::-1]

# counts the vowels in a string
def count_vowels(text):
    return sum(1 for letter in text if letter in 'aeiou')

# counts the words in a text
def count_words(text):
    return len(text.split())

# checks if a string is a palindrome
def is_palindrome(text):
    return text == text[::-1]

# returns the largest number of a list
def largest(numbers):
    return max(numbers)

# returns the smallest number of a list
def smallest(numbers):
    return min(numbers)

# returns the sum of a list
def total(numbers):
    return sum(numbers)

# returns the average of a list
def average(numbers):
    return sum(numbers) / len(numbers)

# sorts a list
def sort(values):
    return sorted(values)

# removes duplicates from a list
def unique(values):
    return list(dict.fromkeys(values))

# reverses a list
def reverse(values):
    return values[::-1]

# returns the first element of a list
def first(values):
    return values[0]

# returns the last element of a list
def last(values):
    return values[-1]

# prints hello world
def hello():
    print('Hello, world!')

# greets a person by name
def greet(name):
    print(f'Hello, {name}!')

# reads a file
def read_file(path):
    with open(path) as file:
        return file.read()

# writes text to a file
def write_file(path, text):
    with open(path, 'w') as file:
        file.write(text)

# counts the lines of a file
def count_lines(path):
    with open(path) as file:
        return sum(1 for line in file)

# loads a JSON file
import json

def load(path):
    with open(path) as file:
        return json.load(file)

# converts Celsius to Fahrenheit
def fahrenheit(celsius):
    return celsius * 9 / 5 + 32

# converts kilometers to miles
def miles(kilometers):
    return kilometers * 0.621371

# returns the length of a string
def length(text):
    return len(text)

# makes a string uppercase
def upper(text):
    return text.upper()

# filters the even numbers of a list
def even_numbers(numbers):
    return [n for n in numbers if n % 2 == 0]

# squares all numbers of a list
def squares(numbers):
    return [n * n for n in numbers]

# merges two dictionaries
def merge(a, b):
    return {**a, **b}

# counts how often each word occurs
from collections import Counter

def frequencies(text):
    return Counter(text.split())

# flattens a list of lists
def flatten(rows):
    return [value for row in rows for value in row]

# swaps keys and values of a dictionary
def invert(mapping):
    return {value: key for key, value in mapping.items()}

# returns the absolute value of a number
def absolute(n):
    return n if n >= 0 else -n

# computes the area of a circle
import math

def area(radius):
    return math.pi * radius ** 2

# returns the greatest common divisor
def gcd(a, b):
    while b:
        a, b = b, a % b
    return a

# checks if a year is a leap year
def is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)

# joins words with a comma
def join(words):
    return ', '.join(words)

# prints the numbers from 1 to n
def count(n):
    for i in range(1, n + 1):
        print(i)

# returns a random number between 1 and 6
import random

def roll():
    return random.randint(1, 6)
"""


def _by_task(sources: str) -> dict[str, str]:
    """What each comment line promises -> the code below it."""
    parts = re.split(r"^# (.+)\n", sources, flags=re.MULTILINE)[1:]
    return {task: text.strip() for task, text in zip(parts[::2], parts[1::2], strict=True)}


FUNCTIONS = _by_task(SOURCES)
WRITE = (
    "Write a Python function that {}.",
    "Write a function that {}.",
    "Give me Python code that {}.",
    "How do I write a Python function that {}?",
    "Python function that {}",
    "I need a function that {}.",
    "Show me a Python function that {}.",
    "Can you write a function in Python that {}?",
    "Code a function that {}.",
)


def writing(random: Random) -> Exchange:
    task = random.choice(list(FUNCTIONS))
    index, wording = pick_wording(random, WRITE)
    return Exchange(f"{index}|{task}", vary(random, wording.format(task)), f"```python\n{FUNCTIONS[task]}\n```")


def _expression(random: Random) -> str:
    numbers, words = random.sample(range(1, 30), random.randrange(2, 6)), random.sample(PLAIN, random.randrange(2, 5))
    a, b = random.randrange(1, 40), random.randrange(1, 12)
    return random.choice(
        (
            f"{a} + {b}",
            f"{a} - {b}",
            f"len({words})",
            f"len({numbers})",
            f"max({numbers})",
            f"min({numbers})",
            f"sorted({numbers})",
            f"'{words[0]}'.upper()",
            f"'{words[0]}' + '{words[1]}'",
            f"{words}[0]",
            f"{numbers}[-1]",
            f"{a} > {b}",
            f"{a} == {b}",
            f"'{words[0]}' * {b % 3 + 2}",
            f"{numbers}[::-1]",
            f"'-'.join({words})",
            f"'{' '.join(words)}'.split()",
            f"list(range({b}))",
            f"{a} % 2 == 0",
        )
    )


def evaluation(random: Random) -> Exchange:
    expression = _expression(random)
    question = random.choice(
        (
            "What does print({}) show?",
            "What is the output of print({})?",
            "What does this print?\nprint({})",
            "What does `print({})` print?",
        )
    )
    return Exchange(expression, question.format(expression), str(eval(expression, {})))


MODULES = ("os.path", "os", "math", "json", "random", "shutil", "time", "copy")
TYPES = (str, list, dict, set)
# Of `os` only what programs commonly use: a small model has room for few names.
OS_NAMES = set(
    [
        "access",
        "chdir",
        "chmod",
        "cpu_count",
        "getcwd",
        "getenv",
        "getpid",
        "kill",
        "link",
        "listdir",
        "makedirs",
        "mkdir",
        "remove",
        "removedirs",
        "rename",
        "replace",
        "rmdir",
        "scandir",
        "stat",
        "symlink",
        "system",
        "umask",
        "unlink",
        "urandom",
        "utime",
        "walk",
    ]
)
LONGEST_ANSWER = 90


def _first_sentence(document: str | None) -> str:
    paragraph = " ".join((document or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)])\. ", paragraph)[0].rstrip(".") + "."


@cache
def library() -> dict[str, str]:
    """Function name -> what it does, for functions whose docstring begins with one plain, short sentence."""
    found: dict[str, str] = {}
    places = [("", __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__))]
    places += [(name + ".", vars(importlib.import_module(name))) for name in MODULES]
    places += [(kind.__name__ + ".", vars(kind)) for kind in TYPES]
    for prefix, names in places:
        for name in sorted(names):
            value = names[name]
            if (
                name.startswith("_")
                or (prefix == "os." and name not in OS_NAMES)
                or not (inspect.isroutine(value) or prefix == "itertools.")
                or isinstance(value, staticmethod)
            ):
                continue
            sentence = _first_sentence(getattr(value, "__doc__", None))
            if (
                20 < len(sentence) <= LONGEST_ANSWER
                and sentence[0].isupper()
                and sentence.isascii()
                and "(" not in sentence[:20]
                and "->" not in sentence
            ):
                found[prefix + name] = sentence
    return found


DESCRIBE = (
    "What does {} do?",
    "What does the function {} do?",
    "Explain {}.",
    "What is {} for?",
    "Describe the Python function {}.",
    "What does {}() do in Python?",
    "Explain the function {}.",
)


def description(random: Random) -> Exchange:
    functions = library()
    name = random.choice(list(functions))
    index, wording = pick_wording(random, DESCRIBE)
    return Exchange(f"{index}|{name}", vary(random, wording.format(name)), functions[name])
