"""Every row of table 7.3."""

import pytest

from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import account
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import METHOD_PRESETS, PRESETS, preset

# variant (and its stagewise twin), tier: drop layers, counts at n = 576, nominal and realised average, KV visual.
LLAVA = {
    "fastv_K3_avg192": ([3], [152], 192.02, 191.75, 6136),
    "pdrop_earlyL2_avg192": ([2, 7, 15, 23], [343, 204, 122, 72], 192.00, 191.34, 6123),
    "ours_vs_fastv_avg192": ([3, 7, 15, 23], [152] * 4, 192.02, 191.75, 6136),
    "ours_vs_pdrop_avg192": ([2, 7, 15, 23], [259, 259, 129, 64], 192.00, 191.47, 6127),
    "fastv_K3_avg128": ([3], [81], 128.02, 127.41, 4077),
    "pdrop_earlyL2_avg128": ([2, 7, 15, 23], [263, 120, 54, 25], 128.00, 127.62, 4084),
    "ours_vs_fastv_avg128": ([3, 7, 15, 23], [81] * 4, 128.02, 127.41, 4077),
    "ours_vs_pdrop_avg128": ([2, 7, 15, 23], [152, 152, 76, 38], 128.01, 127.44, 4078),
    "fastv_K3_avg64": ([3], [11], 64.00, 63.97, 2047),
    "pdrop_earlyL2_avg64": ([2, 7, 15, 23], [160, 53, 18, 6], 80.85, 80.44, 2574),
    "ours_vs_fastv_avg64": ([3, 7, 15, 23], [11] * 4, 64.00, 63.97, 2047),
    "ours_vs_pdrop_avg64": ([2, 7, 15, 23], [80, 80, 40, 20], 84.23, 84.12, 2692),
}
QWEN = {
    "fastv_K3_avg192": ([3], [152], 197.69, 197.43, 5528),
    "pdrop_earlyL2_avg192": ([2, 6, 13, 20], [343, 204, 122, 72], 192.87, 192.21, 5382),
    "ours_vs_fastv_avg192": ([3, 6, 13, 20], [152] * 4, 197.69, 197.43, 5528),
    "ours_vs_pdrop_avg192": ([2, 6, 13, 20], [259, 259, 129, 64], 193.96, 193.43, 5416),
    "fastv_K3_avg128": ([3], [81], 134.64, 134.04, 3753),
    "pdrop_earlyL2_avg128": ([2, 6, 13, 20], [263, 120, 54, 25], 129.73, 129.36, 3622),
    "ours_vs_fastv_avg128": ([3, 6, 13, 20], [81] * 4, 134.64, 134.04, 3753),
    "ours_vs_pdrop_avg128": ([2, 6, 13, 20], [152, 152, 76, 38], 131.27, 130.71, 3660),
    "fastv_K3_avg64": ([3], [11], 71.57, 71.54, 2003),
    "pdrop_earlyL2_avg64": ([2, 6, 13, 20], [160, 53, 18, 6], 83.87, 83.46, 2337),
    "ours_vs_fastv_avg64": ([3, 6, 13, 20], [11] * 4, 71.57, 71.54, 2003),
    "ours_vs_pdrop_avg64": ([2, 6, 13, 20], [80, 80, 40, 20], 88.39, 88.29, 2472),
}


def with_twins(family, depth, rows):
    yield pytest.param(f"{family}_baseline", depth, [], [], 576.0, 576.0, 576 * depth, id=f"{family}_baseline")
    for name, row in rows.items():
        names = [name] if "ours" not in name else [name, name.replace("_avg", "_stagewise_avg")]
        for full in names:
            yield pytest.param(f"{family}_{full}", depth, *row, id=f"{family}_{full}")


TABLE = [*with_twins("llava15", 32, LLAVA), *with_twins("qwen25vl", 28, QWEN)]


def decoder(num_layers):
    return DecoderConfig(
        vocab_size=10,
        hidden_size=8,
        mlp_dim=16,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        rope_theta=1e4,
        norm_eps=1e-5,
        qkv_bias=False,
        rope_sections=(),
        tied_head=False,
    )


@pytest.mark.parametrize(("name", "depth", "layers", "counts", "nominal", "realised", "kv_visual"), TABLE)
def test_row_of_the_table(name, depth, layers, counts, nominal, realised, kv_visual):
    schedule = preset(name, depth)
    assert [stage.lo for stage in schedule.decisions] == layers
    assert schedule.keep_counts([576])[:, 0].tolist() == counts
    assert {stage.action for stage in schedule.decisions} <= {"reroute" if "ours" in name else "delete"}
    assert {stage.score for stage in schedule.decisions} <= {"last_token"}
    cost = account(schedule, decoder(depth), visual=576, text=10, grid=(24, 24))
    assert cost.label == name
    assert round(cost.nominal, 2) == nominal
    # Half of a hundredth: 5416 / 28 and the like stand in the table rounded.
    assert cost.average == pytest.approx(realised, abs=0.0051)
    assert cost.kv_visual == kv_visual


def test_there_are_38():
    released = {name for name in PRESETS if "_scaled_" not in name}
    assert len(released) == len(TABLE) == 38
    assert {param.values[0] for param in TABLE} == released


def test_scaled_to_the_depth_of_a_family_that_was_left_out():
    """Of a model of 36 layers: 36 / 32 of the layers 2, 7, 15, 23, but for the first, and the released ratios."""
    assert len({name for name in PRESETS if name.startswith("qwen3vl_scaled_")}) == 19
    schedule = preset("qwen3vl_scaled_ours_vs_pdrop_avg128", 36)
    assert [stage.lo for stage in schedule.decisions] == [2, 7, 16, 25]
    assert [stage.ratio for stage in schedule.decisions] == [0.2655, 0.2655, 0.1328, 0.0664]
    assert {stage.action for stage in schedule.decisions} == {"reroute"} and schedule.deepstack == "all"
    assert preset("qwen3vl_scaled_baseline", 28).decisions == ()


def test_refusals():
    with pytest.raises(
        RerouteError, match="'llava15_fastv', expected one of: llava15_baseline, llava15_fastv_K3_avg192"
    ):
        preset("llava15_fastv", 32)
    with pytest.raises(RerouteError, match="is for 32 decoder layers and the model has 28"):
        preset("llava15_ours_vs_pdrop_avg64", 28)


# Section 17: V2Drop averages 202.8 of 576, FEATHER at most 236 + 64 at first, IVC-Prune 288 or 115 and what it adds.
@pytest.mark.parametrize(
    ("name", "depth", "caps"),
    [
        ("feather_32", 32, [172 + 192, 32]),
        ("v2drop_llava15", 32, [288, 144, 1]),
        ("ivc_llava15", 32, [115 + 58 + 6]),
        ("ivc_qwen25vl", 28, [288]),
        ("divprune_llava15", 32, []),
        ("hiprune_llava15_64", 32, []),
        ("hiprune_qwen25vl_112", 28, []),
    ],
)
def test_other_methods_as_released(name, depth, caps):
    schedule = preset(name, depth)
    assert schedule.label == name and Schedule.from_record(schedule.to_record()) == schedule
    assert [stage.cap for stage in schedule.resolve(576).stages if stage.cap is not None] == caps
    with pytest.raises(RerouteError, match=f"is for {depth} decoder layers and the model has 30"):
        preset(name, 30)


def test_counts_of_released_reductions():
    names = {"divprune_llava15": 56, "hiprune_llava15_192": 192, "hiprune_qwen25vl_334": 192}
    assert {name: METHOD_PRESETS[name]().merged_count(576, (24, 24)) for name in names} == names
