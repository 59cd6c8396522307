"""Requests that arrive whether or not a server keeps up, and what is told of them."""

import asyncio
import json

import numpy as np
import pytest

from benchmarks.load import Asked, Heard, _has_text, closed_loop, open_loop, questions, summary, table
from benchmarks.load_figure import main as draw


def test_a_request_is_sent_when_it_is_due_whoever_is_answered():
    """Nobody is answered before the last request is sent: a client that waited would wait for ever."""
    due = []

    class Server:
        def __init__(self):
            self.all_sent = asyncio.Event()

        async def ask(self, asked, when):
            due.append(when)
            if len(due) == 5:
                self.all_sent.set()
            await self.all_sent.wait()
            return Heard(200, 0.1, asked.max_tokens)

    async def run():
        asked = [Asked([], number) for number in range(5)]
        return await asyncio.wait_for(open_loop(Server(), asked, np.array([0.0, 0.01, 0.01, 0.02, 0.03])), 10)

    heard = asyncio.run(run())
    assert [one.whole for one in heard] == [0, 1, 2, 3, 4]
    assert np.diff(due) == pytest.approx([0.01, 0, 0.01, 0.01])


def test_at_saturation_every_client_asks_one_thing_at_a_time():
    running, most = 0, 0

    class Server:
        async def ask(self, asked, when):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return Heard(200, 0.1, 0.2) if asked.max_tokens else Heard(429)

    assert asyncio.run(closed_loop(Server(), [Asked([], number) for number in range(9)], clients=3)) > 0
    assert most == 3


def test_the_summary_by_hand():
    heard = [Heard(200, 0.1, 1.0), Heard(200, 0.2, 2.0), Heard(200, 0.3, 4.0), Heard(429)]
    found = summary("none", 2.0, heard, np.array([0.5, 1.0, 1.5, 2.0]), limit=2.5)
    assert (found["answered"], found["refused"], found["good"], found["goodput_per_s"]) == (3, 1, 2, 1.0)
    assert (found["first_p50_s"], found["whole_p50_s"], found["whole_p99_s"]) == (0.2, 2.0, 3.96)
    assert found["answered_per_s"] == 0.545  # the third one ends at 5.5 s
    text = table([found, {"plan": "none", "clients": 4, "saturated_per_s": 3.5}])
    assert "| none | 2.0 | 3 | 1 | 0.200 |" in text and "| none | 3.5 |" in text
    nobody = summary("none", 2.0, [Heard(429)], np.array([1.0]), limit=1.0)
    assert (nobody["good"], nobody["whole_p50_s"]) == (0, None) and "| none | 2.0 | 0 | 1 |  |" in table([nobody])
    assert "NaN" not in json.dumps([found, nobody])


def test_the_first_token_is_the_first_text():
    head, body = '{"choices": [{"delta": {"content": ""}}]}', '{"choices": [{"delta": {"content": "a"}}]}'
    lines = (f"data: {head}", f"data: {body}", 'data: {"choices": []}', 'data: {"error": {}}', "data: [DONE]", "")
    assert [_has_text(line) for line in lines] == [False, True, False, False, False, False]


def test_questions_differ_in_image_text_and_length():
    asked = questions(6, 32, np.random.default_rng(0))
    assert len({one.messages[0]["content"][0]["image_url"]["url"] for one in asked}) == 6
    assert len({one.max_tokens for one in asked}) > 2 and all(8 <= one.max_tokens <= 32 for one in asked)


def test_the_figure_is_of_records(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records, picture = tmp_path / "load.jsonl", tmp_path / "load.svg"
    lines = [summary("none", rate, [Heard(200, 0.1, 1.0)], np.array([1.0]), limit=2.0) for rate in (1.0, 2.0)]
    lines.append({"plan": "none", "clients": 4, "saturated_per_s": 3.5})
    records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert draw([str(records), "--out", str(picture)]) == 0 and picture.stat().st_size > 0
    records.write_text("{}\n")
    assert draw([str(records), "--out", str(picture)]) == 2
    assert "no record is of a rate: give what benchmarks.load wrote" in capsys.readouterr().err
