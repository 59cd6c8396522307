"""What is read of a request's body, and the line that is said of each wrong one. No model runs."""

import json
from dataclasses import replace

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.routing.plan import Schedule
from reroute_jax.serving.buckets import Unplaced
from reroute_jax.serving.chat_request import ImageUrl, Served, read_chat_request
from reroute_jax.serving.engine import Busy, Stopping
from reroute_jax.serving.plans import Plan, plan_asked_for, plan_words, share
from reroute_jax.serving.refusals import refusal_of

UNROUTED = Schedule.from_decisions((), (), 4)
PLANS = [
    Plan("pdrop", share(128), "reroute", UNROUTED),
    Plan("pdrop", share(64), "delete", UNROUTED),
    Plan("none", None, None, UNROUTED),
]
SERVED = Served("a-model", PLANS, new_tokens=33, choices=8, stop=(2,), repetition_penalty=1.1)
GOOD = {"model": "a-model", "messages": [{"role": "user", "content": "hi"}]}


def read(**more):
    return read_chat_request(json.dumps(GOOD | more).encode(), SERVED)


def test_an_answer_may_be_sent_back_as_it_came():
    answer = {"role": "assistant", "content": "yes", "refusal": None, "annotations": [], "tool_calls": None}
    assert read(messages=[*GOOD["messages"], answer]).messages[-1] == ("assistant", "yes")


def test_no_more_answers_than_can_wait():
    with pytest.raises(RerouteError, match="n is 3, expected a whole number from 1 to 2"):
        read_chat_request(json.dumps(GOOD | {"n": 3}).encode(), replace(SERVED, choices=2))


def test_what_is_not_given_has_its_default():
    found = read()
    assert (found.messages, found.plan, found.count, found.stop) == ([("user", "hi")], PLANS[0], 1, ())
    assert (found.stream, found.stream_usage, found.logprobs) == (False, False, False)
    sampling = found.sampling
    assert (sampling.temperature, sampling.top_p, sampling.limit, sampling.stop) == (0, 1, 33, (2,))
    assert sampling.repetition_penalty == 1.1
    assert read(temperature=None, n=None, stop=None, seed=None).sampling.temperature == 0
    assert len({read().sampling.seed for _ in range(4)}) > 1


