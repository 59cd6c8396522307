"""The functional door under other people's jit, grad and vmap."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reroute_jax
from reroute_jax.nn.params import named_parameters
from reroute_jax.routing.plan import Schedule
from tests.checkpoints import smallest
from tests.marks import cases
from tests.tiny import random_ids, random_pixels


def batch_of(model, schedule=None, rows=2):
    ids = np.stack([random_ids(60, seed=seed) for seed in range(rows)])
    return model.inputs(input_ids=ids, pixel_values=random_pixels(rows), schedule=schedule)


@pytest.mark.parametrize("action", cases(["delete", "reroute"], {"delete"}))
def test_logits_of_all_rows_that_ran_under_an_outer_jit(action):
    """The last of each row are those of `prefill`; slots say where rows stood, selected ones and all text."""
    model, schedule = smallest(), Schedule.from_decisions((0, 1), (0.5, 0.25), 2, action)
    batch = batch_of(model, schedule)
    run = jax.jit(reroute_jax.apply, static_argnums=2)
    out = run(model.module, batch.prompt, batch.plan, batch.images)
    ids = np.stack([random_ids(60, seed=seed) for seed in range(2)])
    expected = model.prefill(input_ids=ids, pixel_values=random_pixels(2), schedule=schedule, trace=True)
    last = np.asarray(out.valid).sum(axis=1) - 1
    np.testing.assert_allclose(np.asarray(out.logits)[[0, 1], last], expected.logits, atol=1e-4)
    for row in range(2):
        slots = np.asarray(out.slots)[row][np.asarray(out.valid)[row]]
        image = np.flatnonzero(ids[row] == model.config.image_token)
        text = np.flatnonzero(ids[row] != model.config.image_token)
        wanted = np.sort([*text, *image[expected.trace.selected[-1][row]]])
        np.testing.assert_array_equal(slots, wanted)
        assert (np.asarray(out.slots)[row][len(slots) :] == -1).all()


def test_gradients_of_a_loss_under_routing():
    """A finite difference along one direction of one parameter agrees with the gradient."""
    model, schedule = smallest(), Schedule.from_decisions((1,), (0.5,), 2)
    batch = batch_of(model, schedule, rows=1)
    labels = jnp.asarray(batch.prompt.ids)

    def loss(params):
        out = reroute_jax.apply(params, batch.prompt, batch.plan, batch.images)
        after = jnp.take_along_axis(labels, jnp.minimum(out.slots + 1, labels.shape[1] - 1), axis=1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits), after[..., None], axis=-1)[..., 0]
        return -jnp.where(out.valid, chosen, 0).sum() / out.valid.sum()

    learn = jax.jit(jax.value_and_grad(loss))
    value, gradient = learn(model.module)
    assert np.isfinite(value)
    direction = gradient.decoder.norm.scale[...]
    step = 1e-2 / float(jnp.linalg.norm(direction))

    def moved(sign):
        module = jax.tree.map(lambda x: x, model.module)
        module.decoder.norm.scale[...] = module.decoder.norm.scale[...] + sign * step * direction
        return float(learn(module)[0])

    expected = float(jnp.vdot(direction, direction))
    assert (moved(1) - moved(-1)) / (2 * step) == pytest.approx(expected, rel=2e-2)


def test_vmap_over_how_much_a_decision_keeps():
    """Every count up to the plan's, in one program: each equals a schedule of that count."""
    model, counts = smallest(), (17, 24)  # of one limit, so that the schedules share a program
    batch = batch_of(model, Schedule.from_decisions((1,), (24,), 2), rows=1)

    def last(keep):
        out = reroute_jax.apply(model.module, replace(batch.prompt, keep=keep), batch.plan, batch.images)
        return jnp.take_along_axis(out.logits, (out.valid.sum(axis=1) - 1)[:, None, None], axis=1)[:, 0]

    found = jax.jit(jax.vmap(last))(jnp.array(counts, jnp.int32)[:, None, None])
    for logits, count in zip(found, counts, strict=True):
        ids, pixels = random_ids(60)[None], random_pixels(1)
        schedule = Schedule.from_decisions((1,), (count,), 2)
        np.testing.assert_allclose(
            logits, model.prefill(input_ids=ids, pixel_values=pixels, schedule=schedule).logits, atol=1e-4
        )


def test_parameters_are_made_and_described_alike():
    model = smallest()
    made = named_parameters(nnx.eval_shape(partial(reroute_jax.init, model.config), jax.random.key(1)))
    described = named_parameters(reroute_jax.abstract_params(model.config))
    loaded = named_parameters(model.module)
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in described.items()}
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in loaded.items()}


def test_the_package_offers_a_clean_list():
    assert all(hasattr(reroute_jax, name) for name in reroute_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        reroute_jax.nothing  # noqa: B018


def test_a_description_is_the_callers_own():
    """It is made once a configuration: filling one in changes no other."""
    config = smallest().config
    reroute_jax.abstract_params(config).decoder.norm.scale.set_value(jnp.zeros(3))
    assert reroute_jax.abstract_params(config).decoder.norm.scale.shape == (config.decoder.hidden_size,)
