"""Prompts, parsing and scores of the question-answering benchmarks: every worked example of the specification."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from evals import gqa, mmbench, mme, pope, scienceqa, textvqa, vqav2
from evals.harness.data import Doc
from evals.harness.metrics import estimator, matrix, means
from evals.harness.runner import Record
from evals.harness.vqa import Benchmark
from reroute_jax.errors import RerouteError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def doc(row: Mapping[str, Any], number: int = 0, question_id: object = "q", cluster: str = "") -> Doc:
    return Doc(number, str(question_id), None, (1, 1), "", row, cluster)


def records(benchmark: Benchmark, answered: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Record]:
    """Records as the runner writes them."""
    found = []
    for number, (text, row) in enumerate(answered):
        question_id = str(number if benchmark.key is None else row[benchmark.key])
        cluster = question_id if benchmark.cluster is None else benchmark.cluster(row)
        scored = benchmark.score(text.strip(), doc(row, number, question_id, cluster))
        found.append({"doc_id": number, "question_id": question_id, "cluster": cluster, **scored})
    return found


def reported(benchmark: Benchmark, lines: Sequence[Record]) -> dict[str, float]:
    """The metrics of finished records, as the report makes them."""
    rows = [record["metrics"] for record in benchmark.finish(lines) if "left_out" not in record]
    columns = sorted({name for row in rows for name in row})
    names = [name for name in benchmark.metrics if name in columns or name in benchmark.derived]
    values = estimator(columns, names, benchmark.derived)(means(matrix(rows, columns)))
    return dict(zip(names, values.tolist(), strict=True))


# POPE


def pope_rows(*pairs: tuple[str, str]) -> list[tuple[str, dict[str, str]]]:
    return [(text, {"id": str(i), "answer": answer, "image_source": "x"}) for i, (text, answer) in enumerate(pairs)]


def test_pope_prompt_strips_the_question() -> None:
    assert pope.prompt({"question": "  Is there a cat? "}) == "Is there a cat?" + SHORT


def test_pope_example() -> None:
    pairs = [("Yes", "yes"), ("No", "no"), ("Yes", "no"), ("Yes.", "yes"), ("No", "yes"), ("no", "no")]
    assert reported(pope.BENCHMARK, records(pope.BENCHMARK, pope_rows(*pairs))) == {
        "pope_accuracy": 0.5,
        "pope_precision": 0.5,
        "pope_recall": 0.5,
        "pope_f1_score": 0.5,
        "pope_yes_ratio": 0.5,
        "pred_yes_ratio": 0.5,
    }


def test_pope_without_a_denominator_is_nought() -> None:
    found = reported(pope.BENCHMARK, records(pope.BENCHMARK, pope_rows(("maybe", "no"), ("no", "no"))))
    assert found["pope_precision"] == found["pope_recall"] == found["pope_f1_score"] == found["pope_yes_ratio"] == 0


def test_pope_against_plain_counting() -> None:
    rng = random.Random(1)
    pairs = [(rng.choice(["yes", "no", "Yes ", "Yes.", "", "none"]), rng.choice(["yes", "no"])) for _ in range(300)]
    said = [(text.strip().lower(), answer) for text, answer in pairs]
    tp, fp, fn = said.count(("yes", "yes")), said.count(("yes", "no")), said.count(("no", "yes"))
    assert reported(pope.BENCHMARK, records(pope.BENCHMARK, pope_rows(*pairs))) == pytest.approx(
        {
            "pope_accuracy": sum(a == b for a, b in said) / 300,
            "pope_precision": tp / (tp + fp),
            "pope_recall": tp / (tp + fn),
            "pope_f1_score": 2 * tp / (2 * tp + fp + fn),
            "pope_yes_ratio": sum(b == "yes" for _, b in said) / 300,
            "pred_yes_ratio": sum(a[:3] == "yes" for a, _ in said) / 300,
        }
    )


# GQA


def test_gqa_prompt_keeps_the_question() -> None:
    assert gqa.prompt({"question": " Which side? "}) == " Which side? " + SHORT


@pytest.mark.parametrize(
    ("text", "answer", "hit"),
    [
        ("Left.", "left", 1),
        ("White, black", "white black", 1),
        ("a man", "man", 0),
        ("on the left", "left", 0),
        (" left\n", "left", 1),
        ("two  men", "two men", 0),
        ("2", "two", 0),
        ("left\N{HORIZONTAL ELLIPSIS}", "left", 0),  # no ASCII punctuation
        ("t-shirt", "tshirt", 1),
    ],
)
def test_gqa_match(text: str, answer: str, hit: int) -> None:
    assert gqa.gqa_match(text, answer) == hit


# MME


def pair(question_id: str, category: str, first: bool, second: bool) -> list[tuple[str, dict[str, str]]]:
    """Two questions, answered right or wrong."""
    row = {"question_id": question_id, "category": category}
    return [("Yes" if first else "No", row | {"answer": "Yes"}), ("no" if second else "yes", row | {"answer": "No"})]


def test_mme_prompt() -> None:
    asked = mme.prompt({"question": "Is this a cat? Please answer yes or no. "})
    assert asked == "Is this a cat?" + SHORT


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Yes", "yes"),
        (" no. ", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("x", "other"),
        ("", "other"),
        ("Nothing", "no"),
        ("Not sure", "no"),
        ("know", "no"),
        ("eyes", "yes"),
        ("Sure, yes", "other"),
        ("y.e.s", "yes"),
        ("aye no", "other"),
    ],
)
def test_mme_parsing(text: str, parsed: str) -> None:
    assert mme.parse(text) == parsed


def test_mme_example() -> None:
    answered = [
        *pair("a", "color", True, True),
        *pair("b", "color", True, False),
        *pair("c", "OCR", False, True),
    ]
    found = reported(mme.BENCHMARK, records(mme.BENCHMARK, answered))
    assert found == {
        "mme_perception_score": 175,
        "mme_cognition_score": 0,
        "mme_total": 175,
        "mme_color": 125,
        "mme_OCR": 50,
    }


def test_mme_all_right_gives_the_most_points() -> None:
    answered = [line for category in mme.PERCEPTION + mme.COGNITION for line in pair("same id", category, True, True)]
    found = reported(mme.BENCHMARK, records(mme.BENCHMARK, answered))
    assert [found[f"mme_{part}"] for part in ("perception_score", "cognition_score", "total")] == [2000, 800, 2800]


def test_mme_against_plain_counting() -> None:
    rng = np.random.default_rng(0)
    hits = {category: rng.random((20, 2)) < 0.6 for category in ("existence", "posters", "code_reasoning")}
    order = rng.permutation(60)
    flat = [(f"{place}", category, *hits[category][place]) for category in hits for place in range(20)]
    answered = [line for index in order for line in pair(*flat[index])]
    found = reported(mme.BENCHMARK, records(mme.BENCHMARK, answered))
    points = {category: 100 * hit.mean() + 100 * hit.all(axis=1).mean() for category, hit in hits.items()}
    assert {category: found[f"mme_{category}"] for category in hits} == pytest.approx(points)
    assert found["mme_perception_score"] == pytest.approx(points["existence"] + points["posters"])
    assert found["mme_total"] == pytest.approx(sum(points.values()))


def test_mme_row_cut_off_by_a_limit_is_left_out() -> None:
    answered = [*pair("a", "color", True, True), *pair("b", "color", True, True)]
    finished = mme.finish(records(mme.BENCHMARK, answered[:3]))
    assert [record.get("left_out") for record in finished] == [None, None, "incomplete"]
    assert [record["metrics"] for record in finished] == [{"mme_color": 200.0}, {}, {}]


def test_mme_partner_of_a_bad_image_is_left_out() -> None:
    lines = records(mme.BENCHMARK, [*pair("a", "color", True, True), *pair("b", "color", True, True)])
    lines[0] = {key: lines[0][key] for key in ("doc_id", "question_id", "cluster")} | {"left_out": "bad image"}
    lines[0]["metrics"] = {}
    finished = mme.finish(lines)
    assert [record.get("left_out") for record in finished] == ["bad image", "incomplete", None, None]
    assert finished[2]["metrics"] == {"mme_color": 200.0}


def test_mme_refuses_what_is_no_pair_and_unknown_categories() -> None:
    (first, second), other = pair("a", "color", True, True), pair("b", "color", True, True)
    for answered in ([first, *other], [first, second, second, *other]):
        with pytest.raises(RerouteError, match=r"question_id a of color has \d rows, expected a pair"):
            mme.finish(records(mme.BENCHMARK, answered))
    with pytest.raises(RerouteError, match="unknown category 'colour'"):
        records(mme.BENCHMARK, pair("a", "colour", True, True))
    with pytest.raises(RerouteError, match="answer is 'Maybe', expected Yes or No"):
        records(mme.BENCHMARK, [("Yes", {"question_id": "a", "category": "color", "answer": "Maybe"})])


# MMBench


def question(index: int, answer: str = "A", **changed: Any) -> dict[str, Any]:
    row = {"index": index, "question": "What?", "hint": "nan", "answer": answer, "A": "oak", "B": "pine", "C": "nan"}
    return row | {"D": "nan", "category": "ocr", "L2-category": "coarse_perception"} | changed


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "What? There are several options:\nA. oak\nB. pine\n" + LETTER),
        ({"hint": "Look."}, "Look. What? There are several options:\nA. oak\nB. pine\n" + LETTER),
        ({"hint": ""}, " What? There are several options:\nA. oak\nB. pine\n" + LETTER),
        ({"hint": float("nan"), "B": ""}, "What? There are several options:\nA. oak\n" + LETTER),
        ({"A": None, "D": "fir"}, "What? There are several options:\nB. pine\nD. fir\n" + LETTER),
    ],
)
def test_mmbench_prompt(changed: dict[str, Any], expected: str) -> None:
    assert mmbench.prompt(question(1, **changed)) == expected


OPTIONS = {"A": "oak", "B": "pine", "C": "nan", "D": "nan"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. pine", "B"),
        ("It is an oak.", "A"),
        ("(A)", "A"),
        ("Neither", None),
        ("a", None),
        ("A or B", None),
        ("A is the correct option here", None),
        ("A dog", "A"),
        ("E", "E"),  # an answer may be E
        ("The answer is C", "C"),
        (":B)", "B"),
        ("B). or A", "A"),  # bare tokens before those with an affix
        ("B). or A.", "A"),  # and the affixes in their order
        ("OAK", "A"),
        ("oak pine", None),
        ("", None),
        ("B Failed to obtain answer via API", None),
        ("pine Failed to obtain answer via API", "B"),  # which skips the rules on letters alone
    ],
)
def test_mmbench_parsing(text: str, letter: str | None) -> None:
    assert mmbench.parse(text, OPTIONS) == letter


@pytest.mark.parametrize("missing", ["", "nan", None, float("nan")])
def test_mmbench_notes_a_right_option_that_is_missing(missing: object) -> None:
    row = {"index": 1, "answer": "B", "A": "x", "B": "y", "C": missing, "D": missing} | dict.fromkeys(
        ("category", "L2-category"), "c"
    )
    assert "noted" not in mmbench.score("B", doc(row))
    assert mmbench.score("B", doc(row | {"answer": "C"}))["noted"] == "right option is missing"


def test_mmbench_missing_option_is_the_text_nan() -> None:
    assert mmbench.parse("banana", {"A": "oak", "B": "pine", "C": "elm", "D": "nan"}) == "D"
    assert mmbench.parse("banana", OPTIONS) is None  # two of them
    assert mmbench.parse("A dog", {"A": "oak", "B": "a dog", "C": "nan", "D": "nan"}) == "A"


def test_mmbench_counts_questions_with_all_rotations_right() -> None:
    million = mmbench.ROTATION
    answered = [
        ("A", question(1)),
        ("B", question(1 + million, "B")),
        ("A", question(2, **{"category": "image_style"})),
        ("A", question(2 + million, "B")),  # wrong
        ("B", question(3, "B", **{"L2-category": "logic_reasoning"})),
        ("B", question(9 + million, "B")),  # its question is not there
    ]
    lines = records(mmbench.BENCHMARK, answered)
    found = reported(mmbench.BENCHMARK, lines)
    assert found["gpt_eval_score"] == found["gpt_eval_score_strict"] == pytest.approx(200 / 3)
    assert found["gpt_eval_score ocr"] == 100
    assert found["gpt_eval_score image_style"] == 0
    assert found["gpt_eval_score coarse_perception"] == 50
    assert found["gpt_eval_score logic_reasoning"] == 100
    assert found["unparsed_percent"] == found["fallback_percent"] == 0
    left = [record.get("left_out") for record in mmbench.finish(lines)]
    assert left == [None] * 5 + ["rotation without its question"]


def test_mmbench_question_with_a_bad_image_is_left_out() -> None:
    million = mmbench.ROTATION
    answered = [("A", question(1)), ("A", question(1 + million)), ("A", question(2))]
    lines = records(mmbench.BENCHMARK, answered)
    lines[0] = {"question_id": "1", "cluster": "1", "left_out": "bad image", "metrics": {}}
    finished = mmbench.finish(lines)
    assert [record.get("left_out") for record in finished] == ["bad image", "incomplete", None]


def naive_mmbench(answered: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[float, float, int]:
    """The two scores and the number of letters drawn, straight from the specification's text."""
    rng, drawn = random.Random(2680), 0
    groups: dict[int, list] = {}
    for text, row in sorted(answered, key=lambda one: one[1]["index"]):
        parsed = mmbench.parse(text, {letter: row[letter] for letter in "ABCD"})
        groups.setdefault(row["index"] % 1_000_000, []).append((parsed, row["answer"]))
    hits, strict = [], []
    for index in sorted(groups):
        strict.append(all(parsed == answer for parsed, answer in groups[index]))
        good = all(parsed == answer for parsed, answer in groups[index] if parsed)
        for parsed, answer in groups[index]:
            if good and not parsed:
                drawn += 1
                good = rng.choice("ABCDE") == answer
        hits.append(good)
    return 100 * sum(hits) / len(hits), 100 * sum(strict) / len(strict), drawn


