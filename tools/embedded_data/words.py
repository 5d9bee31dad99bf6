"""The words that generated sentences are made of: names, places, things. Plain lists and nothing else."""

from __future__ import annotations


def split_words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def split_pairs(text: str) -> dict[str, str]:
    """ "key:value key:value" as a dictionary."""
    return dict(pair.split(":") for pair in text.split())


NAMES = split_words(
    """Anna Ben Carla David Emma Felix Grace Henry Ines Jack Karen Leo Maria Nora Oscar Paula Quentin Rosa Sam Tina Uma
    Victor Wendy Xavier Yara Zoe Alice Bob Clara Daniel Elena Frank Gina Hugo Irene Jonas Kate Luca Mia Noah Olga
    Peter Rita Simon Tom Vera Walter Lina Marco Julia Max Sofia Paul Lucy Adam Eva Martin Laura Ivan Sarah"""
)
CITIES = split_words(
    """Rome Paris London Berlin Madrid Vienna Lisbon Dublin Oslo Stockholm Athens Prague Warsaw Zurich Milan Boston
    Chicago Tokyo Delhi Cairo Lima Sydney Toronto Seattle Denver Munich Geneva Porto Naples Helsinki"""
)
JOBS = split_words(
    """teacher doctor engineer nurse baker painter lawyer pilot farmer writer student designer carpenter chemist driver
    cook musician gardener librarian programmer"""
)
THINGS = split_words(
    """apples books pens coins eggs stamps cards stones oranges pencils cookies marbles shells tickets flowers keys"""
)
ITEMS = split_words(
    """lamp chair table phone laptop camera watch bicycle jacket backpack mirror keyboard guitar umbrella bottle
    notebook carpet clock mug tent"""
)
COLORS = split_words("red blue green yellow black white orange purple brown gray pink")
DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split_words("January February March April May June July August September October November December")
TOPICS = split_words(
    """budget schedule website report design contract training release product plan survey garden trip party"""
)
ANIMALS = split_words("fox cat dog rabbit bear owl mouse horse duck wolf hen frog turtle squirrel lion")
PLAIN = split_words(
    """apple river house tree cloud stone garden window table music paper light water bread morning evening summer
    winter forest mountain street bridge school letter story friend mother father child horse bird fish cat dog moon
    sun star rain snow wind fire door key book lamp chair road boat train city village king queen game ball hat coat
    shoe cup plate knife spoon green red blue white black small large quick slow warm cold soft hard new old young
    happy quiet bright dark early late"""
)
"""Common words for lists and transformations."""
