"""Who may ask a server, and where it listens. No model runs."""

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


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (["--host", ""], "an empty host would be all addresses"),
        (["--host", "a" * 70 + ".org"], "is no host"),
        (["--allow-fetch", "https://example.org"], "'https://example.org' is no host, expected such as example.org"),
        (["--allow-fetch", "a.org,b.org:8080"], "'b.org:8080' is no host"),
    ],
    ids=str,
)
def test_what_is_no_host_is_refused(argument, said, capsys):
    """Of a URL or a port no image would ever be fetched, and nobody be told why."""
    with pytest.raises(SystemExit):
        _parser().parse_args(argument)
    assert said in capsys.readouterr().err


def test_hosts_are_read():
    args = _parser().parse_args(["--host", "::1", "--allow-fetch", " A.org, ::1,b.org ,"])
    assert (args.host, args.allow_fetch) == ("::1", {"a.org", "::1", "b.org"})