def test_what_is_given_is_read():
    url = "data:image/png;base64,AAAA"
    content = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}, {"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content, "name": "x"}]
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "n": 3, "stop": "."}
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_completion_tokens": 5, "user": "me", "tools": []}
    found = read(messages=messages, routing={"budget": "1/9"}, **options, **sampling)
    assert found.messages == [("system", "be brief"), ("user", [ImageUrl(url), "hi"])]
    assert (found.stream, found.stream_usage, found.logprobs, found.count, found.stop) == (True, True, True, 3, (".",))
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.seed) == (0.5, 0.9, 7)
    assert found.sampling.limit == 5 and found.plan is PLANS[1]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "the body is no JSON"),
        ("\xff", "the body is no JSON"),
        ('{"temperature": NaN}', "NaN is no number"),
        ("[" * 100_000, "the body is no JSON"),
        ("[]", "the body is no JSON object"),
    ],
    ids=["half", "no text", "NaN", "deep", "list"],
)
def test_a_body_that_is_none(body, said):
    with pytest.raises(RerouteError, match=said) as found:
        read_chat_request(body.encode("latin-1"), SERVED)
    assert (refusal_of(found.value).status, "\n" in str(found.value)) == (400, False)


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt' here, expected 'a-model'"),
        ({"model": None}, 404, "there is no model None here"),
        ({"top_k": 4}, 400, "'top_k' is no parameter of this server"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty is 1, expected nothing but 0"),
        ({"top_logprobs": 2}, 400, "top_logprobs is 2, expected nothing but 0"),
        ({"messages": []}, 400, "messages is [], expected a list"),
        ({"messages": ["hi"]}, 400, "message 1 is not a message"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "the content of message 1"),
        (
            {"messages": [{"role": "user", "content": "hi", "images": ["AAAA"]}]},
            400,
            "message 1 has 'images', expected",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 400, "message 1 has 'tool_calls'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "message 1 has a part that is neither"),
        *(
            ({"messages": [{"role": "user", "content": [part]}]}, 400, "message 1 has a part that is neither")
            for part in ({"type": "text", "text": "hi", "image_url": {"url": "data:,"}}, {"type": "text", "image": "A"})
        ),
        ({"temperature": -1}, 400, "temperature is -1"),
        ({"temperature": True}, 400, "temperature is true, expected a number"),
        ({"top_p": "high"}, 400, 'top_p is "high", expected a number'),
        ({"seed": -4}, 400, "seed is -4"),
        ({"stream": 1}, 400, "stream is 1, expected true or false"),
        ({"stream_options": []}, 400, "stream_options is [], expected an object"),
        ({"max_tokens": 34}, 400, "max_tokens is 34, expected a whole number from 1 to 33"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, 400, "only one of max_tokens and max_completion_tokens"),
        ({"n": 9}, 400, "n is 9, expected a whole number from 1 to 8"),
        ({"stop": [""]}, 400, 'stop is [""], expected a string, or up to 4 of them'),
        ({"stop": 0}, 400, "stop is 0, expected a string"),
        ({"stop": {}}, 400, "stop is {}, expected a string"),
        ({"temperature": 10**400}, 400, "expected a number from 0 up to 3.4e+38"),
        ({"top_p": 0}, 400, "top_p is 0"),
        ({"routing": {"budget": "1e-999999999"}}, 400, "is neither"),
        ({"routing": {"budget": 0}}, 400, "routing names no plan"),
        ({"routing": {"method": "nuwa"}}, 400, "expected one of: pdrop 2/9 reroute, pdrop 1/9 delete, none"),
        ({"routing": {"layers": 4}}, 400, "routing is no object of method, budget, action"),
        ({"routing": {"budget": "much"}}, 400, "'much' is neither"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_field_that_is_wrong(wrong, status, said):
    with pytest.raises(RerouteError) as found:
        read(**wrong)
    assert said in str(found.value) and "\n" not in str(found.value)
    assert refusal_of(found.value).status == status


@pytest.mark.parametrize(
    ("routing", "number"),
    [
        (None, 0),
        ({}, 0),
        ({"method": "none"}, 2),
        ({"budget": 64}, 1),
        ({"budget": "1/9", "action": "delete"}, 1),
        ({"action": "reroute", "budget": None}, 0),
    ],
)
def test_routing_names_the_first_plan_that_it_fits(routing, number):
    assert plan_asked_for(PLANS, routing) is PLANS[number]


def test_plans_are_written_with_colons():
    assert plan_words("none") == ("none", None, None)
    assert plan_words("pdrop:64") == ("pdrop", 64, None)
    assert plan_words("pdrop:2/9:delete") == ("pdrop", share(128), "delete")
    for wrong in ("prdop", "pdrop:1:2:3", "pdrop:much"):
        with pytest.raises(RerouteError):
            plan_words(wrong)


def test_a_refusal_is_short_whatever_it_quotes():
    with pytest.raises(RerouteError) as found:
        read(model="x" * 10**6)
    said = refusal_of(found.value).body["error"]["message"]
    assert len(said) < 1100 and said.startswith("there is no model") and said.endswith("expected 'a-model'")


def test_every_refusal_has_its_status_and_kind():
    found = [refusal_of(error) for error in (Busy("x"), Stopping("x"), Unplaced("x"), RerouteError("two\nlines"))]
    assert [one.status for one in found] == [429, 503, 400, 400]
    kinds = ["rate_limit_error", "server_error", "invalid_request_error", "invalid_request_error"]
    assert [one.body["error"]["type"] for one in found] == kinds
    assert [one.headers for one in found] == [{"Retry-After": "1"}, {"Retry-After": "1"}, {}, {}]
    assert found[2].body["error"]["code"] == "context_length_exceeded" and str(found[3]) == "two lines"
