"""Made-up texts in which something is said once and asked for later: what a cache has lost cannot be answered.

A text is a context of statements and then questions. A statement holds one number; a question is `?` and a statement of the context said
again, number and all. Keys and numbers are drawn anew for every text, so nothing can be answered but from the context.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from layerwise.data.raw import Raw, Rows
from layerwise.errors import BadInput

HELD_OUT = 256
"""Texts in each of the splits for validation and test."""
KEYS = string.ascii_letters + string.punctuation.replace("?", "")
ASKED = "?"

_STATEMENT = re.compile(r"(?P<before>[^?]*?)(?P<number>\d+)(?P<after>[^\d?]*)\Z")
_FILLER = (
    "the river runs past the old mill and under the bridge",
    "nobody knew who had left the door open that night",
    "a cold wind came down from the hills before morning",
    "they carried the boats up to the house and went to sleep",
    "the road to the coast is long and has few trees",
    "in the garden stood a table with three white chairs",
    "she read the letter twice and put it back in the drawer",
    "the train was late and the station was almost empty",
)


@dataclass(frozen=True)
class Question:
    """One question of a text, by the places of characters.

    Attributes:
        begin: of the question mark. answer: where the number begins. end: behind it. said: where the number stands in the context.
    """

    begin: int
    answer: int
    end: int
    said: int


def key_values(length: int, texts: int, seed: int) -> Raw:
    """`q5 k1 ... ?k1 ?q5 `: characters and numbers of one digit, each asked for once; as many as there is room for, 83 at most.

    What room is left lies between statements and questions, in blanks.
    """
    count = min(len(KEYS), (length - 1) // 7)

    def text(draw: random.Random) -> str:
        said = [f"{key}{draw.randrange(10)} " for key in draw.sample(KEYS, count)]
        return _asked("".join(said).ljust(length - 1 - 4 * count), said, length, draw)

    return _raw("key-values", text, length, texts, seed, least=36)


def lines(length: int, texts: int, seed: int) -> Raw:
    """Line retrieval: `line bd: 317` for so many pairs of letters, then a question about each; as many as there is room for, 676 at most.

    A text draws its pairs from so few letters that half of what they can spell is there: neither letter alone says which line it is.
    Source: Li et al. 2023, "LongChat" (LongEval).
    """
    count = min(26 * 26, (length - 1) // 27)
    few = min(26, math.ceil(math.sqrt(2 * count)))

    def text(draw: random.Random) -> str:
        letters = draw.sample(string.ascii_lowercase, few)
        keys = draw.sample([one + other for one in letters for other in letters], count)
        said = [f"line {key}: {draw.randrange(1000):03d}\n" for key in keys]
        return _asked("".join(said), said, length, draw)

    return _raw("lines", text, length, texts, seed, least=55)


def needle(length: int, texts: int, seed: int) -> Raw:
    """A needle in a haystack: plain sentences, among them `the number of X is 4711.`, for which the one question asks."""

    def text(draw: random.Random) -> str:
        said = f"the number of {''.join(draw.choices(string.ascii_lowercase, k=3))} is {draw.randrange(10000):04d}. "
        sentences: list[str] = []
        while sum(map(len, sentences)) + 2 * len(said) + 1 < length:
            sentences.append(f"{draw.choice(_FILLER)}. ")
        sentences = sentences[:-1]
        sentences.insert(draw.randrange(len(sentences) + 1), said)
        return "".join(sentences) + ASKED + said

    return _raw("needle", text, length, texts, seed, least=160)


def questions(text: str) -> list[Question]:
    """The questions of a text, in order; none where it holds none, or asks for what its context does not say."""
    context, *rest = text.split(ASKED)
    found, at = [], len(context)
    for asked in rest:
        match = _STATEMENT.match(asked)
        # What follows the last number may be the blanks that fill up the row.
        if match is not None and (said := context.rfind(asked[: match.end("number")])) >= 0:
            answer = at + 1 + match.start("number")
            found.append(Question(at, answer, at + 1 + match.end("number"), said + match.start("number")))
        at += 1 + len(asked)
    return found


def _asked(context: str, said: list[str], length: int, draw: random.Random) -> str:
    """The context, and questions for as many of its statements as there is room for."""
    room = (length - 1 - len(context)) // (1 + len(said[0]))
    return context + "".join(ASKED + statement for statement in draw.sample(said, min(room, len(said))))


def _raw(name: str, text: Callable[[random.Random], str], length: int, texts: int, seed: int, least: int) -> Raw:
    """Splits of texts of at most `length` - 1 characters, filled up with blanks, so that in bytes a text and its end are one row."""
    if length < least:
        raise BadInput(f"data.length: texts of {name} have at least {least} characters; length is {length}")
    splits = {}
    for split, count in (("train", texts), ("validation", HELD_OUT), ("test", HELD_OUT)):
        draw = random.Random(f"{name}/{split}/{seed}")
        splits[split] = Rows(texts=[text(draw).ljust(length - 1)[: length - 1] for _ in range(count)])
    return Raw("text", f"builtin:{name}", splits)
