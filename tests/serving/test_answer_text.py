"""The text of an answer in pieces, up to the first string that stops it."""

from hypothesis import given
from hypothesis import strategies as st

from reroute_jax.serving.answer_text import AnswerText


class Letters:
    """A tokenizer whose tokens are characters of "abc"."""

    def decode(self, tokens, skip_special_tokens):
        return "".join("abc"[token] for token in tokens)


def spoken(tokens, stops):
    """What is shown, and how many tokens that took."""
    text, shown = AnswerText(Letters(), stops), ""
    for count, token in enumerate(tokens, 1):
        shown += text.add(token)
        if text.stopped:
            return shown, count
    return shown + text.rest(), len(tokens)


@given(st.lists(st.integers(0, 2)), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_where_the_first_stop_is_complete(tokens, stops):
    whole = Letters().decode(tokens, True)
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    shown, count = spoken(tokens, stops)
    assert count == min(ends, default=len(tokens))
    begins = [whole[:count].index(stop) for stop in stops if stop in whole[:count]]
    assert shown == whole[: min(begins, default=len(whole))]


def test_what_may_become_a_stop_is_held_back():
    text = AnswerText(Letters(), ["abc"])
    assert [text.add("abc".index(letter)) for letter in "cabba"] == ["c", "", "", "abb", ""]
    assert text.rest() == "a" and not text.stopped
    assert [text.add("abc".index(letter)) for letter in "abc"] == ["", "", ""] and text.stopped
