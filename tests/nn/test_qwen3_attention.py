"""What Qwen3's decoder does to queries and keys: norms before the rotation, interleaved positions. Vectors of the
specification and transformers' own table."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from reroute_jax.config import DecoderConfig
from reroute_jax.nn.attention import query_probabilities
from reroute_jax.nn.layers import Attention, rotate
from reroute_jax.nn.positions import interleaved_channels, rope_tables

CONFIG = DecoderConfig(
    vocab_size=1,
    hidden_size=2,
    mlp_dim=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    rope_theta=100.0,
    norm_eps=1e-6,
    qkv_bias=False,
    rope_sections=(1, 1, 0),
    tied_head=True,
    rope_interleaved=True,
    qk_norm=True,
)


@pytest.mark.parametrize(
    ("sections", "pairs", "turned_by"),
    [
        ((24, 20, 20), 64, "thw" * 20 + "tttt"),
        ((4, 2, 2), 8, "thwthwtt"),
        ((3, 3, 2), 8, "thwthwth"),
        ((2, 3, 3), 8, "thwthwth"),
    ],
)
def test_interleaved_channels(sections, pairs, turned_by):
    assert "".join("thw"[channel] for channel in interleaved_channels(sections, pairs)) == turned_by


@pytest.mark.parametrize("sections", [(24, 20, 20), (20, 20, 24), (64, 0, 0), (4, 50, 10)])
def test_rotary_tables_are_those_of_transformers(sections):
    theirs = Qwen3VLTextConfig(
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(sections)},
    )
    positions = np.random.default_rng(0).integers(0, 400, (3, 2, 9))
    expected = Qwen3VLTextRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions))
    found = rope_tables(positions, replace(CONFIG, head_dim=128, rope_theta=5e6, rope_sections=sections))
    for ours, table in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, table[..., :64], atol=2e-5)


def test_queries_and_keys_are_normed_and_then_rotated():
    attention = nnx.eval_shape(lambda: Attention(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))
    given = (
        (attention.q.kernel, [[[1, 0], [0, 1], [1, 1], [1, -1]]]),
        (attention.k.kernel, [[[0, 1], [1, 0], [1, -1], [1, 1]]]),
        (attention.q_norm.scale, [1, 2, 1, 0.5]),
        (attention.k_norm.scale, [2, 1, 1, 1]),
    )
    for parameter, values in given:
        parameter.set_value(jnp.array(values, jnp.float32))
    positions = np.array([[[0, 1, 1, 3]], [[0, 1, 2, 3]], [[9, 9, 9, 9]]])

    @jax.jit
    def probabilities(x):
        rope = rope_tables(positions, CONFIG)
        q, k = rotate(attention.queries(x), rope), rotate(attention.keys(x), rope)
        return query_probabilities(q[:, :, -1:], k, jnp.ones((1, 1, 4), bool))

    found = np.asarray(probabilities(np.float32([[[1, 0], [0, 1], [1, 2], [2, 1]]])))
    np.testing.assert_allclose(found[0, 0, 0], [0.155622, 0.019614, 0.035421, 0.789343], atol=2e-6)
