"""The conversion engine and LLaVA's table, without files."""

import dataclasses
import re

import numpy as np
import pytest

from convert import llava
from convert.families import abstract_params
from convert.table import (
    FUSED_HEADS,
    FUSED_HEADS_BIAS,
    HEADS_BIAS,
    MERGE_HEADS,
    NAMES_SHOWN,
    SAME,
    SPLIT_HEADS,
    Buffer,
    ConversionTable,
    Rule,
    hf_key,
    hf_shapes,
    match,
    patches,
    to_hf,
)
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.types import FLOATS

CONFIG = read_config(SHAPES["llava-tiny-gqa"].config("float32"))
TARGET = {path: value.shape for path, value in abstract_params(CONFIG).items()}
TABLE = llava.table(CONFIG)
HUB = hf_shapes(TABLE, TARGET)

SMALL = ConversionTable(
    rules=(Rule("block.{i}.weight", "blocks.{i}.kernel", SAME), Rule("norm", "norm", SAME)),
    spellings=((r"^model\.", ""),),
    buffers=(Buffer(r"block\.\d+\.counter", np.arange(7)),),
    copies=(("tail", "norm"),),
)
SMALL_TARGET = {"blocks.0.kernel": (3, 2), "blocks.1.kernel": (3, 2), "norm": (3,)}
SMALL_SOURCE = [("block.0.weight", "F32", (3, 2)), ("block.1.weight", "F32", (3, 2)), ("norm", "F32", (3,))]


