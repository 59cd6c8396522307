import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from reroute_jax.errors import RerouteError
from reroute_jax.nn.mrope import mrope_positions

IMAGE, TEXT = 7, 1


class Reference:
    """transformers' position code without a model around it."""

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids
    config = Qwen2_5_VLConfig()

    def positions(self, ids: np.ndarray, grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
        merge = self.config.vision_config.spatial_merge_size
        thw = torch.tensor([(1, merge * rows, merge * cols) for rows, cols in grids]) if grids else None
        row = torch.tensor(ids)[None]
        positions, delta = self.get_rope_index(row, (row == IMAGE).int(), image_grid_thw=thw)
        return positions[:, 0].numpy(), int(delta) + len(ids)


def prompt(texts: list[int], grids: list[tuple[int, int]]) -> np.ndarray:
    """Ids: texts[0] text tokens, image 0, texts[1] text tokens, image 1, ..."""
    ids = [TEXT] * texts[0]
    for length, (rows, cols) in zip(texts[1:], grids, strict=True):
        ids += [IMAGE] * (rows * cols) + [TEXT] * length
    return np.array(ids, np.int32)


def case(seed: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    rng = np.random.default_rng(seed)
    grids = [tuple(map(int, rng.integers(1, 24, 2))) for _ in range(seed % 4)]
    return prompt(rng.integers(1, 40, len(grids) + 1).tolist(), grids), grids


@pytest.mark.parametrize("seed", range(24))
def test_exactly_those_of_transformers(seed: int) -> None:
    ids, grids = case(seed)
    expected, following = Reference().positions(ids, grids)
    found, following_found = mrope_positions(ids, IMAGE, grids)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert following_found == following


def test_a_prompt_that_ends_or_begins_with_an_image() -> None:
    for texts in ([0, 3], [3, 0], [0, 0]):
        ids = prompt(texts, [(3, 5)])
        expected, following = Reference().positions(ids, [(3, 5)])
        found, following_found = mrope_positions(ids, IMAGE, [(3, 5)])
        np.testing.assert_array_equal(found, expected)
        assert following_found == following


def test_worked_numbers() -> None:
    found, following = mrope_positions(prompt([2, 1], [(2, 3)]), IMAGE, [(2, 3)])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_adjacent_images_are_told_apart_by_their_grids() -> None:
    """transformers takes adjacent images for one; the rule itself does not need a token between them."""
    found, following = mrope_positions(prompt([1, 0, 1], [(1, 2), (2, 1)]), IMAGE, [(1, 2), (2, 1)])
    assert found.tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]
    assert following == 6


def test_text_only() -> None:
    found, following = mrope_positions(prompt([5], []), IMAGE, [])
    assert found.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert following == 5


def test_compat_scales_the_temporal_channel_of_images_alone() -> None:
    """Image at 2 (rate 4: temporal 8), text from 5 on, second image at 7 (temporal 28): the next token follows 28."""
    ids, grids = prompt([2, 2, 1], [(2, 3), (1, 1)]), [(2, 3), (1, 1)]
    right, following = mrope_positions(ids, IMAGE, grids)
    found, following_found = mrope_positions(ids, IMAGE, grids, compat="hf-5.4", temporal_rate=4)
    assert found[0].tolist() == [0, 1, 8, 8, 8, 8, 8, 8, 5, 6, 28, 8]
    np.testing.assert_array_equal(found[1:], right[1:])
    assert (following, following_found) == (9, 29)


def test_compat_keeps_the_next_position_where_text_reaches_further() -> None:
    """The hub's 7B model has 2 temporal positions a second: 15 tokens of template, an image, and a question."""
    ids = prompt([15, 40], [(14, 19)])
    found, following = mrope_positions(ids, IMAGE, [(14, 19)], compat="hf-5.4", temporal_rate=2)
    assert set(found[0][ids == IMAGE].tolist()) == {30}
    assert following == mrope_positions(ids, IMAGE, [(14, 19)])[1] == 15 + 19 + 40


def test_unknown_compat_is_refused() -> None:
    with pytest.raises(RerouteError, match=r"mrope_compat is 'hf-5\.5', expected None or one of: hf-5\.4"):
        mrope_positions(prompt([2], []), IMAGE, [], compat="hf-5.5", temporal_rate=2)
    with pytest.raises(RerouteError, match="needs tokens_per_second"):
        mrope_positions(prompt([2], []), IMAGE, [], compat="hf-5.4")


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(2, 3), (2, 3), (1, 1)], "there are 3 images and the prompt has image tokens for 2 only"),
        ([(2, 3)], r"the prompt has 12 image tokens and the grids of its images \(1\) need 6"),
        ([], r"the prompt has 12 image tokens and the grids of its images \(0\) need 0"),
        ([(2, 4), (2, 2)], "image 1 has a grid of 2 x 4 = 8 visual tokens, but only 6 image tokens stand together"),
        ([(2, 3), (2, 4)], "image 2 has a grid of 2 x 4 = 8 visual tokens, but only 6 image tokens stand together"),
        ([(2, 2), (2, 4)], "image 2 has a grid of 2 x 4 = 8 visual tokens, but only 2 image tokens stand together"),
    ],
)
def test_grids_that_do_not_match_the_prompt_are_refused(grids: list, expected: str) -> None:
    ids = prompt([2, 1, 1], [(2, 3), (2, 3)])
    with pytest.raises(RerouteError, match=expected) as found:
        mrope_positions(ids, IMAGE, grids)
    assert "\n" not in str(found.value)
