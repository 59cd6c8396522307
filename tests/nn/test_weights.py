"""What compiled programs are handed: as the module, walked in a moment, and compiled for once."""

import jax
import numpy as np

from reroute_jax.nn.params import named_parameters
from reroute_jax.nn.weights import Weights
from tests.checkpoints import smallest


def test_the_module_comes_back_with_every_parameter():
    module = smallest().module
    back = Weights.of(module).module
    before, after = named_parameters(module), named_parameters(back)
    assert before.keys() == after.keys()
    assert all(before[path] is after[path] for path in before)


def test_programs_know_weights_of_the_same_structure_again():
    module = smallest().module
    traced = []

    @jax.jit
    def norm(weights: Weights) -> jax.Array:
        traced.append(weights.structure)
        return weights.module.norm.scale.sum()

    doubled = jax.tree.map(lambda x: 2 * x, Weights.of(module).decoder)
    one, two = norm(Weights.of(module).decoder), norm(doubled)
    assert len(traced) == 1
    np.testing.assert_allclose(two, 2 * one)


def test_what_jax_walks_at_a_call_is_the_arrays_alone():
    module = smallest().module
    weights = Weights.of(module)
    assert jax.tree.structure(weights).num_nodes == len(weights.arrays) + 2
    assert jax.tree.structure(module).num_nodes > 2 * len(weights.arrays)
