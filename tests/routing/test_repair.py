"""Proxies and offsets by hand, SwiftVLM's layers and budgets and rows of several images: vectors 22.9, 22.11."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.crosscheck.layers import RaggedRows
from convert.crosscheck.reference import run
from convert.crosscheck.repairs import ProxyBypass, groups
from reroute_jax.errors import RerouteError
from reroute_jax.nn.layers import Rope
from reroute_jax.routing.cost import account, compute, visual_per_layer
from reroute_jax.routing.groups import group_means, nearest, targets
from reroute_jax.routing.layer_choice import best_layers
from reroute_jax.routing.methods import plan
from reroute_jax.routing.ops import Rows
from reroute_jax.routing.plan import Schedule
from reroute_jax.routing.presets import preset
from reroute_jax.routing.repair import ProxyBypass as JaxProxyBypass
from reroute_jax.routing.repair import ProxyOffset
from reroute_jax.routing.stages import Stage
from tests.checkpoints import LAYERS, pair
from tests.ragged import padded
from tests.routing.test_cost import LLAVA_7B
from tests.tiny import random_ids, random_pixels

# Vector 22.9: ten tokens of which 1, 4, 5 and 9 wait.
WAITING = [1, 4, 5, 9]
HIDDEN = np.zeros((10, 2), np.float32)
HIDDEN[WAITING] = (1, 0), (0.9, 0.1), (0, 1), (0.1, 1.2)
PROXIES, OFFSETS = np.array([(0.95, 0.05), (0.05, 1.1)], np.float32), np.array([(1, 1), (0, -2)], np.float32)
REPAIRED = np.array([(2, 1), (1.9, 1.1), (0, -1), (0.1, -0.8)], np.float32)


def rows_of(hidden):
    count, table = len(hidden), jnp.zeros((1, len(hidden), 1))
    index = jnp.arange(count)[None]
    return Rows(jnp.array(hidden)[None], Rope(table, table), index, index, index >= 0, index >= 0)


@jax.jit
def through_a_stage(hidden, waits):
    """Groups, what enters the stage, which rows run, and the hidden states behind it."""
    seeds, number = targets(waits, jnp.array([2]))
    group = jnp.where(seeds, number, nearest(hidden, seeds, 2))
    inserted = group_means(hidden, group, waits, 2)
    bypass, rows = JaxProxyBypass(waits, seeds, group, inserted), rows_of(HIDDEN)
    # The stage moves the proxies, in their seeds' slots, and every other row that runs by 7.
    after = rows.hidden + 7 * ~waits[..., None]
    after = after.at[0, jnp.array([1, 5])].set(PROXIES + OFFSETS)
    back = bypass.returned(rows, replace(rows, hidden=after)).hidden
    entered = bypass.entering(rows)
    parts = seeds, group, inserted, entered.hidden, entered.visual, bypass.running(~waits), back
    return [part[0] for part in parts], bypass.proxies(rows)


def test_groups_of_two():
    parts, proxies = through_a_stage(HIDDEN[None], np.isin(np.arange(10), WAITING)[None])
    seeds, group, inserted, entered, visual, running, back = map(np.asarray, parts)
    assert np.flatnonzero(seeds).tolist() == [1, 5]
    assert group[WAITING].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(inserted, PROXIES, atol=1e-6)
    np.testing.assert_allclose(entered[[1, 5]], PROXIES, atol=1e-6)
    assert np.flatnonzero(visual < 0).tolist() == [1, 5] and proxies.tolist() == [2]
    assert np.flatnonzero(running).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    np.testing.assert_allclose(back[WAITING], REPAIRED, atol=1e-6)
    np.testing.assert_allclose(back[[0, 2, 3]], 7)


def test_groups_of_two_in_torch():
    assert groups(torch.tensor(HIDDEN[WAITING]), 2) == [[0, 1], [2, 3]]
    index = torch.arange(64)
    hidden = torch.cat([torch.tensor(HIDDEN), torch.zeros(54, 2)])
    rows = RaggedRows(hidden, index[None], index, index)
    running = torch.tensor([place for place in range(64) if place not in WAITING])
    bypass = ProxyBypass(rows, torch.tensor(WAITING), running, 64)
    joined = bypass.joined(rows.take(running))
    assert joined.position[0].tolist() == [place for place in range(64) if place not in (4, 9)]
    np.testing.assert_allclose(joined.hidden[[1, 4]], PROXIES, atol=1e-6)
    output = joined.hidden.clone()
    output[[1, 4]] += torch.tensor(OFFSETS)
    assert len(bypass.without_proxies(output)) == 60
    np.testing.assert_allclose(bypass.repaired(rows).hidden[WAITING], REPAIRED, atol=1e-6)


def test_a_seed_is_in_its_own_group_and_few_tokens_make_few():
    """Equal tokens would all join the first seed."""
    assert groups(torch.ones(6, 2), 2) == [[0, 1, 2, 4, 5], [3]]
    proxies, ones = ProxyOffset(), np.ones((6, 2), np.float32)
    leave = jax.jit(lambda none: proxies.leave(rows_of(ones), none, ~none, jnp.array([64]), 2).group)
    assert leave(np.zeros((1, 6), bool))[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert [proxies.proxies(*sizes) for sizes in ((576, 400), (20, 9), (576, 7), (9, 0))] == [18, 1, 7, 0]


# Vector 22.11.
def test_layer_choice():
    accuracy = [None, 0.2, 0.5, 0.4, 0.7, 0.6]
    assert best_layers(accuracy, 2) == (2, 4)
    assert best_layers(accuracy, 1) == (2,)  # 0.5 * 4; layer 4 would be 0.7 * 2
    assert best_layers(accuracy, 3) == (1, 2, 4)
    assert best_layers([0.5, 0.5, 0.9], 2) == (0, 2)
    for wrong in (0, 5):
        with pytest.raises(RerouteError, match=f"{wrong} layers whose accuracies rise"):
            best_layers(accuracy, wrong)


# Section 17's rows of swiftvlm, at 32 layers and 576 tokens.
@pytest.mark.parametrize(("tier", "keep", "average"), [(192, 144, 191.25), (128, 74, 127.81), (64, 3, 63.47)])
def test_budgets(tier, keep, average):
    schedule = plan("swiftvlm", num_layers=32, visual=576, grid=(24, 24), budget=tier)
    assert [stage.lo for stage in schedule.decisions] == [3, 11, 15]
    assert schedule.keep_counts([576, 64])[:, 0].tolist() == [keep] * 3
    ran = visual_per_layer(schedule, 576)
    assert ran == [576] * 3 + [keep + 18] * 12 + [keep] * 17
    assert sum(ran) / 32 == pytest.approx(average, abs=0.005)
    assert schedule.label == f"swiftvlm {tier}" and Schedule.from_record(schedule.to_record()) == schedule
    assert visual_per_layer(preset(f"swiftvlm_llava15_{tier}", 32), 576) == ran


def test_asking():
    def made(**asked):
        return plan("swiftvlm", num_layers=12, visual=144, grid=(12, 12), **asked)

    assert [stage.lo for stage in made(budget=192).decisions] == [1, 4, 5]
    assert made(keep=20).keep_counts([144]).ravel().tolist() == [20] * 3
    assert made(keep=(30, 20, 40), layers=(2, 4, 9)).keep_counts([144]).ravel().tolist() == [30, 20, 40]
    # Without proxies there is more to keep.
    counts = [made(budget=192, repair=name).decisions[0].ratio for name in ("proxy_offset", "mean_offset", "none")]
    assert counts[0] < counts[1] == counts[2]
    assert [stage.repair for stage in made(budget=192, repair="none").decisions] == [None] * 3
    repaired = plan("pdrop", num_layers=12, visual=144, grid=(12, 12), budget=192, repair="mean_offset")
    assert [stage.repair for stage in repaired.decisions] == ["mean_offset"] * 4
    # The last decision's tokens never return.
    assert [stage.repair for stage in repaired.resolve(144).stages][-2:] == ["mean_offset", None]


def test_costs():
    """Two decisions make 18 groups of the 432 that wait, and each waiting row takes part in a mean and is offset."""
    schedule = plan("swiftvlm", num_layers=32, visual=576, grid=(24, 24), budget=192)
    cost = account(schedule, LLAVA_7B, visual=576, text=0, grid=(24, 24))
    scores = 3 * (576 * 4096**2 + 4096**2 + 576 * 4096)
    assert cost.visual_only.scoring == scores + 2 * (432 * 18 * 4096 + 2 * 432 * 4096)
    assert cost.visual_only.swiglu == compute(LLAVA_7B, [576] * 3 + [162] * 12 + [144] * 17, []).swiglu
    assert cost.kv_visual == 3 * 576 + 12 * 162 + 17 * 144


REFUSED = {
    "deletion": (
        lambda: plan("swiftvlm", num_layers=8, visual=9, grid=(3, 3), budget=192, action="delete"),
        "no action",
    ),
    "too few layers": (lambda: plan("swiftvlm", num_layers=3, visual=9, grid=(3, 3), budget=192), "ascending layers"),
    "too small": (lambda: plan("swiftvlm", num_layers=32, visual=576, grid=(24, 24), budget=0.1), "fewer than one"),
    "repair of a deletion": (
        lambda: Schedule.from_decisions((1, 3), (4, 2), 8, "delete", repair="proxy_offset"),
        "no decision reroutes",
    ),
    "stage": (
        lambda: Stage(0, 2, count=1, action="layout", score="last_token", repair="proxy_offset"),
        "use action='reroute'",
    ),
    "name": (
        lambda: Schedule.from_decisions((1, 3), (4, 2), 8, repair="glue"),
        "'glue', expected one of: proxy_offset, mean_offset",
    ),
    "count": (lambda: Schedule.from_decisions((1, 3), (4, 2), 8, repair=("proxy_offset",)), "with 1 of repair"),
    "renumbered": (
        lambda: Schedule.from_decisions((1, 3), (4, 2), 8, position_mode="renumber", repair="proxy_offset"),
        "without a repair",
    ),
    "running": (
        lambda: Schedule.from_decisions((1, 3), (4, 2), 8, deepstack="running", repair="mean_offset"),
        "only tokens that ran",
    ),
    "no return": (
        lambda: plan("nuwa", num_layers=8, visual=36, grid=(6, 6), budget=64, repair="mean_offset", action="delete"),
        "repair",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    ask, said = REFUSED[case]
    with pytest.raises(RerouteError, match=said):
        ask()


# Two proxies in a row of two images, one in a row of one, none where there is none; a mean offset behind them.
REPAIRS_IN_TURN = Schedule.from_decisions(
    (1, 2, 4),
    (0.25, 0.5, 6),
    LAYERS,
    ("reroute", "reroute", "delete"),
    score=("last_token", "hidden_change", "hidden_change"),
    repair=("proxy_offset", "mean_offset", None),
)


def test_rows_of_two_one_and_no_image():
    torch_model, model = pair(2)
    schedule, pixels = REPAIRS_IN_TURN, random_pixels(3, seed=5)
    rows = [
        random_ids(110, visual=72, start=9, seed=1),
        random_ids(70, start=0, seed=2),
        random_ids(30, start=None, seed=3),
    ]
    ids, mask = padded(rows)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    result = model.prefill(**given, schedule=schedule, trace=True)
    tokens = model.generate_ids(**given, schedule=schedule, max_new_tokens=5)
    for row, images in enumerate((pixels[:2], pixels[2:], None)):
        wanted = run(torch_model, rows[row], images, schedule, max_new_tokens=5)
        np.testing.assert_allclose(result.logits[row], wanted.logits, atol=1e-4)
        np.testing.assert_array_equal(result.trace.kv_tokens[row], [len(ran) for ran in wanted.ran])
        for number, decision in enumerate(wanted.decisions):
            found = result.trace.selected[number][row]
            np.testing.assert_array_equal(found[found >= 0], decision.selected)
        np.testing.assert_array_equal(tokens[row], wanted.tokens)
    assert result.trace.kv_tokens[:, 1].tolist() == [38 + 18 + 2, 34 + 9 + 1, 30]
