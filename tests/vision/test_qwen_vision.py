"""The tower of Qwen2.5-VL against transformers' torch tower, fp32, and Nuwa's inputs against the specification."""

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_window_index

from reroute_jax.buckets import VISUAL_BUCKETS
from reroute_jax.errors import RerouteError
from reroute_jax.nn.params import named_parameters, with_parameters
from reroute_jax.vision.qwen2_5 import QwenImages, QwenTower
from reroute_jax.vision.qwen_config import QwenVisionConfig
from reroute_jax.vision.qwen_windows import pack

WIDTH, HEADS, LAYERS, OUT = 32, 2, 5, 24
CONFIG = QwenVisionConfig(
    hidden_size=WIDTH,
    mlp_dim=44,
    num_layers=LAYERS,
    num_heads=HEADS,
    patch_size=2,
    temporal_patch_size=2,
    merge=2,
    window=8,
    full_attention=(1, 4),
)
# Rows and columns of merged tokens; the window is 4x4. Divisible and not, one row, one column, one token.
GRIDS = ((3, 5), (1, 7), (5, 4), (9, 6), (8, 4), (6, 1), (1, 1))

torch.set_num_threads(1)


class Read(NamedTuple):
    metric: jax.Array
    features: jax.Array
    similarity: jax.Array


def nuwa_inputs(tower, pixels, order="raster"):
    read = QwenImages(tower, pixels)
    return Read(read.metric(), read.features(), read.similarity(order))


compiled = jax.jit(nuwa_inputs, static_argnames="order")


def nuwa(*given, order: str) -> Read:
    return jax.device_get(compiled(*given, order=order))


@cache
def torch_tower() -> Qwen2_5_VisionTransformerPretrainedModel:
    """Weights that make attention peaked (0.22 on the first of 216 patches), so that a wrong scale, rotation or mask
    shows, and that leave torch's own fp32 error at 2e-6."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=CONFIG.mlp_dim,
        num_heads=HEADS,
        patch_size=CONFIG.patch_size,
        window_size=CONFIG.window * CONFIG.patch_size,
        out_hidden_size=OUT,
        fullatt_block_indexes=list(CONFIG.full_attention),
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    with torch.no_grad():
        for name, value in tower.named_parameters():
            if "norm" in name or "ln_q" in name:
                value.normal_(1.0, 0.1)
            else:
                value.normal_(0.0, 0.3 if "qkv" in name or "patch" in name else 0.1)
    return tower


@cache
def tower() -> QwenTower:
    """Ours, with the same weights."""
    empty = nnx.eval_shape(lambda: QwenTower(CONFIG, OUT, rngs=nnx.Rngs(0), dtype=jnp.float32))
    theirs = {name: value.detach().numpy() for name, value in torch_tower().named_parameters()}
    shapes = {name: value.shape for name, value in named_parameters(empty).items()}
    values = {"patch_embed.kernel": theirs["patch_embed.proj.weight"].reshape(WIDTH, -1)}
    renamed = {"merger.norm": "merger.ln_q", "merger.fc1": "merger.mlp.0", "merger.fc2": "merger.mlp.2"}
    for i in range(LAYERS):
        renamed |= {f"layers.{i}.{norm}": f"blocks.{i}.{norm}" for norm in ("norm1", "norm2")}
        renamed |= {f"layers.{i}.mlp.{part}": f"blocks.{i}.mlp.{part}_proj" for part in ("gate", "up", "down")}
        renamed |= {f"layers.{i}.attn.qkv": f"blocks.{i}.attn.qkv", f"layers.{i}.attn.o": f"blocks.{i}.attn.proj"}
    for ours, hf in renamed.items():
        for leaf in ("kernel", "bias", "scale"):
            if f"{ours}.{leaf}" in shapes:
                value = theirs[f"{hf}.bias" if leaf == "bias" else f"{hf}.weight"]
                values[f"{ours}.{leaf}"] = value.reshape(shapes[f"{ours}.{leaf}"])
    return with_parameters(empty, {name: jnp.asarray(value) for name, value in values.items()})


def random_patches(grids, seed: int = 0) -> np.ndarray:
    rows = CONFIG.merge**2 * sum(rows * cols for rows, cols in grids)
    return np.random.default_rng(seed).standard_normal((rows, CONFIG.patch_values)).astype(np.float32)


def per_image(rows: np.ndarray, grids, group: int = 1) -> list[np.ndarray]:
    """Cut rows of a whole batch into images; `group` rows a merged token."""
    return np.split(rows, np.cumsum([group * r * c for r, c in grids])[:-1])


def close(found, expected, atol: float = 1e-5) -> None:
    """Within `atol` of the expected values' RMS, if that is above 1."""
    scale = max(1.0, float(np.sqrt(np.mean(np.square(expected)))))
    np.testing.assert_allclose(found, expected, atol=atol * scale, rtol=0)


