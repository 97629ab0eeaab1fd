"""Probes: small generated tasks, each of which shows one way in which gists fail.

boundary     is a fact lost at the start of a passage rather than within it?
surprise     is a fact lost if it has nothing to do with its surroundings?
along        how far is a string of 32 characters right: its first 8, 16, all 32?
punctuation  does it matter whether lines end with a full stop?
key_value    can a value be looked up among random keys?

The first three are the failure patterns of arXiv:2412.17483, the fourth is a weakness that
arXiv:2511.08128 reports. Variants of an item differ in nothing but what is probed, and the same
seed gives the same items.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from gist_rag.errors import BadInput
from gist_rag.evaluate.metrics import contains
from gist_rag.evaluate.tasks import NUM_CHOICES, Example, Task
from gist_rag.jsonl import read_lines
from gist_rag.sample import sample_passages

FILLER_SENTENCES = 8
KV_RECORDS = 8
CITIES = [
    "Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens", "Madrid", "Warsaw", "Zurich",
    "Turin", "Lyon", "Porto", "Ghent", "Riga", "Bergen", "Cork",
]  # fmt: skip
FIRST = [
    "Ada", "Bruno", "Clara", "David", "Elsa", "Frank", "Greta", "Hugo", "Irma", "Jonas", "Karla",
]  # fmt: skip
LAST = [
    "Berg", "Castell", "Dorn", "Eklund", "Falk", "Garnet", "Holm", "Ivers", "Jansen", "Keller",
    "Lund", "Moreau",
]  # fmt: skip
COLOURS = ["grey", "green", "silver", "amber", "violet", "crimson", "ivory", "golden"]
ANIMALS = ["heron", "badger", "falcon", "otter", "lynx", "marten", "swallow", "tortoise"]
PEOPLE = 8


@cache
def _sentences() -> list[list[str]]:
    """Sentences of each sample passage, without its title."""
    texts = [passage.text.partition("\n")[2] for passage in sample_passages()]
    split = [re.split(r"(?<=[.!?])\s+", " ".join(text.split())) for text in texts]
    return [[s for s in part if 5 <= len(s.split()) <= 30] for part in split]


def _filler(chance: random.Random) -> list[str]:
    return chance.sample([s for part in _sentences() for s in part], FILLER_SENTENCES)


def _boundary(chance: random.Random) -> Iterator[Example]:
    name = f"{chance.choice(COLOURS)} {chance.choice(ANIMALS)}"
    code, filler = str(chance.randint(1000, 9999)), _filler(chance)
    fact = f"The code of the {name} is {code}."
    for place, at in {"start": 0, "middle": FILLER_SENTENCES // 2, "end": len(filler)}.items():
        text = " ".join([*filler[:at], fact, *filler[at:]])
        yield _example(place, f"What is the code of the {name}?", code, text)


def _surprise(chance: random.Random) -> Iterator[Example]:
    around = chance.choice([part for part in _sentences() if len(part) >= 4])
    at = chance.randint(1, len(around) - 1)
    name, number = chance.choice(LAST), str(chance.randint(1000, 9999))
    facts = {
        "related": (
            "The page cache of the {} build of SQLite holds {} pages.",
            "How many pages does the page cache of the {} build of SQLite hold?",
        ),
        "unrelated": (
            "The pet tortoise of the {} family of Lisbon weighs {} grams.",
            "How many grams does the pet tortoise of the {} family of Lisbon weigh?",
        ),
    }
    for kind, (fact, question) in facts.items():
        text = " ".join([*around[:at], fact.format(name, number), *around[at:]])
        yield _example(kind, question.format(name), number, text)


def _along(chance: random.Random) -> Iterator[Example]:
    name, key, filler = chance.choice(LAST), f"{chance.getrandbits(128):032x}", _filler(chance)
    at = chance.randint(1, len(filler) - 1)
    text = " ".join([*filler[:at], f"The access key of {name} is {key}.", *filler[at:]])
    yield _example("", f"What is the access key of {name}?", key, text)


def _punctuation(chance: random.Random) -> Iterator[Example]:
    names = zip(chance.sample(FIRST, PEOPLE), chance.sample(LAST, PEOPLE), strict=True)
    people, homes = [" ".join(name) for name in names], chance.sample(CITIES, PEOPLE)
    asked = chance.randrange(PEOPLE)
    for kind, stop in {"with": ".", "without": ""}.items():
        lines = [f"{p} lives in {h}{stop}" for p, h in zip(people, homes, strict=True)]
        question = f"Where does {people[asked]} live?"
        yield _example(kind, question, homes[asked], "\n".join(lines), homes)


def _key_value(chance: random.Random) -> Iterator[Example]:
    records = [(_uuid(chance), _uuid(chance)) for _ in range(KV_RECORDS)]
    yield _lookup(records, *chance.choice(records))


def _lookup(records: Sequence[tuple[str, str]], key: str, value: str) -> Example:
    lines = [json.dumps({k: v}) for k, v in records]
    question = f"What is the value of the key {key}?"
    return _example("", question, value, "\n".join(lines), [v for _, v in records])


def _uuid(chance: random.Random) -> str:
    digits = f"{chance.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _example(
    kind: str, question: str, answer: str, text: str, others: Sequence[str] = ()
) -> Example:
    return Example(kind, question, (answer,), (text,), tuple(o for o in others if o != answer))


def _by_kind(example: Example, answer: str) -> Mapping[str, float]:
    """Whether the answer is there, under the name of the variant."""
    return {example.id.partition("/")[0]: contains(answer, example.answers)}


def _by_prefix(example: Example, answer: str) -> Mapping[str, float]:
    """Whether the first characters of the string are there."""
    found, gold = "".join(answer.split()), example.answers[0]
    return {f"first_{n}": float(gold[:n] in found) for n in (8, 16, len(gold))}


Maker = Callable[[random.Random], Iterator[Example]]
Score = Callable[[Example, str], Mapping[str, float]]
PROBES: dict[str, tuple[Maker, Score, int]] = {
    "boundary": (_boundary, _by_kind, 16),
    "surprise": (_surprise, _by_kind, 16),
    "along": (_along, _by_prefix, 48),
    "punctuation": (_punctuation, _by_kind, 16),
    "key_value": (_key_value, _by_prefix, 56),
}
"""Name: how items are made, how an answer is scored, how many tokens it may have."""


def make_probe(
    name: str, *, num_passages: int, limit: int, seed: int, file: Path | None = None
) -> Task:
    """A probe's task.

    Args:
        num_passages: the one in question and, for the rest, passages of the sample.
        limit: examples; variants of an item each count.
        file: for ``key_value``, rows ``{"ordered_kv_records", "key", "value"}`` to take keys from
            instead of random ones; ``KV_RECORDS`` of a row are used, the asked one among them.

    Raises:
        BadInput: no such probe, too many passages, or an unusable file.
    """
    if name not in PROBES:
        raise BadInput(f"no probe {name!r}; there are {', '.join(PROBES)}")
    if file is not None and name != "key_value":
        raise BadInput(f"probe {name} makes its own task; leave out {file}")
    if num_passages > (most := len(sample_passages()) + 1):
        raise BadInput(f"a probe has {most} passages at most, {num_passages} were asked for")
    make, score, new_tokens = PROBES[name]
    examples: list[Example] = []
    lookups = _lookups(file, seed) if file else []
    for item in range(limit):
        chance = random.Random(f"{seed}-{item}")
        variants = [lookups[item % len(lookups)]] if lookups else make(chance)
        for variant in variants:
            examples.append(_among(variant, item, num_passages, f"{seed}-{item}"))
        if len(examples) >= limit:
            break
    return Task(_with_choices(examples[:limit], seed), new_tokens, score)


def _among(example: Example, item: int, num_passages: int, seed: str) -> Example:
    """The passage in question among others, in an order that is the same for all variants."""
    chance = random.Random(f"{seed}-order")
    others = [p.text for p in chance.sample(sample_passages(), num_passages - 1)]
    texts = list(example.passages)
    for other in others:
        texts.insert(chance.randint(0, len(texts)), other)
    name = f"{example.id}/{item}"
    return Example(name, example.question, example.answers, tuple(texts), example.choices)


def _with_choices(examples: Sequence[Example], seed: int) -> list[Example]:
    """Wrong answers: those of the passage itself, then of other items."""
    answers = sorted({e.answers[0] for e in examples})
    out = []
    for e in examples:
        chance = random.Random(f"{seed}-{e.answers[0]}")
        far = [a for a in answers if a not in (*e.answers, *e.choices)]
        wanted = NUM_CHOICES - 1 - len(e.choices)
        choices = (*e.choices, *chance.sample(far, min(wanted, len(far))))
        out.append(Example(e.id, e.question, e.answers, e.passages, choices))
    return out


def _lookups(file: Path, seed: int) -> list[Example]:
    chance, out = random.Random(seed), []
    for place, line in read_lines(file):
        try:
            row = json.loads(line)
            asked = (str(row["key"]), str(row["value"]))
            records = [(str(k), str(v)) for k, v in row["ordered_kv_records"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{place} is no row of ordered_kv_records, key and value: {error}"
            ) from error
        others = [r for r in records if r[0] != asked[0]]
        few = chance.sample(others, min(KV_RECORDS - 1, len(others)))
        few.insert(chance.randint(0, len(few)), asked)
        out.append(_lookup(few, *asked))
    if not out:
        raise BadInput(f"{file} has no row")
    return out
