import json
from pathlib import Path

import pytest

from evals.harness.text_files import json_lines, read_object
from reroute_jax.errors import RerouteError

GOOD = b'{"question": "caf\xc3\xa9 \\ud83d\\ude00"}\n'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"question": "café"}'.encode("latin-1"), "is not UTF-8 (byte 0xe9 at 17): save it as UTF-8"),
        (b'{"question": "\xed\xa0\x80"}', "is not UTF-8"),
        ('{"question": "x"}'.encode("utf-16-le"), "holds NUL bytes"),
        (b'{"question": "\0"}', "holds NUL bytes"),
        (b'{"question": "\\ud800"}', "holds half of a surrogate pair"),
        (b'{"question": [{"deep": "\\udc00\\ud83d"}]}', "holds half of a surrogate pair"),
        (b'{"\\udfff": 1}', "holds half of a surrogate pair"),
        (b'{"question": "x"', "is not JSON"),
        (b'{"question": "x"} {}', "is not JSON"),
        (b'{"question": ' + b"[" * 99_999, "is not JSON"),
        (b'{"question": ' + b"9" * 9_999 + b"}", "is not JSON"),
        (b"[1]", "is no object"),
        (b'"text"', "is no object"),
        (b"null", "is no object"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, expected: str, last: bool) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(GOOD + b"\n" + line + (b"" if last else b"\n" + GOOD))
    lines = json_lines(file)
    assert next(lines) == (1, {"question": "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"})
    with pytest.raises(RerouteError) as caught:
        next(lines)
    said = str(caught.value)
    assert said.startswith(f"line 3 of {file} ")
    assert expected in said
    assert "\n" not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "x"}\n', encoding=encoding)
    with pytest.raises(RerouteError, match=r"line 1 of .*x\.jsonl begins with the byte order mark of UTF-"):
        list(json_lines(file))


def test_lines_without_a_newline_at_the_end_and_with_carriage_returns(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\r\n\r\n{"a": "\xe2\x80\xa8"}')
    assert list(json_lines(file)) == [(1, {"a": 1}), (3, {"a": "\N{LINE SEPARATOR}"})]


def test_settings_may_hold_what_answers_hold(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": "\ud800"}))
    assert read_object(tmp_path / "x.json") == {"a": "\ud800"}