def run_torch(patches: np.ndarray, grids):
    """Features; and in window order the states after each block, what the last block's attention reads (input, rotary
    tables), and the tokens themselves."""
    model, read, states = torch_tower(), {}, []
    merge = CONFIG.merge
    thw = torch.tensor([[1, merge * rows, merge * cols] for rows, cols in grids])

    def note(_, args, kwargs):
        read.update(normed=args[0], rope=kwargs["position_embeddings"])

    hooks = [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in model.blocks]
    hooks.append(model.blocks[-1].attn.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        features = model(torch.from_numpy(patches), grid_thw=thw).pooler_output
    for hook in hooks:
        hook.remove()
    order, _ = get_vision_window_index(thw, merge, model.window_size, model.patch_size)
    return features.numpy(), states, read, order


def nuwa_by_torch(patches: np.ndarray, grid):
    """The specification's words for one image: column sums of explicit attention, and the mean of the middle blocks
    merged, in raster order and in window order."""
    _, states, read, order = run_torch(patches, [grid])
    model, rev, dim = torch_tower(), torch.argsort(order), WIDTH // HEADS
    cos, sin = (table[:, None] for table in read["rope"])
    with torch.no_grad():
        q, k, _ = model.blocks[-1].attn.qkv(read["normed"]).reshape(-1, 3, HEADS, dim).unbind(1)
        q, k = (x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin for x in (q, k))
        received = torch.einsum("qnh,knh->nqk", q, k).div(dim**0.5).softmax(-1).mean(0).sum(0)
        # Five blocks: 7 * 5 // 32 = 1 to 23 * 5 // 32 = 3.
        similarity = model.merger(torch.stack(states[1:4]).mean(0))
    return received.reshape(-1, 4).mean(1)[rev].numpy(), similarity[rev].numpy(), similarity.numpy()


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    return random_patches(GRIDS)


@pytest.fixture
def pixels(patches):
    return pack(patches, GRIDS, CONFIG, images=8)


def test_features_and_states_match_torch(patches, pixels):
    features, states, _, order = run_torch(patches, GRIDS)
    run = jax.jit(lambda model, x: (model.features(x), model.states(x)))
    found, ours = jax.device_get(run(tower(), pixels))
    for image, expected in enumerate(per_image(features, GRIDS)):
        close(found[image, : len(expected)], expected)
    for layer, state in enumerate(states, 1):  # 0 is the first one's input
        raster = state.reshape(-1, 4, WIDTH)[torch.argsort(order)].reshape(-1, WIDTH).numpy()
        for image, expected in enumerate(per_image(raster, GRIDS, 4)):
            close(ours[layer][image, : len(expected)], expected)


@pytest.mark.parametrize("order", ["raster", "window"])
def test_nuwa_inputs_match_the_specification(patches, pixels, order):
    found = nuwa(tower(), pixels, order=order)
    assert found.metric.dtype == jnp.float32
    differ = 0
    for image, (part, grid) in enumerate(zip(per_image(patches, GRIDS, 4), GRIDS, strict=True)):
        metric, raster, window = nuwa_by_torch(part, grid)
        tokens = len(metric)
        close(found.metric[image, :tokens], metric)
        np.testing.assert_array_equal(found.metric[image, tokens:], 0)
        close(found.features[image, :tokens], run_torch(part, [grid])[0])
        close(found.similarity[image, :tokens], raster if order == "raster" else window)
        differ += not np.array_equal(raster, window)
    # The orders are the same where windows stand in one column, or the image is one row.
    assert differ == sum(rows > 1 and cols > 4 for rows, cols in GRIDS)


def test_nuwa_refuses_windows_in_the_last_layer_and_unknown_orders():
    config = replace(CONFIG, full_attention=(1, 3))
    windowed = nnx.eval_shape(lambda: QwenTower(config, OUT, rngs=nnx.Rngs(0), dtype=jnp.float32))
    pixels = pack(random_patches([(2, 2)]), [(2, 2)], config, 1)
    with pytest.raises(RerouteError, match="layer 4 of the vision tower"):
        jax.eval_shape(nuwa_inputs, windowed, pixels)
    with pytest.raises(RerouteError, match="unknown order 'columns'"):
        nuwa(tower(), pixels, order="columns")


def test_an_image_does_not_depend_on_companions_bucket_or_padding(patches, pixels):
    together = nuwa(tower(), pixels, order="raster")
    # Padding may hold anything.
    pixels.patches[np.arange(pixels.patches.shape[1]) >= pixels.count[:, None]] = 1e3
    with_garbage = nuwa(tower(), pixels, order="raster")
    assert all(np.isfinite(value).all() for value in with_garbage)
    parts = per_image(patches, GRIDS, 4)
    for image in (1, 3):
        tokens = len(parts[image]) // 4
        alone = nuwa(tower(), pack(parts[image], [GRIDS[image]], CONFIG, 1), order="raster")
        for whole, garbage, single in zip(together, with_garbage, alone, strict=True):
            close(whole[image, :tokens], single[0, :tokens])
            close(garbage[image, :tokens], single[0, :tokens])


def test_gradients_are_finite_and_padding_has_none(pixels):
    real = np.arange(pixels.patches.shape[1]) < pixels.count[:, None]
    graph, weights = nnx.split(tower())

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(weights, values):
        features = nnx.merge(graph, weights).features(replace(pixels, patches=values))
        return jnp.where(real[:, ::4, None], features, 0).var()

    for_weights, for_patches = gradients(weights, jnp.asarray(pixels.patches))
    for leaf in (*jax.tree.leaves(for_weights), for_patches):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    assert not np.asarray(for_patches)[~real].any()


def test_bf16(pixels):
    """The type runs through, and the result is the fp32 one within bf16's rounding."""
    graph, weights = nnx.split(tower())
    half = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), weights))
    found, expected = nuwa(half, pixels, order="raster"), nuwa(tower(), pixels, order="raster")
    assert [value.dtype for value in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for low, high in zip(found, expected, strict=True):
        error = np.asarray(low, np.float32)[0, :15] - high[0, :15]
        assert np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(high[0, :15] ** 2))