def test_mmbench_fallback_against_a_plain_computation() -> None:
    rng = random.Random(5)
    texts = ["A", "B", "C", "no idea", "who knows", "(A)"]
    answered = []
    for index in rng.sample(range(1000), 120):
        for turn in range(rng.randint(1, 2)):
            answered.append((rng.choice(texts), question(index + turn * mmbench.ROTATION, rng.choice("AB"))))
    rng.shuffle(answered)
    lines = records(mmbench.BENCHMARK, answered)
    found, (score, strict, drawn) = reported(mmbench.BENCHMARK, lines), naive_mmbench(answered)
    assert 0 < strict < score < 100
    assert found["gpt_eval_score"] == pytest.approx(score)
    assert found["gpt_eval_score_strict"] == pytest.approx(strict)
    assert found["fallback_percent"] == pytest.approx(100 * drawn / len(answered))
    assert found["unparsed_percent"] == pytest.approx(100 * np.mean([line["parsed"] is None for line in lines]))
    assert reported(mmbench.BENCHMARK, lines) == found  # seeded once an aggregation


# TextVQA, VQAv2, ScienceQA

STOP = ["stop"] * 7 + ["stop sign"] + ["yield"] * 2


def test_textvqa_prompt_capitalises() -> None:
    assert textvqa.prompt({"question": "what does THE sign say?"}) == "What does the sign say?" + SHORT


