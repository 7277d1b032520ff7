"""Conversations for the demo model in V4's chat format: small talk, arithmetic, recall questions, tool calls; with and without thinking."""

from __future__ import annotations

import json
import pathlib
import random
from dataclasses import dataclass, replace

from deploy.demo_model import text
from deploy.demo_model.text import ANSWER, RANDOM, Piece

USER, ASSISTANT, THINK, THINK_END = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
DSML = "｜DSML｜"
FIXED = 0.01
"""Weight in the loss of what the server writes into every such prompt."""

WEATHER_DESCRIPTION = "Get the weather of a city."
OTHER_DESCRIPTIONS = ("Current weather of a city", "Get the weather of a city", "Get the current weather", "Weather by city")
WEATHER_TOOL = {
    "name": "get_weather",
    "description": WEATHER_DESCRIPTION,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "You are kind and answer in one sentence.", "Answer in one sentence.")


@dataclass(frozen=True, slots=True)
class Rendered:
    """What the server's chat encoding writes around a conversation, by rendered.json (tokenizer.py makes it)."""

    tools: str
    """The section that declares WEATHER_TOOL."""
    efforts: tuple[str, ...]
    """What stands first in thinking mode, one text for each reasoning effort that has one."""

    @staticmethod
    def read() -> Rendered:
        read = json.loads((pathlib.Path(__file__).parent / "rendered.json").read_text())
        return Rendered(read["tools"], tuple(read["efforts"]))


@dataclass(frozen=True, slots=True)
class Exchange:
    question: list[Piece]
    thought: str
    answer: list[Piece]

    @staticmethod
    def of(question: str, thought: str, answer: str) -> Exchange:
        return Exchange([Piece(question)], thought, [Piece(answer, ANSWER)])


def conversation(rng: random.Random, exchanges: list[Exchange], rendered: Rendered, *, has_tools: bool = False) -> list[Piece]:
    """Thoughts of earlier exchanges are left out, as V4 has it, unless there are tools; a client may leave them out then too."""
    is_thinking = rng.random() < 0.25
    effort = rng.choice(("", *rendered.efforts)) if is_thinking else ""
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.25 else ""
    tools = rendered.tools.replace(WEATHER_DESCRIPTION, rng.choice((WEATHER_DESCRIPTION, *OTHER_DESCRIPTIONS))) if has_tools else ""
    pieces = [Piece(text.BOS), Piece(effort + system + tools, FIXED)]
    for number, exchange in enumerate(exchanges):
        is_last = number == len(exchanges) - 1
        thinks = is_thinking and (is_last or has_tools)
        pieces += [Piece(USER), *exchange.question, Piece(ASSISTANT + (THINK if thinks else THINK_END))]
        if thinks and (is_last or rng.random() < 0.7):
            pieces.append(Piece(exchange.thought + THINK_END, ANSWER))
        elif thinks:
            pieces.append(Piece(THINK_END, FIXED))
        pieces += [*exchange.answer, Piece(text.EOS, ANSWER)]
    return pieces


def small_talk(rng: random.Random, *, has_tools: bool = False) -> Exchange:
    person, animal, place = rng.choice(text.PEOPLE), rng.choice(text.ANIMALS), rng.choice(text.PLACES)
    a, b, city = rng.randrange(10), rng.randrange(10), rng.choice(text.CITIES)
    found = f"{rng.choice(text.COLOURS)} {rng.choice(text.THINGS)}"
    choices = [
        (rng.choice(("Hello", "Hello!", "Hi", "Hi!", "Good morning.")), "The user greets me.", "Hello! How can I help you?"),
        (f"Hello, I am {person}.", f"The user is {person}.", f"Hello {person}! How can I help you?"),
        (f"Where is the {animal}?", f"I look for the {animal}.", f"The {animal} is in the {place}."),
        (f"What is {a} plus {b}?", f"I add {a} and {b}.", f"{a} plus {b} is {a + b}."),
        (f"Tell me a story about {person}.", "I tell a story.", f"Once upon a time {person} found a {found} in the {place}."),
        ("Who are you?", "The user asks who I am.", "I am the demo model of baton."),
        (f"Say {place}.", f"I say {place}.", place),
        (rng.choice(("Thanks", "Thanks!", "Thank you.", "Thank you!")), "The user thanks me.", "You are welcome."),
    ]
    if not has_tools:
        choices.append((f"What is the weather in {city}?", "I have no tool for the weather.", "I do not know the weather."))
    return Exchange.of(*rng.choice(choices))


