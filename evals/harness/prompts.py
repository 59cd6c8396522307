"""Question texts without the model's chat template: those that lmms-eval v0.7.1 hands to a model, and Qwen3-VL's own
for boxes (`qwen3`). Pure functions."""

from reroute_jax.errors import RerouteError

_FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
)
_REGION = "Please provide the bounding box coordinate of the region this sentence describes: "
_REC = {
    "full": _FORMAT + _REGION + "{}",
    "short": _REGION + "{}",
    "nuwa": "Locate {} in this image and output the bbox coordinates in JSON format.",
    # Of its authors' own evaluation (QwenLM/Qwen3-VL issue 1721).
    "qwen3": 'Locate every object that matches the description "{}" in the image. Report bbox coordinates in JSON '
    "format.",
}
REC_STYLES = tuple(_REC)


def rec(expression: str, style: str) -> str:
    """Prompt for the box of `expression`, inserted as it is. Raises RerouteError for a style not in REC_STYLES."""
    if style not in _REC:
        raise RerouteError(f"unknown prompt style {style!r}: expected one of {', '.join(REC_STYLES)}")
    # Not str.format: an expression may hold braces.
    return _REC[style].replace("{}", expression, 1)


def single_word(question: str) -> str:
    """Short-answer VQA prompt of POPE, GQA, MME and the scenes' questions; the question is inserted as it is."""
    return f"{question}\nAnswer the question using a single word or phrase."


def option_letter(question: str) -> str:
    """Multiple-choice prompt of MMBench and ScienceQA; the question with its options is inserted as it is."""
    return f"{question}\nAnswer with the option's letter from the given choices directly."
