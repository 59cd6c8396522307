"""What a device holds of a model and of a request, by hand."""

import argparse
from fractions import Fraction

import pytest

from benchmarks import fits
from reroute_jax.errors import RerouteError

# LLaVA-1.5-7B: 32 layers, as many heads of 128, all of them KV heads; a request of 576 + 64 tokens and room for 32.
ONE_TOKEN = 2 * 32 * 128 * 2
ALL = 32 * (576 + 64 + 32) * ONE_TOKEN


def asked(*arguments: str) -> argparse.Namespace:
    return fits._parser().parse_args(["--random", "llava-1.5-7b", "--held", "bf16", *arguments])


@pytest.fixture(scope="module")
def rooms() -> dict[fits.Shapes, fits.Room]:
    return dict(fits.rooms(asked("--devices", "1", "3", "4", "--chips", "v5e", "v5p", "--budgets", "1/3")))


def test_all_tokens_and_a_third_on_one_chip_and_on_four(rooms):
    found = {(one.devices, one.budget): of for one, of in rooms.items() if one.chip == "v5e"}
    assert list(found) == [(1, "all"), (1, "1/3"), (4, "all"), (4, "1/3")], "32 heads are not split by three"
    assert found[1, "all"].weight_bytes == pytest.approx(14.13e9, rel=1e-3)
    assert found[4, "all"].weight_bytes == pytest.approx(14.13e9 / 4, rel=0.01)
    assert (found[1, "all"].row_bytes, found[4, "all"].row_bytes) == (ALL, ALL // 4)
    third = found[1, "1/3"].row_bytes
    assert third == pytest.approx(32 * (192 + 64 + 32) * ONE_TOKEN, rel=0.01)
    for of in found.values():
        left = int(0.95 * 16e9) - of.weight_bytes - of.prefill_bytes
        assert of.rows * of.row_bytes <= left < (of.rows + 1) * of.row_bytes
    assert found[1, "all"].rows == 2 and found[1, "1/3"].rows == 6


def test_weights_and_cache_in_int8_leave_room_for_more():
    """A token of a head has 128 bytes and a scale of 4 in each of its two caches. Weights of 8 bits are half, but for
    the tower and norms of 0.6 GB and the scales."""
    pytest.importorskip("qwix")
    arguments = asked("--held", "int8", "--devices", "1", "--chips", "v5e", "--budgets", "1/3")
    found = {one.budget: of for one, of in fits.rooms(arguments)}
    assert found["all"].row_bytes == ALL * 132 // 256
    assert found["all"].weight_bytes == pytest.approx(0.65e9 + (14.13e9 - 0.65e9) / 2, rel=0.01)
    assert found["all"].rows == 42, "of 2 in bf16"


def test_kv_heads_that_devices_share_are_copied():
    """Of Qwen2.5-VL-72B's eight KV heads each of eight devices holds one, and so does each of 16."""
    config = fits.read_config(fits.SHAPES["qwen2.5-vl-72b"].config("bfloat16"))
    whole, eight, sixteen = (fits.row_bytes(config, 24, asked(), None, devices)[0] for devices in (1, 8, 16))
    assert whole == 8 * eight == 8 * sixteen


def test_the_table_has_a_line_for_each_size(rooms):
    lines = fits.table(rooms).splitlines()
    assert lines[0].endswith("| v5e all | v5e 1/3 | v5p all | v5p 1/3 |") and len(lines) == 4
    assert lines[2].startswith("| llava-1.5-7b | 1 | bf16 | 576 | 14.1 | 352 | 2 |")


def test_a_budget_below_what_a_method_reaches_is_refused():
    with pytest.raises(RerouteError):
        list(fits.rooms(asked("--method", "fastv", "--budgets", str(Fraction(1, 40)))))