@pytest.mark.parametrize("grid", [(1, 1), (4, 8), (5, 9), (1, 13)])
def test_windows_hold_every_patch_once_at_its_slot(grid):
    """Windows by looking: the patches of each 8x8 block of the image, in the processor's order."""
    packed = pack(random_patches([grid]), [grid], CONFIG, 2)
    count, empty = 4 * grid[0] * grid[1], packed.patches.shape[1]
    cells = packed.place[0, :count] // CONFIG.window
    blocks = [[p for p in range(count) if (*cells[p],) == cell] for cell in sorted({(*cell,) for cell in cells})]
    filled = [[p for p in window if p != empty] for window in packed.windows[0].tolist()]
    assert [window for window in filled if window] == blocks
    np.testing.assert_array_equal(packed.windows[0].reshape(-1)[packed.slot[0, :count]], np.arange(count))
    assert (packed.slot[0, count:] == packed.windows[0].size).all() and (packed.windows[1] == empty).all()


@pytest.mark.parametrize(("grid", "windows"), [((24, 24), 45), ((33, 17), 45), ((12, 48), 45), ((576, 1), 144)])
def test_only_thin_images_pay_for_the_most_windows(grid, windows):
    assert pack(random_patches([grid]), [grid], CONFIG, 1).windows.shape == (1, windows, CONFIG.window**2)


@pytest.mark.parametrize(
    ("grids", "images", "rows", "message"),
    [
        ([(2, 2), (2, 3)], 1, 40, "2 images do not fit a batch padded to 1"),
        ([(0, 3)], 1, 0, "grid of 0x3"),
        ([(2, 2)], 1, 12, r"pixel_values have shape \[12, 24\]: expected \[16, 24\]"),
        ([(200, 200)], 1, 160_000, "16384"),
    ],
)
def test_what_does_not_fit_is_refused(grids, images, rows, message):
    with pytest.raises(RerouteError, match=message):
        pack(np.zeros((rows, CONFIG.patch_values), np.float32), grids, CONFIG, images)


def test_200_image_sizes_compile_at_most_twice_a_bucket():
    """A trace is a compilation. Images between 200704 and 451584 pixels have 256 to 576 tokens."""
    config = replace(CONFIG, num_layers=1, full_attention=())
    model = nnx.eval_shape(lambda: QwenTower(config, OUT, rngs=nnx.Rngs(0), dtype=jnp.float32))
    traced = []

    @jax.jit
    def features(model, pixels):
        traced.append((pixels.patches.shape, pixels.windows.shape))
        return model.features(pixels)

    for height, width in np.random.default_rng(0).integers(28, 1001, (200, 2)):
        tall, wide = smart_resize(int(height), int(width), 28, min_pixels=200_704, max_pixels=451_584)
        grid = (tall // 28, wide // 28)
        zeros = np.zeros((4 * grid[0] * grid[1], config.patch_values), np.float32)
        jax.eval_shape(features, model, pack(zeros, [grid], config, 1))
    assert len(traced) == len(set(traced)) <= 2 * sum(256 <= size <= 576 for size in VISUAL_BUCKETS)
