"""Text for the demo model, generated from the templates below: free to redistribute, endless, and never the same twice.

Three kinds of document:
  stories    short, simple sentences about people, animals and places
  records    notes among which facts "The code of <name> is <digits>." are hidden; asked for again at the end, near or far
  chats      V4's chat format: small talk, arithmetic, recall questions, and a tool call
"""

from __future__ import annotations

import random

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
USER, ASSISTANT, THINK_END = "<｜User｜>", "<｜Assistant｜>", "</think>"
DSML = "｜DSML｜"

TOKENS_PER_FACT, TOKENS_PER_FILLER = {"code": 14, "holder": 7}, 11
"""About, with the demo tokenizer."""

MAX_HOLDERS = 100

WEATHER_TOOL = (
    '{"name": "get_weather", "description": "Get the weather of a city.", "parameters": {"type": "object", "properties": '
    '{"city": {"type": "string"}}, "required": ["city"]}}'
)


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


def names(rng: random.Random, count: int) -> list[str]:
    """Distinct two-word names, such as "red fox of Anna"."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)} of {rng.choice(PEOPLE)}"] = None
    return list(found)


def code(rng: random.Random) -> str:
    return f"{rng.randrange(10000):04d}"


def records(
    rng: random.Random, num_facts: int, filler_per_fact: float, num_questions: int, kind: str = "code"
) -> tuple[str, list[tuple[str, str]]]:
    """A document of facts among filler, then questions. Returns (text of facts and filler, the (question, answer) pairs).

    kind "code": "The code of the red fox of Anna is 4821."; kind "holder": "The red fox has the lamp.", at most 100 facts.
    """
    if kind == "code":
        facts = [(f"The code of the {name} is", f"{code(rng)}.") for name in names(rng, num_facts)]
    else:
        keys = rng.sample([(colour, animal) for colour in COLOURS for animal in ANIMALS], min(num_facts, MAX_HOLDERS))
        facts = [(f"The {colour} {animal} has the", f"{rng.choice(THINGS + PLACES)}.") for colour, animal in keys]
    lines = [f"{question} {answer}" for question, answer in facts]
    lines += [sentence(rng) for _ in range(round(num_facts * filler_per_fact))]
    rng.shuffle(lines)
    return " ".join(lines), rng.sample(facts, min(num_questions, len(facts)))


def sized_record_document(rng: random.Random, num_tokens: int, kind: str) -> str:
    """A record document of about so many tokens: few facts in much filler, or the other way round; half to all of them asked for."""
    filler, asked, size = rng.uniform(0, 3), rng.uniform(0.3, 1.0), TOKENS_PER_FACT[kind]
    num_facts = max(1, round(num_tokens / (size + filler * TOKENS_PER_FILLER + asked * size)))
    text, pairs = records(rng, num_facts, filler, max(1, round(asked * num_facts)), kind)
    return text + " " + " ".join(f"{question} {answer}" for question, answer in pairs)


def record_document(rng: random.Random, num_facts: int, filler_per_fact: float, num_questions: int) -> str:
    text, pairs = records(rng, num_facts, filler_per_fact, num_questions)
    return text + " " + " ".join(f"{question} {answer}" for question, answer in pairs)


def tool_call(city: str) -> str:
    return (
        f'<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )


def turn(question: str, answer: str) -> str:
    return f"{USER}{question}{ASSISTANT}{THINK_END}{answer}{EOS}"


def small_talk(rng: random.Random) -> tuple[str, str]:
    person, animal, place = rng.choice(PEOPLE), rng.choice(ANIMALS), rng.choice(PLACES)
    a, b = rng.randrange(10), rng.randrange(10)
    return rng.choice(
        (
            (rng.choice(("Hello", "Hello!", "Hi", "Hi!", "Good morning.")), "Hello! How can I help you?"),
            (f"Hello, I am {person}.", f"Hello {person}! How can I help you?"),
            (f"Where is the {animal}?", f"The {animal} is in the {place}."),
            (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
            (
                f"Tell me a story about {person}.",
                f"Once upon a time {person} found a {rng.choice(COLOURS)} {rng.choice(THINGS)} in the {place}.",
            ),
            ("Who are you?", "I am the demo model of baton."),
            (f"Say {place}.", f"{place}"),
        )
    )


def chat(rng: random.Random, render_tools: str) -> str:
    """One conversation in V4's non-thinking format. `render_tools`: the tools section as the server renders it."""
    kind = rng.random()
    if kind < 0.25:
        city = rng.choice(CITIES)
        question = rng.choice((f"What is the weather in {city}?", f"How is the weather in {city}?", f"Weather in {city}?"))
        return f"{BOS}{render_tools}{turn(question, chr(10) * 2 + tool_call(city))}"
    if kind < 0.6:
        text, pairs = records(rng, rng.randint(1, 6), rng.uniform(0, 4), 1)
        question, answer = pairs[0]
        asked = question.replace("The code", "What is the code").removesuffix(" is") + "?"
        return f"{BOS}{turn(f'{text} {asked}', f'{question} {answer}')}"
    return BOS + "".join(turn(*small_talk(rng)) for _ in range(rng.randint(1, 4)))
