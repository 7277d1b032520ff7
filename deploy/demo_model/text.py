"""Text for the demo model, generated from the templates below: free to redistribute, endless, and never the same twice.

  stories    short, simple sentences about people, animals and places
  records    facts "The code of <name> is <digits>." among such sentences; each is stated again later, near or far

Conversations are in chats.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PEOPLE = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
    "Wendy",
    "Zoe",
]
ANIMALS = ["cat", "dog", "fox", "bird", "horse", "rabbit", "mouse", "duck", "goat", "owl", "bear", "frog"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "golden", "silver"]
PLACES = ["garden", "forest", "river", "kitchen", "school", "market", "harbor", "village", "tower", "library", "bridge", "field"]
THINGS = ["book", "lamp", "key", "box", "cup", "bell", "rope", "map", "coin", "letter", "basket", "ladder"]
VERBS = ["found", "lost", "carried", "painted", "opened", "hid", "washed", "moved", "sold", "kept"]
FEELINGS = ["happy", "tired", "proud", "calm", "curious", "brave", "quiet", "cheerful"]
WEATHER = ["sunny", "cloudy", "rainy", "windy", "cold", "warm"]
CITIES = ["Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Vienna", "Prague", "Lisbon", "Dublin"]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

ANSWER, PLAIN, RANDOM = 1.0, 0.1, 0.0
"""Weight in the loss: what can be known from the text before, its frame, and what nobody could know."""

ATTRIBUTES = {"code": (), "home": PLACES, "gift": THINGS, "friend": PEOPLE, "city": CITIES, "pet": ANIMALS}
"""What is recorded about a name, and the values it may have; a code is four digits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a document. Pieces meet at spaces or special tokens, so each can be tokenised by itself."""

    text: str
    weight: float = PLAIN
    fact: int = -1
    """The value of the document's fact of this number."""
    is_question: bool = False
    """The fact was stated before."""


def sentence(rng: random.Random) -> str:
    person, other = rng.sample(PEOPLE, 2)
    animal, colour, place, thing = rng.choice(ANIMALS), rng.choice(COLOURS), rng.choice(PLACES), rng.choice(THINGS)
    return rng.choice(
        (
            f"{person} {rng.choice(VERBS)} a {colour} {thing} in the {place}.",
            f"The {colour} {animal} slept near the {place}.",
            f"{person} and {other} walked to the {place} together.",
            f"It was a {rng.choice(WEATHER)} day, and {person} was {rng.choice(FEELINGS)}.",
            f"A {animal} looked at the {thing} and ran to the {place}.",
            f"{person} gave the {thing} to {other}.",
            f"In the {place} there was a {colour} {thing}.",
            f"{other} asked {person} about the {animal}.",
        )
    )


def story(rng: random.Random, num_sentences: int) -> str:
    """Once upon a time, a person and an animal go through a fixed little plot."""
    person, animal, place = rng.choice(PEOPLE), rng.choice(ANIMALS), rng.choice(PLACES)
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    opening = (
        f"Once upon a time there was a {animal} who lived near the {place}. One day {person} came to the {place} and saw the {animal}. "
        f"{person} had a {colour} {thing}. The {animal} liked the {colour} {thing} very much."
    )
    middle = " ".join(sentence(rng) for _ in range(num_sentences))
    ending = f"In the end {person} gave the {colour} {thing} to the {animal}, and they were {rng.choice(FEELINGS)}."
    return " ".join(part for part in (opening, middle, ending) if part)


def name(rng: random.Random) -> str:
    kind, person = rng.random(), rng.choice(PEOPLE)
    thing = f"the {rng.choice(COLOURS)} {rng.choice(ANIMALS)}"
    return f"{thing} of {person}" if kind < 0.4 else thing if kind < 0.8 else person


def code(rng: random.Random) -> str:
    return f"{rng.randrange(10000):04d}"


def fact(rng: random.Random, attributes: list[str]) -> tuple[str, str]:
    """("The code of the red fox is", "4821")."""
    attribute = rng.choice(attributes)
    value = rng.choice(ATTRIBUTES[attribute]) if ATTRIBUTES[attribute] else code(rng)
    return f"The {attribute} of {name(rng)} is", value


def distinct_facts(rng: random.Random, attributes: list[str], num: int) -> list[tuple[str, str]]:
    """(statement, value) pairs, no statement twice."""
    facts: dict[str, str] = {}
    while len(facts) < num:
        facts.setdefault(*fact(rng, attributes))
    return list(facts.items())


def records(rng: random.Random, num_words: int) -> list[Piece]:
    """A document of about so many words: facts among filler; once enough of them are open, old ones are asked for again."""
    attributes = ["code"] if rng.random() < 0.5 else list(ATTRIBUTES)
    filler = rng.choice((0.0, 0.3, 1.0, 3.0, 8.0))
    backlog = rng.uniform(0.05, 0.8) * num_words / (8 + 8 * filler)
    values: list[str] = []
    numbers: dict[str, int] = {}
    open_questions: list[str] = []
    pieces = [Piece(BOS)]
    written = 0
    while written < num_words:
        is_question = len(open_questions) > backlog and rng.random() < 0.7
        if is_question:
            # Of three candidates the one stated longest ago, so that most answers lie beyond the window.
            statement = open_questions.pop(min(rng.randrange(len(open_questions)) for _ in range(3)))
            if rng.random() < 0.3:
                open_questions.append(statement)
        else:
            statement, value = fact(rng, attributes)
            if statement in numbers:
                continue
            numbers[statement] = len(values)
            values.append(value)
            open_questions.append(statement)
        number = numbers[statement]
        pieces.append(Piece((" " if written else "") + statement))
        pieces.append(Piece(f" {values[number]}.", ANSWER if is_question else RANDOM, number, is_question))
        written += len(statement.split()) + 1
        while rng.random() < filler / (1 + filler):
            line = sentence(rng)
            pieces.append(Piece(" " + line))
            written += len(line.split())
    return [*pieces, Piece(EOS)]
