"""A news-like summarisation corpus made on the spot, for runs that have neither the Hub nor a data file.

Each document tells one story. Six facts (who, town, day, number, event, outcome) stand in six sentences spread
over it, among sentences about other people, towns, days and numbers. The summary needs all six, and names the
event and the outcome in words that the document does not use, so neither the lead nor any other sentence will do.
Document lengths follow XSum's. The sentences and the word lists are in ``stories/``, one file per kind of story.
"""

import functools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SPLITS = ("train", "validation", "test")

# XSum under BART's tokenizer: median 372 tokens, mean 437 once cut at 1,024, which a log-normal of this spread
# reproduces. Sentences made from stories/ have 1.33 of those tokens a word.
MEDIAN_TOKENS, SPREAD, MAX_TOKENS = 372, 0.7, 990
TOKENS_PER_WORD = 1.33


def generate_corpus(num_examples: int, seed: int, split: str) -> list[dict[str, str]]:
    """The first `num_examples` examples of a split, each with `id`, `document` and `summary`.

    The same arguments give the same bytes on every machine, and a larger `num_examples` only adds examples at the
    end. No two splits share a person, and every summary names one, so the splits are disjoint.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the generated corpus; use one of {', '.join(SPLITS)}")
    return [_generate_example(seed, split, index) for index in range(num_examples)]


def _generate_example(seed: int, split: str, index: int) -> dict[str, str]:
    draw = _Draw(f"{seed}/{split}/{index}")
    kinds = _load_stories()
    story = kinds[draw.choice(sorted(kinds))]
    slots = _Slots(draw, story, split)
    event, event_summary = draw.choice(story["events"])
    ending = draw.below(len(story["outcomes"]))
    outcome, outcome_summary = story["outcomes"][ending]
    slots.update(event=event, outcome=outcome.format_map(slots))

    facts = ["who", *draw.shuffled(["town", "day", "number", "event", "outcome"])]
    told = [slots.fill(draw.choice(story["tell"][fact])) for fact in facts]
    target = min(MEDIAN_TOKENS * math.exp(SPREAD * draw.normal()), MAX_TOKENS)
    # In whole words, so that a last bit of difference between two machines' exp() changes nothing.
    words = round(target / TOKENS_PER_WORD) - sum(map(_count_words, told))
    asides = _draw_asides(draw, story, slots, words)

    # Which places of the document go to the facts; their order stays.
    is_fact = draw.shuffled([True] * len(told) + [False] * len(asides))
    sentences = [told.pop(0) if fact else asides.pop(0) for fact in is_fact]

    # The ending decides the wording, so that a perfect reader could write every summary as it stands.
    template = story["summaries"][ending % len(story["summaries"])]
    slots.update(event=event_summary, outcome=outcome_summary)
    return {
        "id": f"{split}-{index:06d}",
        "document": "\n".join(sentences),
        "summary": slots.fill(template),
    }


def _draw_asides(draw: "_Draw", story: dict[str, Any], slots: "_Slots", words: int) -> list[str]:
    """Sentences of about `words` words that tell none of the story's facts; half of them belong to its kind."""
    own, common = [], []
    asides = []
    while words > 7:  # half a sentence, so that the length is right on average
        deck, refill = (own, story["asides"]) if draw.random() < 0.5 else (common, story["filler"])
        if not deck:
            deck.extend(draw.shuffled(refill))
        asides.append(slots.fill(deck.pop()))
        words -= _count_words(asides[-1])
    return asides


class _Draw:
    """Random choices made from ``random()`` alone: Python keeps its values, not those of ``choice`` or ``gauss``."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def below(self, bound: int) -> int:
        return int(self.random() * bound)

    def choice(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        return sorted(items, key=lambda _: self.random())

    def normal(self) -> float:
        return sum(self.random() for _ in range(12)) - 6


class _Slots(dict[str, str]):
    """What the templates' slots stand for: the story's facts, or a fresh draw that differs from the fact."""

    def __init__(self, draw: _Draw, story: dict[str, Any], split: str):
        super().__init__()
        self.draw, self.story, self.split = draw, story, split
        role = draw.choice(story["roles"])
        who = self._person()
        self.update(
            who=who,
            surname=who.split()[-1],
            role=role,
            a_role=f"{'an' if role[0] in 'aeiou' else 'a'} {role}",
            town=self._town(),
            day=draw.choice(story["days"]),
            number=self._number(),
        )

    def fill(self, template: str) -> str:
        text = template.format_map(self)
        return text[0].upper() + text[1:]

    def __missing__(self, slot: str) -> str:
        match slot:
            case "any_person":
                return self._other("who", self._person)
            case "any_town":
                return self._other("town", self._town)
            case "any_day":
                return self._other("day", lambda: self.draw.choice(self.story["days"]))
            case "any_number":
                return self._other("number", self._number)
            case "month":
                return self.draw.choice(self.story["months"])
            case "small":
                return self.draw.choice(self.story["small"])
            case "percent":
                return str(12 + self.draw.below(48))
            case "year":
                return str(1950 + self.draw.below(65))
        raise KeyError(slot)

    def _other(self, fact: str, draw_value: Any) -> str:
        while (value := draw_value()) == self[fact]:
            pass
        return value

    def _person(self) -> str:
        first_names, surnames = self.story["first_names"], self.story["surnames"]
        first = self.draw.below(len(first_names))
        last = self.draw.choice([i for i in range(len(surnames)) if _split_of(first + i) == self.split])
        return f"{first_names[first]} {surnames[last]}"

    def _town(self) -> str:
        return self.draw.choice(self.story["town_starts"]) + self.draw.choice(self.story["town_ends"])

    def _number(self) -> str:
        low, high, step = self.story["number"]
        return f"{low + step * self.draw.below((high - low) // step + 1):,}"


def _split_of(person: int) -> str:
    """Eight names in ten go to the training split, one to each of the others."""
    return {8: "validation", 9: "test"}.get(person % 10, "train")


def _count_words(text: str) -> int:
    return len(text.split())


@functools.cache
def _load_stories() -> dict[str, dict[str, Any]]:
    """The kinds of story by name, each with the shared word lists; a block of text is a list of its lines."""
    directory = Path(__file__).parent / "stories"
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in directory.glob("*.yaml")}
    common = files.pop("common")
    common["filler"] = common["filler"].splitlines()
    for story in files.values():
        story["tell"] = {fact: block.splitlines() for fact, block in story["tell"].items()}
        story["summaries"] = story["summaries"].splitlines()
        for clauses in ("events", "outcomes"):
            story[clauses] = [tuple(line.split(" => ")) for line in story[clauses].splitlines()]
        story["asides"] = story.pop("unrelated").splitlines() + story.pop("background").splitlines()
        story.update(common)
    return files
