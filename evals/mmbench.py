"""MMBench, English dev: each question asked with its options in every rotation. `python -m evals.mmbench --help`."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial

from evals.harness import prompts, vqa
from evals.harness.columns import DataRow, Hub
from evals.harness.data import Doc
from evals.harness.runner import INCOMPLETE, Record
from evals.scenes.data import vqa_rows
from evals.scenes.world import COLOURS, scene_seed, stream
from reroute_jax.errors import RerouteError

LETTERS = "ABCDE"  # an answer may be E although no question has one
OPTIONS = LETTERS[:4]
MISSING = "nan"
ROTATION = 1_000_000  # rows whose index agrees modulo this are one question; its own index is below
SEED = 2680  # of the letters drawn for answers that cannot be read: the reference's, without a key for its judge
UNANSWERED = "Failed to obtain answer via API"
AFFIXES = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
SCORE = "gpt_eval_score"
STRICT = "gpt_eval_score_strict"
UNPARSED = "unparsed_percent"
FALLBACK = "fallback_percent"
ORPHAN = "rotation without its question"
ABSENT = "right option is missing"
L2_CATEGORIES = (
    "attribute_reasoning",
    "coarse_perception",
    "finegrained_perception (cross-instance)",
    "finegrained_perception (instance-level)",
    "logic_reasoning",
    "relation_reasoning",
)
CATEGORIES = (
    "action_recognition",
    "attribute_comparison",
    "attribute_recognition",
    "celebrity_recognition",
    "function_reasoning",
    "future_prediction",
    "identity_reasoning",
    "image_emotion",
    "image_quality",
    "image_scene",
    "image_style",
    "image_topic",
    "nature_relation",
    "object_localization",
    "ocr",
    "physical_property_reasoning",
    "physical_relation",
    "social_relation",
    "spatial_relationship",
    "structuralized_imagetext_understanding",
)


def prompt(row: DataRow) -> str:
    """Hint, question and options, then two newlines and the request for a letter. An empty hint leaves its space."""
    hint = _text(row["hint"])
    lead = "" if hint == MISSING else f"{hint} "
    options = [(letter, _text(row[letter])) for letter in OPTIONS]
    listed = "\n".join(f"{letter}. {option}" for letter, option in options if option not in ("", MISSING))
    return prompts.option_letter(f"{lead}{row['question']} There are several options:\n{listed}\n")


def parse(text: str, options: dict[str, str]) -> str | None:
    """The letter that an answer means by the reference's rules, or None.

    options: text by letter, "nan" for a missing one, which counts as text here as it does there.
    """
    return (None if UNANSWERED in text else _letter(text.split())) or _named(text, options)


def score(text: str, doc: Doc) -> Record:
    """How the answer reads. What counts is whether all rotations of a question are right: see `finish`."""
    row = doc.truth
    truth = row["answer"]
    if truth not in tuple(OPTIONS):
        raise RerouteError(f"index {row['index']}: answer is {truth!r}, expected one of {', '.join(OPTIONS)}")
    parsed = parse(text, {letter: _text(row[letter]) for letter in OPTIONS})
    noted = {"noted": ABSENT} if _text(row[truth]) in ("", MISSING) else {}
    return noted | {
        "category": row["category"],
        "l2_category": row["L2-category"],
        "parsed": parsed,
        "unparsed": parsed is None,
        "truth": truth,
        "metrics": {},
    }


def finish(records: Sequence[Record]) -> list[Record]:
    """Scores of each question on the row of lowest index, and on each row whether it could be read and was drawn for.

    Letters are drawn in the reference's order: by question, then rotation, where every answer that can be read is
    right, up to the first wrong draw. A drawn letter is in the row's field "fallback". Rotations whose question is not
    among the rows are left out, as there; so is a question of which one rotation has a bad image.
    """
    rng = random.Random(SEED)
    finished = [dict(record) for record in records]
    questions: dict[int, list[Record]] = {}
    for record in sorted(finished, key=_index):
        questions.setdefault(_index(record) % ROTATION, []).append(record)
    for rotations in (questions[index] for index in sorted(questions)):
        whole = not any("left_out" in record for record in rotations)
        if whole and _index(rotations[0]) < ROTATION:
            _score_question(rotations, rng)
            continue
        for record in rotations:
            record.setdefault("left_out", ORPHAN if whole else INCOMPLETE)
    return finished


def _index(record: Record) -> int:
    return int(record["question_id"])


def _score_question(rotations: Sequence[Record], rng: random.Random) -> None:
    right = all(record["parsed"] in (None, record["truth"]) for record in rotations)
    strict = all(record["parsed"] == record["truth"] for record in rotations)
    for record in rotations:
        unparsed = record["parsed"] is None
        drawn = unparsed and right
        if drawn:
            record["fallback"] = rng.choice(LETTERS)
            right = record["fallback"] == record["truth"]
        record["metrics"] = {UNPARSED: 100.0 * unparsed, FALLBACK: 100.0 * drawn}
    parts = (_part(rotations[0][level]) for level in ("l2_category", "category"))
    rotations[0]["metrics"] |= {STRICT: 100.0 * strict} | dict.fromkeys((SCORE, *parts), 100.0 * right)


def _part(category: str) -> str:
    return f"{SCORE} {category}"


def _letter(tokens: Sequence[str]) -> str | None:
    """The only letter that is a token, bare (but not with A in more than 3 tokens) or with one of the affixes."""
    found = [letter for letter in LETTERS if letter in tokens]
    if len(found) == 1 and not ("A" in tokens and len(tokens) > 3):
        return found[0]
    for before, after in AFFIXES:
        found = [letter for letter in LETTERS if before + letter + after in tokens]
        if len(found) == 1:
            return found[0]
    return None


def _named(text: str, options: dict[str, str]) -> str | None:
    """The letter of the only option whose text the answer holds, whatever the case."""
    found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def _text(value: str | float | None) -> str:
    """A column's text; NaN and None are missing texts too."""
    return MISSING if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def stand_in(split: str, family: str) -> Iterator[DataRow]:
    """Colours, numbers and yes/no in rendered scenes, each question in as many rotations as it has options."""
    for index, asked in enumerate(vqa_rows(split, ROTATION, family=family)):
        kind, answer = asked["category"], asked["answer"]
        category, level2 = {
            "yesno": ("spatial_relationship", "finegrained_perception (cross-instance)"),
            "colour": ("attribute_recognition", "finegrained_perception (instance-level)"),
            "count": ("object_localization", "finegrained_perception (instance-level)"),
        }[kind]
        words = {"yesno": ("yes", "no"), "colour": COLOURS, "count": tuple(map(str, range(6)))}[kind]
        rng = stream(7, scene_seed(split, index))
        others = rng.permutation([word for word in words if word != answer]).tolist()[: len(OPTIONS) - 1]
        options = rng.permutation([answer, *others]).tolist()
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            yield {
                "index": index + turn * ROTATION,
                "question": asked["question"],
                "hint": MISSING,
                "answer": OPTIONS[turned.index(answer)],
                **{letter: turned[place] if place < len(turned) else MISSING for place, letter in enumerate(OPTIONS)},
                "category": category,
                "image": asked["image"],
                "source": "scenes",
                "L2-category": level2,
                "comment": MISSING,
                "split": split,
            }


BENCHMARK = vqa.Benchmark(
    name="mmbench",
    about="Multiple choice with rotated options: a question counts if all its rotations are right.",
    hub=Hub("lmms-lab/MMBench", "en", "dev"),
    columns={"index": int, "question": str, "hint": object, "answer": str}
    | dict.fromkeys(OPTIONS, object)  # these and a hint may be missing
    | {"category": str, "L2-category": str},
    prompt=prompt,
    score=score,
    metrics=(SCORE, STRICT, UNPARSED, FALLBACK, *map(_part, L2_CATEGORIES), *map(_part, CATEGORIES)),
    stand_in=stand_in,
    max_new_tokens=1024,
    key="index",
    cluster=lambda row: str(int(row["index"]) % ROTATION),
    finish=finish,
    difference_scale=1,
)
main = partial(vqa.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