@pytest.mark.parametrize(("text", "expected"), [("stop", 1.0), ("Stop sign", 0.3), ("yield", 0.6), ("go", 0.0)])
def test_textvqa_example(text: str, expected: float) -> None:
    scored = textvqa.score(text, doc({"answers": STOP}))
    assert scored["metrics"] == {"exact_match": pytest.approx(expected)}


def people(*answers: str) -> dict[str, Any]:
    return {"answers": [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers, 1)]}


@pytest.mark.parametrize(("text", "expected"), [("stop", 1.0), ("Stop sign", 0.3), ("yield", 0.6), ("go", 0.0)])
def test_vqav2_same_formula(text: str, expected: float) -> None:
    assert vqav2.score(text, doc(people(*STOP)))["metrics"] == {"exact_match": pytest.approx(expected)}


def test_vqav2_prompt_keeps_the_question() -> None:
    assert vqav2.prompt({"question": "what IS it? "}) == "what IS it? " + SHORT


def test_vqav2_normalises_people_only_where_they_differ() -> None:
    assert vqav2.score("two", doc(people(*["two"] * 10)))["metrics"]["exact_match"] == 0  # ours became 2
    mixed = people(*["two"] * 9, "three")
    assert vqav2.score("two", doc(mixed))["metrics"]["exact_match"] == pytest.approx(1)
    assert vqav2.score("2", doc(mixed))["metrics"]["exact_match"] == pytest.approx(1)


