import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.harness.vqa_answers import CONTRACTIONS, agreement, clean, normalise


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("Stop", "stop"),
        ("  A Dog ", "dog"),
        ("the an a", ""),
        ("None", "0"),
        ("ten o'clock", "10 o'clock"),
        ("eleven", "eleven"),
        ("TWO dogs", "2 dogs"),
        ("1,000", "1000"),
        ("Really?", "really"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("a-b - c", "ab c"),  # a mark beside a space anywhere is deleted everywhere
        ("t-shirt", "t shirt"),
        ("3.5", "3.5"),
        ("St. Mary", "st mary"),
        ("5.", "5"),
        ("3 . 5", "3 5"),
        (".5", ".5"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("dog's", "dog 's"),
        ("whats", "what's"),
        ("what's", "what 's"),
        ("ID've", "id've"),
        ("one\ntwo\tthree", "1 2 3"),
        ("", ""),
        ("!", ""),
        ("#1", "#1"),
        ("50%", "50%"),
    ],
)
def test_cleaning(answer: str, cleaned: str) -> None:
    assert clean(answer) == cleaned


@pytest.mark.parametrize(
    ("truth", "normalised"),
    [
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma within a number deletes all marks, as a space beside one does
        ("a,b", "b"),
        ("x,y", "x y"),
        ("dog's", "dog's"),
        ("Yes", "yes"),
    ],
)
def test_later_steps_alone(truth: str, normalised: str) -> None:
    assert normalise(truth) == normalised


def test_only_so_many_periods_are_deleted() -> None:
    """The reference gives a flag of value 32 where the count belongs."""
    assert normalise("." * 32) == ""
    assert normalise("." * 40) == "." * 8


def test_contractions_lack_one_apostrophe_of_what_they_become() -> None:
    for short, full in CONTRACTIONS.items():
        assert short.replace("'", "") == full.replace("'", "")
    for short in ("aint", "hes", "ow's'at", "'ows'at", "'ow'sat", "yall'd've", "y'alld've", "y'all'dve", "twas"):
        assert short in CONTRACTIONS
    for word in ("its", "well", "were", "hell", "shell", "wed", "shed", "id", "ill"):  # words of their own
        assert word not in CONTRACTIONS


def others(answers: list[str]) -> list[list[str]]:
    return [answers[:person] + answers[person + 1 :] for person in range(len(answers))]


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_with_ten_people(matches: int, expected: float) -> None:
    """The challenge's mean over subsets of nine: 0.3 a match up to three."""
    assert agreement("x", others(["x"] * matches + ["y"] * (10 - matches))) == pytest.approx(expected)


def test_agreement_without_people_is_nought() -> None:
    assert agreement("x", []) == 0.0
    assert agreement("x", [[]]) == 0.0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.sampled_from("abcd"))
def test_agreement_against_a_plain_count(people: list[str], answer: str) -> None:
    total = 0.0
    for i in range(len(people)):
        total += min(1, sum(people[j] == answer for j in range(len(people)) if j != i) / 3)
    assert agreement(answer, others(people)) == pytest.approx(total / len(people))
