"""What lies in a checkpoint's folder beside its parameters: nothing is dropped or passed over without comparing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reroute_jax
from convert import __main__ as cli
from convert.opening import open_checkpoint
from reroute_jax.errors import RerouteError
from tests import tiny, tiny_qwen
from tests.marks import cases

ROOT = Path(__file__).parents[2]
HEADS = {"llava": "language_model.lm_head.weight", "qwen": "lm_head.weight"}
EMBEDDINGS = {"llava": "language_model.model.embed_tokens.weight", "qwen": "model.embed_tokens.weight"}


def write(family, folder, **options):
    if family == "llava":
        return tiny.tiny_llava(folder, kv_heads=2, layers=2, vision_layers=2, **options)
    return tiny_qwen.tiny_qwen(folder, layers=2, vision_layers=3, **options)


def load_torch(family, folder):
    return (tiny if family == "llava" else tiny_qwen).load_torch(folder)


def edit(folder, change):
    """`change(tensors)` in place, in the only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(folder, file, change):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


IDS = np.random.default_rng(0).integers(10, 90, size=(1, 12))


def assert_logits_equal_torch(family, folder, model=None):
    with torch.no_grad():
        expected = load_torch(family, folder)(input_ids=torch.tensor(IDS)).logits[:, -1].numpy()
    found = (model or reroute_jax.load(folder, "float32")).prefill(input_ids=IDS).logits
    np.testing.assert_allclose(found, expected, atol=2e-5)  # of logits up to 10 in fp32, summed in other orders
    return found


@pytest.fixture
def llava(tmp_path):
    return write("llava", tmp_path / "llava")


# Tied heads


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("change", cases(["one number", "all"], {"all"}))
def test_a_head_of_its_own_beats_the_flag(tmp_path, family, change):
    folder = write(family, tmp_path / "hf", tied=True)
    tied = reroute_jax.load(folder, "float32").prefill(input_ids=IDS).logits

    def own_head(tensors):
        head = tensors[EMBEDDINGS[family]].clone()
        head[3, 5] += 0.5
        tensors[HEADS[family]] = head if change == "one number" else torch.randn_like(head)

    edit(folder, own_head)
    found = assert_logits_equal_torch(family, folder)
    assert np.abs(found - tied).max() > 1e-3
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0
    assert_logits_equal_torch(family, folder, reroute_jax.load(tmp_path / "out"))


@pytest.mark.parametrize("family", HEADS)
def test_an_equal_copy_of_the_embeddings_is_dropped(tmp_path, family):
    folder = write(family, tmp_path / "hf", tied=True)
    edit(folder, lambda tensors: tensors.update({HEADS[family]: tensors[EMBEDDINGS[family]].clone()}))
    assert open_checkpoint(folder)[1].decoder.tied_head
    assert_logits_equal_torch(family, folder)


@pytest.mark.parametrize("family", HEADS)
def test_a_tied_head_stands_for_embeddings_that_are_not_there(tmp_path, family):
    folder = write(family, tmp_path / "hf", tied=True)
    edit(folder, lambda tensors: tensors.update({HEADS[family]: tensors.pop(EMBEDDINGS[family])}))
    assert_logits_equal_torch(family, folder)


@pytest.mark.parametrize("family", HEADS)
def test_an_untied_config_without_a_head_is_refused(tmp_path, family):
    folder = write(family, tmp_path / "hf", tied=True)
    edit_json(folder, "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(RerouteError, match=rf"1 missing\n  missing: {HEADS[family]}"):
        reroute_jax.load(folder)


# Buffers


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llava", "vision_tower.vision_model.embeddings.position_ids", torch.arange(37)[None]),
        ("llava", "language_model.model.layers.1.self_attn.rotary_emb.inv_freq", 1e4 ** -(torch.arange(0, 16, 2) / 16)),
        ("qwen", "model.rotary_emb.inv_freq", 1e6 ** -(torch.arange(0, 16, 2) / 16)),
        ("qwen", "visual.rotary_pos_emb.inv_freq", 1e4 ** -(torch.arange(0, 6, 2) / 6)),
    ],
)
def test_computed_buffers_are_compared(tmp_path, family, key, value):
    folder = write(family, tmp_path / "hf")
    edit(folder, lambda tensors: tensors.update({key: value}))
    assert_logits_equal_torch(family, folder)
    other = value.flip(-1).contiguous()
    edit(folder, lambda tensors: tensors.update({key: other}))
    with pytest.raises(RerouteError, match=f"{key} differs from what config.json makes of it"):
        reroute_jax.load(folder)


# Files beside


