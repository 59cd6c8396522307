import pytest

from evals.harness import prompts
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES


def test_full_style_is_byte_exact() -> None:
    assert prompts.rec("left man", "full") == (
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y)."
        " All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of "
        "the region this sentence describes: left man"
    )


def test_short_style_is_byte_exact() -> None:
    expected = "Please provide the bounding box coordinate of the region this sentence describes: left man"
    assert prompts.rec("left man", "short") == expected


def test_nuwa_style_is_byte_exact() -> None:
    expected = "Locate left man in this image and output the bbox coordinates in JSON format."
    assert prompts.rec("left man", "nuwa") == expected


@pytest.mark.parametrize("expression", ["  Two Spaces ", 'the "red" {} {0} %s cup', "", "Katze \N{CAT}\n"])
@pytest.mark.parametrize("style", prompts.REC_STYLES)
def test_expression_is_inserted_as_it_is(expression: str, style: str) -> None:
    before, after = prompts.rec("@", style).split("@")
    assert prompts.rec(expression, style) == before + expression + after


def test_qwen3s_own_prompt_for_boxes() -> None:
    assert prompts.rec("left man", "qwen3") == (
        'Locate every object that matches the description "left man" in the image. Report bbox coordinates in JSON '
        "format."
    )


def test_unknown_style_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RerouteError, match=r"'qwen'.*full, short, nuwa"):
        prompts.rec("left man", "qwen")


def test_single_word_suffix() -> None:
    asked = prompts.single_word(" What colour? ")
    assert asked == " What colour? \nAnswer the question using a single word or phrase."


def test_each_family_gets_the_references_style() -> None:
    styles = {name: family.evaluation.rec_style for name, family in FAMILIES.items()}
    assert styles == {"llava": "full", "qwen2_5_vl": "nuwa", "qwen3_vl": "qwen3"}
    assert set(styles.values()) <= set(prompts.REC_STYLES)
