"""The key that lets clients in. No model runs."""

import pytest

from reroute_jax.errors import RerouteError
from reroute_jax.serve import _key, _parser


def test_a_key_is_what_a_header_can_bear():
    assert _parser().parse_args(["--api-key", "s3cret-!~"]).api_key == "s3cret-!~"
    assert _parser().parse_args([]).api_key is None
    assert (_key("", "REROUTE_API_KEY"), _key("abc", "REROUTE_API_KEY")) == (None, "abc")
    with pytest.raises(RerouteError, match="REROUTE_API_KEY is no key, expected ASCII"):
        _key("kl\u00fc", "REROUTE_API_KEY")


@pytest.mark.parametrize(
    ("key", "said"), [("", "would let everybody in"), (" a", "is no key"), ("\udcff", "is no key")]
)
def test_no_request_could_bear_any_other(key, said, capsys):
    """An empty one, such as of a variable that is not set, is no wish for a server without a key."""
    with pytest.raises(SystemExit):
        _parser().parse_args(["--api-key", key])
    assert said in capsys.readouterr().err
