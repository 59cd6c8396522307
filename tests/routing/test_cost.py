"""Section 8's reference values, and cache lengths."""

from dataclasses import replace

import pytest

from reroute_jax.config import DecoderConfig
from reroute_jax.errors import RerouteError
from reroute_jax.routing.cost import Compute, account, visual_per_layer
from reroute_jax.routing.methods import plan
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import preset
from reroute_jax.routing.tower import TowerSizes

LLAVA_7B = DecoderConfig(
    vocab_size=32064,
    hidden_size=4096,
    mlp_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    rope_sections=(),
    tied_head=False,
)
QWEN_7B = replace(LLAVA_7B, hidden_size=3584, mlp_dim=18944, num_layers=28, num_heads=28, num_kv_heads=4)
IMAGE = {"visual": 576, "grid": (24, 24)}


def full(num_layers):
    return Schedule.from_decisions((), (), num_layers)


def test_one_layer():
    llava = account(full(1), replace(LLAVA_7B, num_layers=1), text=64, **IMAGE).visual_only
    assert (llava.swiglu, llava.fastv, llava.scoring) == (119_286_005_760, 93_314_875_392, 0)
    # With as many key as query heads the third form is the second.
    assert llava.gqa == llava.swiglu
    qwen = account(full(1), replace(QWEN_7B, num_layers=1), text=64, **IMAGE).visual_only
    assert qwen.gqa == 136_612_675_584


def test_heads_that_are_not_as_wide_as_the_model():
    """One layer of Qwen3-VL-4B on 100 tokens: 100^2 * 2 * 4096 for the attention, and 100 times 2 * 2560 * 4096 for
    queries and output, 2 * 2560 * 1024 for keys and values, 3 * 2560 * 9728 for the MLP."""
    sizes = {"hidden_size": 2560, "mlp_dim": 9728, "num_kv_heads": 8, "num_layers": 1}
    cost = account(full(1), replace(LLAVA_7B, **sizes), text=0, visual=100, grid=(10, 10))
    assert cost.visual_only.gqa == 10_174_464_000


def test_all_layers():
    llava = account(full(32), LLAVA_7B, text=64, **IMAGE)
    assert round(llava.visual_only.swiglu / 1e12, 6) == 3.817152
    assert round(account(full(28), QWEN_7B, text=64, **IMAGE).visual_only.gqa / 1e12, 6) == 3.825155
    assert llava.prompt.swiglu == 32 * (4 * 640 * 4096**2 + 2 * 640**2 * 4096 + 3 * 640 * 4096 * 11008)


def test_fastv():
    cost = account(preset("llava15_fastv_K3_avg192", 32), LLAVA_7B, text=0, **IMAGE)
    assert round(cost.visual_only.swiglu / 1e12, 6) == 1.255417
    assert round(100 * cost.visual_only.swiglu / 3_817_152_184_320, 2) == 32.89
    few = account(preset("llava15_fastv_K3_avg64", 32), LLAVA_7B, text=0, **IMAGE)
    assert round(few.visual_only.swiglu / 1e12, 3) == 0.422
    ours = account(preset("llava15_ours_vs_fastv_avg192", 32), LLAVA_7B, text=0, **IMAGE)
    assert ours.visual_only.swiglu == cost.visual_only.swiglu
    assert ours.prompt == ours.visual_only


@pytest.mark.parametrize(("budget", "tera", "kv"), [(64, 0.416, 2048), (128, 0.836, 4096), (192, 1.258, 6144)])
@pytest.mark.parametrize("action", ["delete", "reroute"])
def test_nuwa(budget, tera, kv, action):
    schedule = plan("nuwa", num_layers=32, budget=budget, action=action, **IMAGE)
    cost = account(schedule, LLAVA_7B, text=60, **IMAGE)
    assert round(cost.visual_only.swiglu / 1e12, 3) == tera
    assert (cost.kv_visual, cost.average, cost.nominal) == (kv, budget, budget)
    assert cost.visual == 576


def test_pool():
    schedule = plan("pool", num_layers=32, budget=64, **IMAGE)
    cost = account(schedule, LLAVA_7B, text=60, **IMAGE)
    assert (cost.kv_visual, cost.average, cost.visual_only.scoring) == (64 * 32, 64, 0)


def scoring(rows, d=4096, kv=4096, queries=1):
    return sum(t * d * kv + queries * (d * d + t * d) for t in rows)