def test_vqav2_leaves_the_rows_answers_alone() -> None:
    truth = people(" A\ncat", *["cat"] * 9)
    vqav2.score("cat", doc(truth))
    assert truth["answers"][0]["answer"] == " A\ncat"


@pytest.mark.parametrize(("benchmark", "row"), [(textvqa, {"answers": [""] * 10}), (vqav2, people(*[""] * 10))])
def test_secret_answers_are_none(benchmark: Any, row: dict[str, Any]) -> None:
    """As splits for a challenge have them: an empty answer would be right, and any other wrong."""
    with pytest.raises(RerouteError, match="question q has no answers to compare with: choose a split"):
        benchmark.score("x", doc(row))


def test_vqav2_refuses_people_who_cannot_be_told_apart() -> None:
    """None of them would be another, and a right answer count for nothing."""
    with pytest.raises(RerouteError, match="question q: people cannot be told apart, expected an answer_id"):
        vqav2.score("cat", doc({"answers": [{"answer": "cat"}] * 10}))


@pytest.mark.parametrize("answer", ["", " .", "?!"])
def test_gqa_refuses_a_truth_that_is_nothing(answer: str) -> None:
    if answer.strip():
        assert gqa.gqa_match("", answer.strip()) == 1
    with pytest.raises(RerouteError, match=r"question q: answer is .*, which nothing can be compared with"):
        gqa.score("x", doc({"answer": answer}))