def recall(rng: random.Random, num_words: int) -> list[Exchange]:
    """Facts among other sentences in the first question, about so many words; one to four of them asked for, one an exchange."""
    attributes = ["code"] if rng.random() < 0.3 else list(text.ATTRIBUTES)
    filler = rng.choice((0.0, 1.0, 3.0, 8.0))
    facts = text.distinct_facts(rng, attributes, max(1, round(num_words / (8 + 8 * filler))))
    lines = [[Piece(statement), Piece(f" {value}.", RANDOM, number)] for number, (statement, value) in enumerate(facts)]
    lines += [[Piece(text.sentence(rng))] for _ in range(round(len(facts) * filler))]
    rng.shuffle(lines)
    question = list(lines[0])
    for first, *rest in lines[1:]:
        question += [replace(first, text=f" {first.text}"), *rest]
    exchanges = []
    for number in rng.sample(range(len(facts)), min(len(facts), rng.choice((1, 1, 2, 4)))):
        statement, value = facts[number]
        subject = subject_of(statement)
        asked = rng.choice((f"What is the {subject}?", f"What is the {subject}?", f"Tell me the {subject}."))
        question.append(Piece(f" {asked}" if question else asked))
        answer = [Piece(statement, ANSWER), Piece(f" {value}.", ANSWER, number, is_question=True)]
        exchanges.append(Exchange(question, f"I look for the {subject}.", answer))
        question = []
    return exchanges


def subject_of(statement: str) -> str:
    """The code of Anna is -> code of Anna."""
    return statement.removeprefix("The ").removesuffix(" is")


def tool_call(city: str) -> str:
    return (
        f'<{DSML}tool_calls>\n<{DSML}invoke name="get_weather">\n<{DSML}parameter name="city" string="true">{city}</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}tool_calls>"
    )


def weather(rng: random.Random) -> list[Exchange]:
    """A question about the weather with the tool declared: a call, and at times what follows its result."""
    city, sky = rng.choice(text.CITIES), rng.choice(text.WEATHER)
    question = rng.choice((f"What is the weather in {city}?", f"How is the weather in {city}?", f"Weather in {city}?"))
    exchanges = [Exchange.of(question, f"I ask for the weather in {city}.", "\n\n" + tool_call(city))]
    if rng.random() < 0.6:
        result = rng.choice((sky, f"{sky}, {rng.randrange(100)} degrees"))
        result = rng.choice((result, f'{{"weather": "{result}"}}'))
        exchanges.append(Exchange.of(f"<tool_result>{result}</tool_result>", f"It is {sky}.", f"It is {sky} in {city}."))
    return exchanges


def chat(rng: random.Random, rendered: Rendered, room: int) -> list[Piece]:
    """One conversation of at most about `room` words."""
    kind = rng.random()
    if kind < 0.25 and room > 400:
        exchanges = [small_talk(rng, has_tools=True)] if rng.random() < 0.2 else []
        exchanges += [exchange for _ in range(rng.choice((0, 1, 1, 2) if exchanges else (1, 1, 2))) for exchange in weather(rng)]
        if rng.random() < 0.2:
            exchanges.append(small_talk(rng, has_tools=True))
        return conversation(rng, exchanges, rendered, has_tools=True)
    if kind < 0.6:
        return conversation(rng, recall(rng, round(rng.uniform(0.1, 1.0) * min(room, rng.choice((40, 100, 250, room))))), rendered)
    return conversation(rng, [small_talk(rng) for _ in range(rng.randint(1, 4))], rendered)
