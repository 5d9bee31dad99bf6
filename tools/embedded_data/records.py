"""Reading data out of sentences (JSON) and asking for data (SQL over small schemas).

Knows the sentences, schemas and queries that it makes itself; runs no database.
"""

from __future__ import annotations

import json
from random import Random

from embedded_data.exchange import Exchange, vary
from embedded_data.words import CITIES, COLORS, DAYS, ITEMS, JOBS, MONTHS, NAMES, TOPICS

Fields = dict[str, str | int]


def _person(random: Random) -> tuple[str, Fields]:
    name, age, city, job = random.choice(NAMES), random.randrange(18, 80), random.choice(CITIES), random.choice(JOBS)
    article = "an" if job[0] in "aeiou" else "a"
    sentence = random.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as {article} {job}.",
            f"{name}, {age}, is {article} {job} from {city}.",
            f"My friend {name} from {city} is {age} and works as {article} {job}.",
            f"{name} is {article} {job} in {city} and turned {age} last week.",
        )
    )
    return sentence, {"name": name, "age": age, "city": city, "job": job}


def _order(random: Random) -> tuple[str, Fields]:
    name, item, price = random.choice(NAMES), random.choice(ITEMS), random.randrange(5, 400)
    quantity, color = random.randrange(2, 20), random.choice(COLORS)
    sentence = random.choice(
        (
            f"{name} ordered {quantity} {color} {item}s for {price} dollars.",
            f"Order: {quantity} {item}s in {color}, {price} dollars, for {name}.",
            f"Please send {quantity} {color} {item}s to {name}. The price is {price} dollars.",
        )
    )
    return sentence, {"name": name, "item": item, "quantity": quantity, "color": color, "price": price}


def _event(random: Random) -> tuple[str, Fields]:
    topic, day, city = random.choice(TOPICS), random.choice(DAYS), random.choice(CITIES)
    hour, name = random.randrange(8, 20), random.choice(NAMES)
    sentence = random.choice(
        (
            f"{name} plans a meeting about the {topic} on {day} at {hour}:00 in {city}.",
            f"On {day} at {hour}:00 {name} talks about the {topic} in {city}.",
            f"The {topic} meeting with {name} is in {city} on {day}, {hour}:00.",
        )
    )
    return sentence, {"topic": topic, "day": day, "time": f"{hour}:00", "city": city, "name": name}


def _contact(random: Random) -> tuple[str, Fields]:
    name, city = random.choice(NAMES), random.choice(CITIES)
    email = f"{name.lower()}@{random.choice(('example.com', 'example.org', 'mail.example'))}"
    phone = f"555-{random.randrange(1000, 10000)}"
    sentence = random.choice(
        (
            f"You can reach {name} in {city} at {email} or {phone}.",
            f"{name} ({city}): phone {phone}, email {email}.",
            f"Write to {name} at {email}, or call {phone}. {name} lives in {city}.",
        )
    )
    return sentence, {"name": name, "email": email, "phone": phone, "city": city}


EXTRACT = (
    "Extract {keys} as JSON: {text}",
    "Extract {keys} from this text as JSON.\n{text}",
    "Return JSON with {keys}.\n\n{text}",
    "Turn this into JSON with the keys {keys}: {text}",
    "{text}\nGive me {keys} as JSON.",
    "{text}\n\nExtract {keys} as a JSON object.",
    "Read the text and answer with JSON ({keys}).\nText: {text}",
)