@pytest.mark.parametrize("hint", ["", None, float("nan")])
def test_scienceqa_has_no_context_of_a_missing_hint(hint: object) -> None:
    assert scienceqa.prompt(SCIENCE | {"hint": hint}).startswith("Which?\nA. one")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_scienceqa_refuses_a_missing_choice(missing: object) -> None:
    with pytest.raises(RerouteError, match=r"question q: choices are .*, expected the text of each"):
        scienceqa.score("B", doc(SCIENCE | {"choices": ["one", "two", missing]}))


@pytest.mark.parametrize("benchmark", [textvqa, vqav2])
def test_questions_without_peoples_answers_are_refused(benchmark: Any) -> None:
    with pytest.raises(RerouteError, match="question q has no answers to compare with"):
        benchmark.score("x", doc({"answers": []}))


SCIENCE = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 1, "hint": ""}


def test_scienceqa_prompt() -> None:
    assert scienceqa.prompt(SCIENCE) == "Which?\nA. one\nB. two\nC. three" + LETTER
    with_hint = "Context: Look.\nWhich?\nA. one\nB. two\nC. three" + LETTER
    assert scienceqa.prompt(SCIENCE | {"hint": "Look."}) == with_hint


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("B", 1),
        ("b", 1),
        ("B.", 1),
        ("B. two", 1),
        ("b. two", 0),
        ("(B)", 0),
        ("The answer is B", 0),
        ("A. B", 0),
        ("", 0),
    ],
)
def test_scienceqa_score(text: str, hit: int) -> None:
    assert scienceqa.score(text, doc(SCIENCE))["metrics"] == {"exact_match": hit}


def test_scienceqa_refuses_an_answer_outside_the_choices() -> None:
    with pytest.raises(RerouteError, match=r"question q: answer is 3, expected the place of one of"):
        scienceqa.score("B", doc(SCIENCE | {"answer": 3}))
