"""The tables that SQL questions are asked about. Plain tables and nothing else.

A column has one meaning and several names: questions speak of the meaning ("in Paris", "cheaper than 40"), queries need the
name that the schema in the prompt gives it. Nobody can answer without reading the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Lisbon", "Oslo", "Athens", "Prague", "Dublin", "Boston")
DEPARTMENTS = ("sales", "finance", "support", "research")
COLORS = ("red", "blue", "green", "yellow", "black", "white", "gray", "brown")
LANGUAGES = ("English", "French", "German", "Spanish", "Italian", "Greek")


@dataclass(frozen=True)
class Words:
    """A column of text. names: what schemas call it; noun: what questions call it; phrase: "{} employees" or "employees in {}"
    with `{}` for one of `values`, before or after the table's name."""

    names: tuple[str, ...]
    noun: str
    phrase: str
    values: tuple[str, ...]
    before: bool = False


@dataclass(frozen=True)
class Numbers:
    """A column of numbers from 10 to 99. more, less: phrases after the table's name with `{}` for the number."""

    names: tuple[str, ...]
    noun: str
    more: str
    less: str


@dataclass(frozen=True)
class Table:
    """names: of the column that tells one row from another, which questions mean by "which"."""

    name: str
    names: tuple[str, ...]
    words: tuple[Words, ...]
    numbers: tuple[Numbers, ...]


IN_CITY = Words(("city", "town", "place"), "city", "in {}", CITIES)
AGE = Numbers(("age", "years"), "age", "older than {}", "younger than {}")

TABLES = (
    Table(
        "employees",
        ("name", "person"),
        (IN_CITY, Words(("department", "division", "team"), "department", "from {}", DEPARTMENTS)),
        (Numbers(("salary", "pay", "wage"), "salary", "earning more than {}", "earning less than {}"), AGE),
    ),
    Table(
        "customers",
        ("name", "client"),
        (IN_CITY, Words(("plan", "level"), "plan", "on the {} plan", ("basic", "standard", "gold"))),
        (Numbers(("balance", "credit"), "balance", "owing more than {}", "owing less than {}"), AGE),
    ),
    Table(
        "students",
        ("name", "student"),
        (IN_CITY, Words(("language", "subject"), "language", "learning {}", LANGUAGES)),
        (Numbers(("grade", "score", "mark"), "grade", "with a grade above {}", "with a grade below {}"), AGE),
    ),
    Table(
        "products",
        ("product", "item"),
        (
            Words(("color", "colour", "shade"), "color", "{}", COLORS, before=True),
            Words(("category", "kind", "type"), "category", "for the {}", ("garden", "kitchen", "office", "school")),
        ),
        (
            Numbers(("price", "cost"), "price", "dearer than {}", "cheaper than {}"),
            Numbers(("stock", "quantity", "number"), "stock", "with more than {} in stock", "with less than {} in stock"),
        ),
    ),
    Table(
        "cars",
        ("model", "name"),
        (Words(("color", "colour", "shade"), "color", "{}", COLORS, before=True), IN_CITY),
        (
            Numbers(("price", "cost"), "price", "dearer than {}", "cheaper than {}"),
            Numbers(("speed", "rate"), "speed", "faster than {}", "slower than {}"),
        ),
    ),
    Table(
        "books",
        ("title", "name"),
        (
            Words(("language", "text"), "language", "{}", LANGUAGES, before=True),
            Words(("category", "kind", "type"), "category", "about {}", ("history", "music", "science", "travel")),
        ),
        (
            Numbers(("pages", "length", "size"), "length", "longer than {} pages", "shorter than {} pages"),
            Numbers(("price", "cost"), "price", "dearer than {}", "cheaper than {}"),
        ),
    ),
)