def listing(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def json_extraction(random: Random) -> Exchange:
    text, fields = random.choice((_person, _order, _event, _contact))(random)
    keys = random.sample(list(fields), random.randrange(1, len(fields) + 1))
    if random.random() < 0.5:
        keys.sort(key=list(fields).index)
    question = random.choice(EXTRACT).format(keys=listing(keys), text=text)
    return Exchange(text, question, json.dumps({key: fields[key] for key in keys}))


SCHEMAS: dict[str, dict[str, str]] = {
    "users": {"id": "", "name": "name", "age": "number", "city": "city", "email": ""},
    "employees": {"id": "", "name": "name", "salary": "number", "department": "word", "city": "city"},
    "orders": {"id": "", "customer": "name", "product": "item", "price": "number", "quantity": "number"},
    "products": {"id": "", "name": "item", "price": "number", "color": "color", "stock": "number"},
    "students": {"id": "", "name": "name", "grade": "number", "city": "city", "age": "number"},
    "books": {"id": "", "title": "", "author": "name", "year": "number", "pages": "number"},
    "events": {"id": "", "topic": "topic", "city": "city", "month": "month", "guests": "number"},
    "cars": {"id": "", "owner": "name", "color": "color", "price": "number", "year": "number"},
}
VALUES = {
    "name": NAMES,
    "city": CITIES,
    "item": ITEMS,
    "color": COLORS,
    "topic": TOPICS,
    "month": MONTHS,
    "word": ("sales", "finance", "support", "research", "marketing"),
}
NUMBER_TESTS = (
    (">", ("greater than", "above", "over", "more than")),
    ("<", ("less than", "below", "under")),
    ("=", ("equal to", "of")),
)


def _condition(random: Random, columns: dict[str, str]) -> tuple[str, str]:
    """A condition in words and in SQL."""
    column = random.choice([name for name, kind in columns.items() if kind])
    if columns[column] == "number":
        sign, words = random.choice(NUMBER_TESTS)
        value = random.choice((random.randrange(1, 100), random.randrange(1, 10) * 100))
        return f"with {column} {random.choice(words)} {value}", f"{column} {sign} {value}"
    value = random.choice(VALUES[columns[column]])
    return f"where {column} is {value}", f"{column} = '{value}'"


def _aggregate(random: Random, table: str, columns: dict[str, str]) -> tuple[str, str]:
    number = random.choice([name for name, kind in columns.items() if kind == "number"])
    function, words = random.choice((("AVG", "average"), ("MAX", "highest"), ("MIN", "lowest"), ("SUM", "total")))
    return f"the {words} {number} of all {table}", f"SELECT {function}({number}) FROM {table}"


def _query(random: Random, table: str, columns: dict[str, str]) -> tuple[str, str]:
    """What is wanted in words, and the query."""
    shape = random.choice(("all", "where", "where", "where", "count", "aggregate", "order", "group", "delete"))
    asked = random.sample(list(columns), random.choice((1, 1, 2)))
    words, condition = _condition(random, columns)
    if shape == "all":
        return f"all {table}", f"SELECT * FROM {table}"
    if shape == "where":
        return f"{listing(asked)} of {table} {words}", f"SELECT {', '.join(asked)} FROM {table} WHERE {condition}"
    if shape == "count":
        return f"the number of {table} {words}", f"SELECT COUNT(*) FROM {table} WHERE {condition}"
    if shape == "aggregate":
        return _aggregate(random, table, columns)
    number = random.choice([name for name, kind in columns.items() if kind == "number"])
    if shape == "order":
        count, (direction, top) = random.randrange(2, 11), random.choice((("DESC", "highest"), ("ASC", "lowest")))
        return (
            f"the {count} {table} with the {top} {number}",
            f"SELECT * FROM {table} ORDER BY {number} {direction} LIMIT {count}",
        )
    if shape == "group":
        column = random.choice([name for name, kind in columns.items() if kind not in ("", "number")])
        return f"the number of {table} for each {column}", f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column}"
    return f"delete {table} {words}", f"DELETE FROM {table} WHERE {condition}"


SQL = (
    "Table {schema}. Write SQL: {wish}.",
    "Given the table {schema}, write a SQL query for {wish}.",
    "Schema: {schema}\nQuestion: {wish}",
    "Write SQL for the table {schema}: {wish}.",
    "{schema}\nSQL for {wish}, please.",
    "I have a table {schema}. What is the SQL for {wish}?",
)


def sql(random: Random) -> Exchange:
    table = random.choice(list(SCHEMAS))
    wanted = random.sample([name for name in SCHEMAS[table] if name != "id"], random.choice((3, 4)))
    columns = {name: kind for name, kind in SCHEMAS[table].items() if name in wanted or name == "id"}
    while "number" not in columns.values() or not {*columns.values()} - {"", "number"}:
        columns = SCHEMAS[table]
    wish, query = _query(random, table, columns)
    schema = f"{table}({', '.join(columns)})"
    return Exchange(f"{schema}|{wish}", vary(random, random.choice(SQL).format(schema=schema, wish=wish)), query + ";")
