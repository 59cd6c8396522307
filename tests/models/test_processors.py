"""Image processors whose files were changed: refused where they no longer fit config.json."""

import json
import shutil

import pytest

from reroute_jax.engine.side_files import SideFiles
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES
from tests.checkpoints import qwen_pair, small

WRONG = [
    ("llava", {"crop_size": {"height": 48, "width": 48}}, "crop_size"),
    ("llava", {"do_center_crop": False}, "do_center_crop"),
    ("llava", {"image_mean": [0.5, 0.5]}, "image_mean"),
    ("llava", {"size": {"shortest_edge": "336"}}, "size is .* expected pixels of the shortest edge"),
    ("llava", {"size": {"shortest_edge": 10**9}}, "size is .* expected pixels of the shortest edge"),
    ("llava", {"resample": 9}, "resample is 9, expected 0 to 5"),
    ("llava", {"rescale_factor": "1/255"}, "rescale_factor is '1/255', expected a number above 0"),
    ("qwen2_5_vl", {"rescale_factor": None}, "rescale_factor is None"),
    ("qwen2_5_vl", {"merge_size": 1}, "merge_size"),
    ("qwen2_5_vl", {"patch_size": 14}, "patch_size"),
    ("qwen2_5_vl", {"temporal_patch_size": 1}, "temporal_patch_size"),
    ("qwen2_5_vl", {"do_resize": False}, "do_resize"),
    ("qwen2_5_vl", {"image_std": [0.5, 0.5, 0]}, "image_std"),
    ("qwen2_5_vl", {"size": {"shortest_edge": 5000, "longest_edge": 500}}, "min_pixels 5000 above max_pixels 500"),
]


@pytest.mark.parametrize(("family", "changed", "message"), WRONG, ids=str)
def test_a_processor_that_does_not_fit_is_refused(family, changed, message, tmp_path):
    model = small() if family == "llava" else qwen_pair()[1]
    shutil.copytree(model.folder, tmp_path / "copy")
    nested = tmp_path / "copy" / "processor_config.json"
    file = nested if nested.exists() else tmp_path / "copy" / "preprocessor_config.json"
    stored = json.loads(file.read_text())
    (stored["image_processor"] if file == nested else stored).update(changed)
    file.write_text(json.dumps(stored))
    with pytest.raises(RerouteError, match=message) as caught:
        FAMILIES[family].image_processor(tmp_path / "copy", model.config)
    assert "\n" not in str(caught.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", POINTER),
        ("tokenizer.json", '{"version": "1.0", "model": null}'),
        ("tokenizer_config.json", '{"tokenizer_class": 0}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "long"}'),
        (
            "processor_config.json",
            '{"image_processor": {"image_processor_type": "CLIPImageProcessor", "crop_size": []}}',
        ),
    ],
    ids=["a pointer of Git LFS", "no model", "no class", "no length", "no size"],
)
def test_damaged_files_are_one_line_that_names_the_folder(file, content, tmp_path):
    model = small()
    shutil.copytree(model.folder, tmp_path / "copy")
    (tmp_path / "copy" / file).write_text(content)
    files = SideFiles(tmp_path / "copy", model.config)
    with pytest.raises(
        RerouteError, match="copy lacks tokenizer or image processor files, or has damaged ones"
    ) as found:
        _ = files.image_processor if file.startswith("processor") else files.tokenizer
    assert "\n" not in str(found.value)