def test_scoring_pass():
    def compute(**asked):
        cost = account(plan(num_layers=32, budget=192, **asked, **IMAGE), LLAVA_7B, text=64, **IMAGE)
        return cost.visual_only.scoring, cost.prompt.scoring

    # Reroute scores its whole layout at each decision, a deletion what is left.
    assert compute(method="pdrop", action="reroute") == (scoring([576] * 4), scoring([640] * 4))
    left = [576, 343, 204, 122]
    assert compute(method="pdrop", action="delete") == (scoring(left), scoring([v + 64 for v in left]))
    assert compute(method="layout") == (scoring([576] * 4), scoring([640] * 4))
    assert compute(method="nuwa", action="delete") == (scoring([336]), scoring([400]))
    assert compute(method="random") == compute(method="uniform") == (0, 0)
    assert len(plan("fastv", num_layers=32, budget=192, decisions="every", **IMAGE).decisions) == 29
    assert compute(method="fastv", decisions="every")[1] == scoring([640] * 29)
    qwen = account(preset("qwen25vl_fastv_K3_avg64", 28), QWEN_7B, text=4, **IMAGE)
    assert qwen.prompt.scoring == scoring([580], 3584, 512)
    nuwa = plan("nuwa", num_layers=28, budget=192, action="delete", family="qwen2_5_vl", **IMAGE)
    merged = nuwa.merged_count(576, (24, 24))
    assert account(nuwa, QWEN_7B, text=4, **IMAGE).prompt.scoring == scoring([merged + 4], 3584, 512, queries=3)


def test_total_adds_scoring_to_one_form():
    compute = Compute(fastv=10, swiglu=20, gqa=30, scoring=3)
    assert (compute.total(), compute.total("fastv"), compute.total("gqa")) == (23, 13, 33)


# Section 11, vector 5: S = 24, M = 8, n = 16, L = 8.
@pytest.mark.parametrize(
    ("layers", "keep", "action", "lengths"),
    [
        ((3,), (0.3,), "delete", [24, 24, 24, 12, 12, 12, 12, 12]),
        ((2, 4, 6), (0.6, 0.4, 0.2), "delete", [24, 24, 17, 17, 14, 14, 11, 11]),
        ((2, 4, 6), (0.3, 0.3, 0.15), "reroute", [24, 24, 12, 12, 12, 12, 10, 10]),
    ],
)
def test_cache_lengths(layers, keep, action, lengths):
    schedule = Schedule.from_decisions(layers, keep, 8, action)
    assert [8 + visual for visual in visual_per_layer(schedule, 16)] == lengths
    cost = account(schedule, replace(LLAVA_7B, num_layers=8), visual=16, text=8, grid=(4, 4))
    assert cost.kv_tokens == sum(lengths)
    assert cost.kv_bytes == 2 * sum(lengths) * 4096 * 2


def test_bytes_follow_the_dtype_and_the_key_heads():
    llava = {
        dtype: account(full(32), LLAVA_7B, text=4, dtype=dtype, **IMAGE).kv_bytes for dtype in ("float32", "float16")
    }
    assert llava == {"float32": 2 * 32 * 580 * 4096 * 4, "float16": 2 * 32 * 580 * 4096 * 2}
    assert account(full(28), QWEN_7B, text=4, **IMAGE).kv_bytes == 2 * 28 * 580 * 512 * 2
    of_8_bits = replace(QWEN_7B, kv_cache="int8")
    assert account(full(28), of_8_bits, text=4, **IMAGE).kv_bytes == 2 * 28 * 580 * 4 * (128 + 4)


# Section 20 at 576 tokens of LLaVA-1.5-7B, whose tower is 1024 wide.
CLIP_L = TowerSizes(1024, 64, patches=1, class_token=True, features=1024, similarity=1024, projected=4096)


@pytest.mark.parametrize(
    ("method", "budget", "macs"),
    [
        ("divprune", 64, 576**2 * 4096),  # 1.36 G
        ("visionzip", 64, 576 * 1024**2 + 1024**2 + 576 * 1024 + 522 * 10 * (64 + 1024)),
        ("hiprune", 64, 2 * 576**2 * 1024 + 4 * 576 * 1024**2),
        ("nuwa", 64, 576 * 1024**2 + 1024**2 + 576 * 1024 + 112 * 576 * 2048),
        ("pool", 64, 576 * 4096),
        ("downsample", 64, 0),
        ("fastv", 64, 0),
    ],
)
def test_reductions_before_the_decoder(method, budget, macs):
    schedule = plan(method, num_layers=32, budget=budget, **IMAGE)
    cost = account(schedule, LLAVA_7B, text=64, tower=CLIP_L, **IMAGE)
    assert cost.merging == macs and ("merging" in str(cost)) == (macs > 0)
    # Beside the decoder, and not in its forms.
    assert replace(cost, merging=None) == account(schedule, LLAVA_7B, text=64, **IMAGE)


def test_one_line():
    line = str(account(preset("llava15_ours_vs_pdrop_avg64", 32), LLAVA_7B, text=64, **IMAGE))
    assert "\n" not in line
    for part in ("llava15_ours_vs_pdrop_avg64", "84.12 of 576", "nominal 84.23", "SwiGLU", "FastV", "scoring", "MB"):
        assert part in line


def test_depth_is_checked():
    with pytest.raises(RerouteError, match="covers 32 layers and the model has 28"):
        account(full(32), QWEN_7B, text=0, **IMAGE)