def index_of(folder, *files):
    names = {key: name for name in files for key in load_file(folder / name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def beside(name):
    return lambda folder: shutil.copy(next(folder.glob("*-00001-of-*")), folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (beside("model.safetensors"), "holds the shards of model.safetensors.index.json and beside it model.safe"),
        (beside("consolidated.safetensors"), "and beside it consolidated.safetensors"),
        (beside("model-00003-of-00003.safetensors"), "beside it model-00003-of-00003.safetensors"),
        (
            lambda folder: shutil.copy(folder / "model.safetensors.index.json", folder / "a.safetensors.index.json"),
            "a.safetensors.index.json and beside it model.safetensors.index.json",
        ),
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "names 1 of 2 shards that are not"),
        (
            lambda folder: edit_json(folder, "model.safetensors.index.json", lambda i: i["weight_map"].popitem()),
            "leaves out 1 tensors that its shards hold",
        ),
    ],
)
def test_two_sets_of_weights_are_refused(tmp_path, damage, message):
    folder = write("llava", tmp_path / "hf", shards=2)
    reroute_jax.load(folder)
    damage(folder)
    with pytest.raises(RerouteError) as error:
        reroute_jax.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (beside("model.safetensors"), "holds model-00001-of-00002.safetensors and beside it model.safetensors"),
        (beside("model-00001-of-00005.safetensors"), "and beside it model-00001-of-00005.safetensors"),
        (
            lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
            "lacks 1 of 2 shards .first: model-00001-of-00002.safetensors",
        ),
    ],
)
def test_shards_without_an_index_are_one_whole_set(tmp_path, damage, message):
    folder = write("llava", tmp_path / "hf", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    reroute_jax.load(folder)
    damage(folder)
    with pytest.raises(RerouteError, match=message):
        reroute_jax.load(folder)


# Not weights of ours


def place(file, content=b"x"):
    return lambda folder: (folder / file).write_bytes(content)


def rename(to):
    return lambda folder: (folder / "model.safetensors").rename(folder / to)


def with_config(**entries):
    return lambda folder: edit_json(folder, "config.json", lambda config: config.update(entries))


def with_tensor(key, value):
    return lambda folder: edit(folder, lambda tensors: tensors.update({key: value}))


LORA = json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"}).encode()
LINEAR = "language_model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (place("adapter_config.json", LORA), "holds an adapter of owner/base (adapter_config.json): merge it"),
        (place("adapter_model.safetensors"), "holds an adapter (adapter_model.safetensors): merge it"),
        (with_config(quantization_config={"quant_method": "awq", "bits": 4}), "is quantised (quantization_config"),
        (with_config(quantization_config={"quant_method": "bitsandbytes"}), "config.json: bitsandbytes): give the unq"),
        (with_config(quantization_config={"load_in_8bit": True}), "is quantised (quantization_config"),
        (with_config(compression_config={"quant_method": "compressed-tensors"}), "is quantised (compression_config"),
        (
            lambda folder: edit_json(
                folder, "config.json", lambda c: c["text_config"].update(quantization_config={"quant_method": "fp8"})
            ),
            "config.json: fp8): give",
        ),
        (place("quantize_config.json", b"{}"), "is quantised (quantize_config.json)"),
        (with_tensor(f"{LINEAR}.qweight", torch.zeros(4, 4, dtype=torch.int32)), f"({LINEAR}.qweight is I32)"),
        (with_tensor(f"{LINEAR}.weight", torch.zeros(128, 64, dtype=torch.int8)), f"({LINEAR}.weight is I8)"),
        (with_tensor(f"{LINEAR}.weight", torch.zeros(8, 1, dtype=torch.uint8)), f"({LINEAR}.weight is U8)"),
        (
            with_tensor(f"{LINEAR}.weight", torch.zeros(128, 64).to(torch.float8_e4m3fn)),
            f"({LINEAR}.weight is F8_E4M3): give the unquantised",
        ),
        (rename("pytorch_model.bin"), "holds only pickle weights (pytorch_model.bin)"),
        (rename("model.gguf"), "holds model.gguf and no safetensors: give the original Hugging Face"),
    ],
)
def test_other_kinds_of_checkpoints_are_one_line(llava, tmp_path, capsys, damage, message):
    damage(llava)
    assert cli.main([str(llava), str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "  "))]
    assert len(lines) == 1 and message in lines[0], lines
    with pytest.raises(RerouteError) as error:
        reroute_jax.load(llava)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_or_gguf_alone_is_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(LORA)
    with pytest.raises(RerouteError, match="holds an adapter of owner/base"):
        reroute_jax.load(tmp_path)
    (tmp_path / "adapter_config.json").rename(tmp_path / "model.gguf")
    with pytest.raises(RerouteError, match=r"has no config\.json, but model\.gguf"):
        reroute_jax.load(tmp_path)
    with pytest.raises(RerouteError, match=r"model\.gguf is a \.gguf file: give the original"):
        reroute_jax.load(tmp_path / "model.gguf")


# Numbers that are none