def numbered(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def as_saved_by_transformers_5(key):
    return key.replace("vision_tower.vision_model.", "vision_tower.")


def as_in_memory(key):
    key = as_saved_by_transformers_5(key)
    if key == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + key.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize(
    ("layout", "tensor", "parameter"),
    [
        (SAME, (2, 3), (2, 3)),
        (SPLIT_HEADS, (3 * 4, 2), (3, 4, 2)),
        (MERGE_HEADS, (2, 3 * 4), (2, 3, 4)),
        (HEADS_BIAS, (3 * 4,), (3, 4)),
        (FUSED_HEADS, (3 * 5 * 4, 2), (3, 5, 4, 2)),
        (FUSED_HEADS_BIAS, (3 * 5 * 4,), (3, 5, 4)),
        (patches(2, 4), (5, 3, 2, 4, 4), (5, 3 * 2 * 4 * 4)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_layouts(layout, tensor, parameter):
    assert layout.hf_shape(parameter) == tensor


def test_match_keeps_the_order_of_the_source():
    found = match(SMALL, SMALL_SOURCE, SMALL_TARGET, "tiny")
    assert [(a.key, a.path) for a in found] == [
        ("block.0.weight", "blocks.0.kernel"),
        ("block.1.weight", "blocks.1.kernel"),
        ("norm", "norm"),
    ]


def test_buffers_need_not_be_floats():
    source = [*SMALL_SOURCE, ("model.block.1.counter", "I64", (7,))]
    assert len(match(SMALL, source, SMALL_TARGET, "tiny")) == len(SMALL_SOURCE)


def test_a_copy_stands_for_its_original():
    """As a tied head for the embeddings, in either direction."""
    both, alone = [*SMALL_SOURCE, ("model.tail", "F32", (3,))], [*SMALL_SOURCE[:2], ("model.tail", "F32", (3,))]
    assert [one.key for one in match(SMALL, both, SMALL_TARGET, "tiny")][-1] == "norm"
    found = match(SMALL, alone, SMALL_TARGET, "tiny")[-1]
    assert (found.key, found.path) == ("model.tail", "norm")


@pytest.mark.parametrize(
    ("stored", "agrees"),
    [
        (np.arange(7), True),
        (np.arange(7)[None], True),
        (np.arange(7).astype(np.float16), True),
        (np.arange(1, 8), False),
        (np.arange(6), False),
        (np.arange(7) * np.float32(1.001), False),
    ],
)
def test_buffers_are_compared(stored, agrees):
    assert SMALL.buffers[0].agrees(stored) == agrees


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_frequencies_in_every_stored_precision(dtype):
    frequencies = 1e6 ** -(np.arange(0, 128, 2) / 128)
    buffer = Buffer("", frequencies)
    assert buffer.agrees(frequencies.astype(dtype))
    assert not buffer.agrees((1e4 ** -(np.arange(0, 128, 2) / 128)).astype(dtype))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ([*SMALL_SOURCE, ("extra.weight", "F32", (1,))], "unknown: extra.weight"),
        ([*SMALL_SOURCE, ("block.2.weight", "F32", (3, 2))], "unknown: block.2.weight"),
        ([*SMALL_SOURCE, ("block.01.weight", "F32", (3, 2))], "unknown: block.01.weight"),
        ([*SMALL_SOURCE, ("prefix.norm", "F32", (3,))], "unknown: prefix.norm"),
        (SMALL_SOURCE[1:], "missing: block.0.weight (for blocks.0.kernel)"),
        ([*SMALL_SOURCE, SMALL_SOURCE[2]], "duplicate: norm is in 2 files"),
        ([*SMALL_SOURCE, ("model.norm", "F32", (3,))], "duplicate: norm is set by norm and by model.norm"),
        ([*SMALL_SOURCE[:2], ("norm", "F32", (4,))], "mis-shaped: norm is [4], expected [3]"),
        (
            [("block.0.weight", "F32", (2, 3)), *SMALL_SOURCE[1:]],
            "mis-shaped: block.0.weight is [2, 3], expected [3, 2]",
        ),
        ([*SMALL_SOURCE[:2], ("norm", "I8", (3,))], "dtype: norm is I8, expected one of F32, F16, BF16"),
    ],
)
def test_each_misfit_is_named(source, line):
    with pytest.raises(RerouteError) as caught:
        match(SMALL, source, SMALL_TARGET, "tiny")
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"checkpoint tiny does not fit its config.json: 1 {line.split(':')[0]}"
    assert lines == ["  " + line]


def test_all_misfits_are_in_one_report():
    source = [("norm", "I8", (4,)), ("model.norm", "F32", (3,)), ("a", "F32", (1,)), ("a", "F32", (1,))]
    with pytest.raises(RerouteError) as caught:
        match(SMALL, source, SMALL_TARGET, "tiny")
    assert str(caught.value).splitlines()[0].endswith("1 unknown, 2 missing, 2 duplicate, 1 mis-shaped, 1 dtype")


def test_a_long_report_is_cut_with_the_count():
    source = [*SMALL_SOURCE, *((f"x{n}", "F32", (1,)) for n in range(NAMES_SHOWN + 5))]
    with pytest.raises(RerouteError) as caught:
        match(SMALL, source, SMALL_TARGET, "tiny")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + NAMES_SHOWN + 1
    assert lines[-1] == "  unknown: ... and 5 more"


def test_a_rule_of_the_wrong_rank_is_refused():
    table = ConversionTable((Rule("norm", "norm", SPLIT_HEADS),))
    with pytest.raises(RerouteError, match=re.escape("split_heads is for parameters of rank 3, but norm is [3]")):
        match(table, [("norm", "F32", (3,))], {"norm": (3,)}, "tiny")


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(RerouteError, match=r"no conversion rule for parameter decoder\.extra"):
        hf_key(TABLE, "decoder.extra")


@pytest.mark.parametrize("spell", [str, as_saved_by_transformers_5, as_in_memory])
def test_llava_uses_each_key_once_and_sets_each_parameter_once(spell):
    source = [(spell(key), "BF16", shape) for key, shape in HUB.items()]
    assignments = match(TABLE, source, TARGET, "tiny")
    assert sorted(a.key for a in assignments) == sorted(spell(key) for key in HUB)
    assert sorted(a.path for a in assignments) == sorted(TARGET)
    assert {a.path: spell(hf_key(TABLE, a.path)[0]) for a in assignments} == {a.path: a.key for a in assignments}


def test_llava_ignores_the_buffers_of_old_checkpoints():
    buffers = [
        ("vision_tower.vision_model.embeddings.position_ids", "I64", (1, 17)),
        ("language_model.model.layers.3.self_attn.rotary_emb.inv_freq", "F32", (4,)),
        ("language_model.model.rotary_emb.inv_freq", "F32", (4,)),
    ]
    source = [(key, "F32", shape) for key, shape in HUB.items()]
    for spell in (str, as_saved_by_transformers_5, as_in_memory):
        match(TABLE, source + [(spell(key), dtype, shape) for key, dtype, shape in buffers], TARGET, "tiny")


def test_two_spellings_of_one_tensor_are_a_duplicate():
    source = [(key, "F32", shape) for key, shape in HUB.items()]
    head = "language_model.lm_head.weight"
    with pytest.raises(RerouteError, match=f"decoder.head.kernel is set by {head} and by lm_head.weight"):
        match(TABLE, [*source, ("lm_head.weight", "F32", HUB[head])], TARGET, "tiny")


def test_a_tied_head_is_not_read():
    tied = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tied_head=True))
    target = {path: value.shape for path, value in abstract_params(tied).items()}
    assert "decoder.head.kernel" not in target
    source = [(key, "F32", shape) for key, shape in HUB.items()]
    for given in (source, [entry for entry in source if "lm_head" not in entry[0]]):
        assert {a.path for a in match(llava.table(tied), given, target, "tiny")} == set(target)


def test_to_hf_inverts_every_rule_of_llava():
    params = {path: numbered(*shape) for path, shape in TARGET.items()}
    written = dict(to_hf(TABLE, params))
    assert {key: value.shape for key, value in written.items()} == HUB
    for path, value in params.items():
        key, _ = hf_key(TABLE, path)
        np.testing.assert_array_equal(written[key].reshape(value.shape), value)
