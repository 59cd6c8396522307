"""Short answers made comparable, and their agreement with several people's, by the public rules of the VQA challenge.

Sources: the evaluation rules of visualqa.org (lower case, number words as digits, no articles, punctuation and
contractions) in the form that EvalAI's processor gave them, which lmms-eval v0.7.1 uses. Its oddities are kept.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each is what becomes of itself with any one apostrophe left out; the last entry runs the other way in the rules too.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}

_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")  # the rules' second condition, on what stands before it, never fails
_PERIODS = 32  # so many are deleted: the reference gives a flag of this value where the count belongs


def clean(answer: str) -> str:
    """A model's answer, or TextVQA's truth: all steps. Applied again, it may change the text again."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(one_line(text))


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """The later steps, all that VQAv2's truths get: punctuation, then number words, articles and contractions."""
    return _words(_punctuation(text))


def agreement(answer: str, others: Sequence[Sequence[str]]) -> float:
    """Mean over the people of min(1, matches / 3).

    others: for each person, the answers of the other people; texts have to be equal to match. 0 without people.
    """
    shares = [min(1.0, theirs.count(answer) / 3) for theirs in others]
    return statistics.mean(shares) if shares else 0.0


def _punctuation(text: str) -> str:
    """Every mark deleted if it stands beside a space somewhere or a number holds a comma, else a space for it."""
    joined = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        deleted = joined or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    return _PERIOD.sub("", result, count=_PERIODS)


def _words(text: str) -> str:
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