def not_finite():
    """Every kind of number in every dtype; the plain run has each once."""
    for at, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        for kind, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            yield pytest.param(dtype, value, marks=[] if at == kind else pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "value"), not_finite())
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, value):
    folder = write("llava", tmp_path / "hf", dtype=dtype)
    edit(folder, lambda tensors: tensors[f"{LINEAR}.weight"].__setitem__((5, 7), value))
    for build in (lambda: reroute_jax.load(folder), lambda: reroute_jax.load(folder, "float16")):
        with pytest.raises(RerouteError, match=rf"^{LINEAR}.weight holds NaN or infinity"):
            build()
    assert cli.main([str(folder), str(tmp_path / "out")]) == 2


def test_a_converted_folder_is_checked_too(llava, tmp_path, monkeypatch):
    edit(llava, lambda tensors: tensors[f"{LINEAR}.weight"].__setitem__((5, 7), float("nan")))
    with monkeypatch.context() as patch:
        patch.setattr("convert.checkpoint.finite", lambda value: True)
        assert cli.main([str(llava), str(tmp_path / "out")]) == 0
    with pytest.raises(RerouteError, match=r"up\.kernel holds NaN or infinity"):
        reroute_jax.load(tmp_path / "out")


def test_large_finite_weights_pass(llava):
    edit(llava, lambda tensors: tensors[f"{LINEAR}.weight"].fill_(float(jnp.finfo("float32").max)))
    reroute_jax.load(llava)


# Where a conversion cannot write


def test_a_parent_that_is_a_file(llava, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([str(llava), str(tmp_path / "file" / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and f"{tmp_path / 'file' / 'out'} cannot be written (" in errors[0]


def test_a_folder_that_cannot_be_written(llava, tmp_path, capsys, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert cli.main([str(llava), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'} cannot be written (Permission denied)" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4096, 20_000])
def test_a_disk_that_fills_up_leaves_nothing(llava, tmp_path, limit):
    """A limit on the size of files stands for the disk: writes fail midway, in Orbax's own writers. Python itself must
    write nothing then (-B): CPython 3.11 keeps half of a module's bytecode, and the next process cannot import it."""
    script = f"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
runpy.run_module("convert", run_name="__main__")
"""
    command = [sys.executable, "-B", "-c", script, str(llava), str(tmp_path / "out")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"error: {tmp_path / 'out'} cannot be written (") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


# generation_config.json


@pytest.mark.parametrize("family", HEADS)
def test_generation_settings_are_followed(tmp_path, family):
    """Stops at the fourth greedy token, and with the penalty of the file, as transformers does."""
    folder = write(family, tmp_path / "hf")
    edit_json(folder, "generation_config.json", lambda g: g.update(eos_token_id=2, repetition_penalty=1.0))
    free = greedy(family, folder)
    stop = next(number for number, token in enumerate(free) if number > 2 and token not in free[:number])
    edit_json(folder, "generation_config.json", lambda g: g.update(eos_token_id=[2, free[stop]]))
    config = open_checkpoint(folder)[1]
    assert config.eos_tokens == (2, free[stop])
    assert greedy(family, folder) == free[: stop + 1]
    edit_json(folder, "generation_config.json", lambda g: g.update(eos_token_id=2, repetition_penalty=1.8))
    penalised = greedy(family, folder)
    assert penalised != free
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0
    assert open_checkpoint(tmp_path / "out")[1] == open_checkpoint(folder)[1]


def greedy(family, folder):
    """Tokens of transformers with the checkpoint's own settings; ours are the same."""
    with torch.no_grad():
        made = load_torch(family, folder).generate(torch.tensor(IDS), do_sample=False, max_new_tokens=12)
    expected = made[0, IDS.shape[1] :].tolist()
    model = reroute_jax.load(folder, "float32")
    found = model.generate_ids(
        input_ids=IDS,
        max_new_tokens=12,
        eos_token_id=model.config.eos_tokens,
        repetition_penalty=model.config.repetition_penalty,
    )[0].tolist()
    assert found[: len(expected)] == expected and set(found[len(expected) :]) <= {model.config.pad_token}
    return expected


@pytest.mark.parametrize("family", HEADS)
def test_a_config_without_stop_tokens(tmp_path, family):
    folder = write(family, tmp_path / "hf")
    place = (lambda config: config["text_config"]) if family == "llava" else (lambda config: config)
    edit_json(folder, "config.json", lambda config: place(config).update(eos_token_id=None))
    assert open_checkpoint(folder)[1].eos_tokens
    for missing in ({"eos_token_id": None}, {"eos_token_id": []}, {}):
        (folder / "generation_config.json").write_text(json.dumps(missing))
        with pytest.raises(RerouteError, match=r"neither generation_config\.json nor config\.json names a stop token"):
            reroute_jax.load(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(RerouteError, match=r"generation_config\.json is not JSON"):
        reroute_jax.load(folder)
