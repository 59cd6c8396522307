"""Conversion of whole folders: every accepted form, exact round trips, streaming, and each refusal's one line."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from filelock import FileLock
from orbax.checkpoint import v1 as ocp
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks import random_checkpoint
from convert import __main__ as cli
from convert import conversion
from convert.checkpoint import load_params, save_hf
from convert.families import abstract_params, table_of
from convert.pieces import save
from convert.safetensors import INDEX_NAME, list_folder, read, read_header
from convert.source import FORMAT, MANIFEST_NAME, open_source
from convert.table import to_hf
from evals.speed.checkpoint_shapes import SHAPES
from reroute_jax.errors import RerouteError
from reroute_jax.models import read_config
from reroute_jax.types import FLOATS
from tests.marks import cases
from tests.processes import python_without_torch
from tests.tiny import SPELLINGS, load_torch, tiny_llava

ROOT = Path(__file__).parents[2]
SHAPE = SHAPES["llava-tiny-gqa"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A float32 checkpoint in one file, hub spelling."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    random_checkpoint.write(SHAPE, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def torch_model(hf):
    """transformers' own reading of that checkpoint."""
    model, info = LlavaForConditionalGeneration.from_pretrained(hf, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    assert cli.main([str(hf), str(out)]) == 0
    return out


@pytest.fixture
def copy(hf, tmp_path):
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(hf, tmp_path / "copy"))


def model_of(folder):
    config = read_config(open_source(folder).config)
    return abstract_params(config), table_of(config)


def load(folder, dtype=None):
    target, table = model_of(folder)
    params = load_params(open_source(folder), target, table, dtype)
    assert {path: value.shape for path, value in params.items()} == {k: v.shape for k, v in target.items()}
    return params


def assert_same(left, right):
    assert left.keys() == right.keys()
    for path, value in left.items():
        assert value.dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[path]), err_msg=path)


def hub_key(key):
    """The hub's spelling of a key of `state_dict()`."""
    prefix, written = next(pair for pair in SPELLINGS["hub"].items() if key.startswith(pair[0]))
    return written + key.removeprefix(prefix)


def run_cli(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "  "))]


# What is read


@pytest.mark.parametrize("original_format", [True, False], ids=["saved", "in-memory"])
def test_the_forms_that_transformers_saves_load_alike(hf, torch_model, tmp_path, original_format):
    torch_model.save_pretrained(tmp_path, save_original_format=original_format)
    assert_same(load(hf), load(tmp_path))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_a_tied_head_load_what_torch_loads(tmp_path, spelling, tied):
    tiny_llava(tmp_path, kv_heads=2, layers=2, spelling=spelling, tied=tied, shards=2)
    params = {path: np.asarray(value) for path, value in load(tmp_path).items()}
    written = dict(to_hf(model_of(tmp_path)[1], params))
    state = load_torch(tmp_path).state_dict()
    expected = {hub_key(key): value.numpy() for key, value in state.items()}
    if tied:
        del expected["language_model.lm_head.weight"]
    assert_same(expected, written)


def test_values_against_torch(hf, torch_model):
    params, state = load(hf), torch_model.state_dict()
    layer = "model.language_model.layers.3."
    width, heads, dim = SHAPE.decoder.width, SHAPE.decoder.kv_heads, SHAPE.decoder.width // SHAPE.decoder.heads
    key = state[layer + "self_attn.k_proj.weight"].numpy().reshape(heads, dim, width)
    np.testing.assert_array_equal(params["decoder.layers.3.attn.k.kernel"], key)
    output = state[layer + "self_attn.o_proj.weight"].numpy().reshape(width, SHAPE.decoder.heads, dim)
    np.testing.assert_array_equal(params["decoder.layers.3.attn.o.kernel"], output)
    np.testing.assert_array_equal(params["decoder.head.kernel"], state["lm_head.weight"].numpy())
    patch = state["model.vision_tower.embeddings.patch_embedding.weight"].numpy()
    np.testing.assert_array_equal(params["vision.patch_embed.kernel"], patch)


@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
def test_shards(hf, tmp_path, index):
    random_checkpoint.write(SHAPE, tmp_path / "sharded", shards=3, dtype="float32")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 3
    if not index:
        (tmp_path / "sharded" / INDEX_NAME).unlink()
    assert_same(load(hf), load(tmp_path / "sharded"))


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_files_agree_with_the_reference_reader(tmp_path, dtype):
    random_checkpoint.write(SHAPE, tmp_path / "x", dtype=dtype)
    expected = load_file(tmp_path / "x" / "model.safetensors")
    tensors = list_folder(tmp_path / "x")
    assert {tensor.key for tensor in tensors} == set(expected)
    for tensor in tensors:
        assert str(expected[tensor.key].dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(read(tensor).astype(np.float32), expected[tensor.key].float().numpy())


def test_a_file_of_the_reference_writer_is_read(torch_model, tmp_path):
    torch_model.to(torch.bfloat16).save_pretrained(tmp_path)
    torch_model.to(torch.float32)
    expected = load_file(tmp_path / "model.safetensors")
    for tensor in read_header(tmp_path / "model.safetensors"):
        assert tensor.dtype == "BF16"
        np.testing.assert_array_equal(read(tensor).astype(np.float32), expected[tensor.key].float().numpy())


def test_the_random_checkpoint_can_be_prompted(hf):
    processor = AutoProcessor.from_pretrained(hf)
    image = np.zeros((40, 60, 3), np.uint8)
    batch = processor(images=image, text="USER: <image>\nWhere? ASSISTANT:", return_tensors="np")
    config = read_config(open_source(hf).config)
    assert (batch["input_ids"] == config.image_token).sum() == (SHAPE.image // SHAPE.patch) ** 2
    assert batch["pixel_values"].shape == (1, 3, SHAPE.image, SHAPE.image)
    assert "Where?" in processor.decode(batch["input_ids"][0])


# Round trips


def test_hf_to_jax_to_hf_is_exact(hf, tmp_path):
    save_hf(tmp_path, load(hf), model_of(hf)[1], "float32", shards=2)
    written = {tensor.key: read(tensor) for tensor in list_folder(tmp_path)}
    assert_same({tensor.key: read(tensor) for tensor in list_folder(hf)}, written)
    shutil.copy(hf / "config.json", tmp_path)
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info


def test_orbax_round_trip_is_exact(hf, converted):
    assert_same(load(hf), load(converted))


def test_plain_orbax_restores_a_converted_folder(hf, converted):
    (piece,) = (converted / "params").iterdir()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = ocp.metadata(piece).metadata.items()
    wanted = {path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place) for path, value in shapes}
    assert_same(load(hf), ocp.load(piece, wanted))


def test_a_converted_folder_brings_tokenizer_and_processor(hf, converted):
    names = {path.name for path in hf.iterdir() if path.suffix != ".safetensors"}
    assert names == {path.name for path in converted.iterdir()} - {"params", MANIFEST_NAME}
    ours, original = (AutoProcessor.from_pretrained(folder)(text="Where?") for folder in (converted, hf))
    assert ours.input_ids == original.input_ids


@pytest.mark.parametrize("dtype", cases([*FLOATS, None], {"float32", "float16"}))
def test_dtype_option(hf, converted, tmp_path, dtype):
    kind = FLOATS[dtype or "float32"]
    expected = {path: np.asarray(value).astype(kind) for path, value in load(hf).items()}
    assert_same(expected, load(hf, dtype))
    assert_same(expected, load(converted, dtype))
    assert cli.main([str(hf), str(tmp_path / "out"), *(["--dtype", dtype] if dtype else [])]) == 0
    assert_same(expected, load(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["dtype"] == dtype


def test_sharding_of_the_target_is_kept(hf, converted):
    target, table = model_of(hf)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=wanted) for k, v in target.items()}
    for folder in (hf, converted):
        assert all(v.sharding == wanted for v in load_params(open_source(folder), target, table).values())


def test_summary_and_manifest(hf, tmp_path, capsys):
    assert cli.main([str(hf), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    target, _ = model_of(hf)
    count = sum(int(np.prod(value.shape)) for value in target.values())
    manifest = open_source(tmp_path / "out").manifest
    assert (manifest.tensors, manifest.parameters, manifest.nbytes) == (len(target), count, 2 * count)
    summary = capsys.readouterr().out
    assert f"{len(target)} tensors, {count:,} parameters" in summary and "peak memory" in summary


# Streaming and atomicity


def test_a_conversion_holds_two_pieces_or_one_large_tensor(hf, tmp_path, monkeypatch):
    largest = max(tensor.nbytes for tensor in list_folder(hf))
    held, most, pieces, lock = [], [], [], threading.Lock()

    def write(folder, number, tree):
        nbytes = sum(value.nbytes for value in tree.values())
        with lock:
            held.append(nbytes)
            most.append(sum(held))
        time.sleep(0.02)
        (folder / "params" / str(number)).mkdir()
        with lock:
            held.remove(nbytes)
            pieces.append(tree)

    monkeypatch.setattr("convert.conversion.PIECE_BYTES", largest // 4)
    monkeypatch.setattr("convert.pieces.save", write)
    assert cli.main([str(hf), str(tmp_path / "out")]) == 0
    assert sum(len(tree) for tree in pieces) == len(list_folder(hf))
    assert largest // 4 < max(most) <= largest
    assert all(sum(value.nbytes for value in tree.values()) <= largest // 4 or len(tree) == 1 for tree in pieces)


KILLED = """
import os, signal, sys
from convert import __main__ as cli, conversion, pieces
conversion.PIECE_BYTES = 60_000
save = pieces.save

def killed_in_the_third(folder, number, tree):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, number, tree)

pieces.save = killed_in_the_third
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("left", ["", "{", "[]", '{"format": 1}'])
def test_what_a_kill_left_of_an_identity_deletes_no_pieces(left, tmp_path):
    identity = {"format": 3, "dtype": None}
    conversion._settle(tmp_path, identity)
    file = tmp_path / "conversion.json"
    before = file.stat().st_mtime_ns
    conversion._settle(tmp_path, identity)
    assert file.stat().st_mtime_ns == before, "an identity that is written again can be cut off by a kill"
    file.write_text(left)
    with pytest.raises(conversion._Foreign, match="is part of another conversion"):
        conversion._settle(tmp_path, identity)
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_conversion_goes_on_where_it_was(hf, tmp_path, capsys, monkeypatch):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = python_without_torch(KILLED, str(hf), str(out))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists()
    with pytest.raises(RerouteError, match=r"has no config\.json"):
        load(partial)
    monkeypatch.setattr("convert.conversion.PIECE_BYTES", 60_000)
    status, lines = run_cli(capsys, hf, out, "--dtype", "bfloat16")
    assert status == 2 and len(lines) == 1 and f"{partial} is part of another conversion" in lines[0]
    kept = {path.name for path in (partial / "params").iterdir() if path.name.isdigit()}
    assert len(kept) in (1, 2)
    (partial / "params" / "00099.orbax-checkpoint-tmp").mkdir()
    written = []

    def counted(folder, number, tree):
        written.append(number)
        save(folder, number, tree)

    monkeypatch.setattr("convert.pieces.save", counted)
    assert cli.main([str(hf), str(out)]) == 0
    assert len(written) > 2 and not {f"{number:05d}" for number in written} & kept
    assert list(tmp_path.iterdir()) == [out]
    assert_same(load(hf), load(out))


def test_pieces_are_saved_one_at_a_time(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.conversion.PIECE_BYTES", 20_000)
    together, alone = [], threading.Lock()

    def watched(folder, number, tree):
        together.append(not alone.acquire(blocking=False))
        time.sleep(0.02)
        save(folder, number, tree)
        alone.release()

    monkeypatch.setattr("convert.pieces.save", watched)
    assert cli.main([str(hf), str(tmp_path / "out")]) == 0
    assert len(together) > 3 and not any(together)


def test_two_conversions_to_one_folder(hf, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    with FileLock(tmp_path / "out.partial" / ".lock"):
        status, lines = run_cli(capsys, hf, tmp_path / "out")
    assert (status, len(lines)) == (2, 1) and "another process writes" in lines[0]


def test_a_folder_without_manifest_is_not_a_converted_checkpoint(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "partial"))
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(RerouteError, match="holds no weights"):
        load(folder)


def test_ctrl_c_keeps_what_was_written(hf, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.conversion.converted", interrupt)
    status, lines = run_cli(capsys, hf, tmp_path / "out")
    said = f"error: interrupted, {tmp_path / 'out'} was not written: the same command goes on where it was"
    assert (status, lines) == (130, [said])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.partial"]


# Refusals: each is one line on stderr and a non-zero exit


def drop(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(keep):
    def damage(folder):
        file = folder / "model.safetensors"
        os.truncate(file, keep if keep > 0 else file.stat().st_size + keep)

    return damage


def lengthen(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def edit_header(change):
    """Replace the JSON header; `change(text) -> text`."""

    def damage(folder):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length])
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def to_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of(weight_map):
    return write(INDEX_NAME, json.dumps({"weight_map": weight_map}).encode())


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (drop("config.json"), "has no config.json"),
        (write("config.json", b"{"), "config.json is not JSON"),
        (write("config.json", b"[]"), "config.json is not a JSON object"),
        (write("config.json", b'{"model_type": "bert"}'), "unknown architecture 'bert'"),
        (drop("model.safetensors"), "holds no weights: expected *.safetensors"),
        (to_pickle, "holds only pickle weights (pytorch_model.bin), refused because unpickling can run any code"),
        (truncate(-1), "model.safetensors is truncated"),
        (truncate(100), "model.safetensors is truncated"),
        (truncate(4), "is not a safetensors file"),
        (lengthen, "has bytes after its last tensor"),
        (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (write("model.safetensors", b"\xff" * 64), "is not a safetensors file (bad header length)"),
        (edit_header(lambda text: b"\xff" * len(text)), "has a corrupt safetensors header"),
        (edit_header(lambda text: b"[]"), "has a corrupt safetensors header"),
        (edit_header(lambda text: text.replace(b'"dtype"', b'"dtipe"', 1)), "has a corrupt safetensors header"),
        (edit_header(lambda text: text.replace(b'"F32"', b'"F16"', 1)), "which do not fit F16"),
        (edit_header(lambda text: text.replace(b"layers.0", b"layers.1")), "(a name occurs twice)"),
        (index_of({"a": "model-00001-of-00002.safetensors"}), "names 1 of 1 shards that are not there"),
        (index_of({"a": "model.safetensors"}), "(first: a in model.safetensors)"),
        (index_of({"a": "../model.safetensors"}), "weight_map must name files of the same folder"),
        (index_of({}), "is corrupt (weight_map must"),
        (write(INDEX_NAME, b"{}"), "is corrupt ('weight_map')"),
    ],
)
def test_damaged_checkpoints(copy, tmp_path, capsys, damage, line):
    damage(copy)
    status, lines = run_cli(capsys, copy, tmp_path / "out")
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and line in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_overlapping_tensors(copy, tmp_path, capsys):
    def overlap(text):
        header = json.loads(text)
        second = header["vision_tower.vision_model.pre_layrnorm.bias"]
        second["data_offsets"] = header["vision_tower.vision_model.pre_layrnorm.weight"]["data_offsets"]
        return json.dumps(header).encode()

    edit_header(overlap)(copy)
    status, lines = run_cli(capsys, copy, tmp_path / "out")
    assert status == 2 and len(lines) == 1 and "starts at byte" in lines[0]


def test_misfits_are_one_report(copy, tmp_path, capsys):
    change = edit_header(lambda text: text.replace(b"language_model.lm_head", b"language_model.other"))
    change(copy)
    status, lines = run_cli(capsys, copy, tmp_path / "out")
    assert status == 2
    assert lines == [
        f"error: checkpoint {copy} does not fit its config.json: 1 unknown, 1 missing",
        "  unknown: language_model.other.weight",
        "  missing: language_model.lm_head.weight (for decoder.head.kernel)",
    ]


def test_shards_that_repeat_a_tensor(copy, tmp_path, capsys):
    shutil.copy(copy / "model.safetensors", copy / "again.safetensors")
    status, lines = run_cli(capsys, copy, tmp_path / "out")
    assert status == 2 and f"{len(read_header(copy / 'model.safetensors'))} duplicate" in lines[0]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_target_is_refused(hf, tmp_path, capsys, kind):
    out = tmp_path / "out"
    out.touch() if kind == "file" else out.mkdir()
    status, lines = run_cli(capsys, hf, out)
    assert (status, lines) == (2, [f"error: {out} already exists: delete it or choose another name"])


def test_a_file_and_a_wrong_path_are_refused(hf, tmp_path, capsys):
    file = hf / "model.safetensors"
    status, lines = run_cli(capsys, file, tmp_path / "out")
    assert status == 2 and lines[0].startswith(f"error: {file} is a file: expected a checkpoint folder")
    wrong = tmp_path / "no" / "such" / "folder"
    status, lines = run_cli(capsys, wrong, tmp_path / "out")
    assert status == 2 and lines[0].startswith(f"error: {wrong} does not exist: expected a checkpoint folder")


def test_a_converted_source_is_refused(converted, tmp_path, capsys):
    status, lines = run_cli(capsys, converted, tmp_path / "out")
    assert status == 2 and lines[0].startswith(f"error: {converted} is converted already")


def test_a_full_disk_is_foreseen(hf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    status, lines = run_cli(capsys, hf, tmp_path / "out")
    assert status == 2 and "bytes, the disk has 0: free some" in lines[0]


def test_values_beyond_float16_are_refused(hf, tmp_path, capsys):
    params = {path: np.array(value) for path, value in load(hf).items()}
    params["decoder.norm.scale"][0] = 1e5
    folder = tmp_path / "large"
    folder.mkdir()
    save_hf(folder, params, model_of(hf)[1], "float32")
    shutil.copy(hf / "config.json", folder)
    status, lines = run_cli(capsys, folder, tmp_path / "out", "--dtype", "float16")
    assert (status, len(lines)) == (2, 1)
    assert "language_model.model.norm.weight has values beyond float16's 65504" in lines[0]
    assert not list(tmp_path.glob("out*"))
    assert cli.main([str(folder), str(tmp_path / "out")]) == 0
    for path in (folder, tmp_path / "out"):
        with pytest.raises(RerouteError, match="beyond float16"):
            load(path, "float16")


def largest_file(params):
    return max((file for file in params.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, r"params/\S+ is missing"),
        (drop("00000/state/_METADATA"), "params/00000/state/_METADATA is missing"),
        (write("00000/state/_METADATA", b"{"), r"params/00000/state/_METADATA has 1 bytes, expected \d+"),
        (lambda params: largest_file(params).unlink(), r"params/\S+ is missing"),
        (lambda params: os.truncate(largest_file(params), 10), r"params/\S+ has 10 bytes, expected \d+"),
    ],
)
def test_a_damaged_converted_folder(converted, tmp_path, damage, reason):
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    damage(folder / "params")
    with pytest.raises(RerouteError, match=rf"^{folder} is damaged: {reason}: convert again$"):
        load(folder)


def test_a_converted_folder_with_another_config(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["vocab_size"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RerouteError, match=r"does not fit its config\.json: 9 unknown, 2 mis-shaped"):
        load(folder)


def test_manifests_of_other_versions(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(RerouteError, match="is of format 1, this version reads 3"):
        open_source(folder)
    (folder / MANIFEST_NAME).write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(RerouteError, match="is damaged"):
        open_source(folder)


# The hub, without a network


def test_a_hub_id_is_downloaded_without_pickle(hf, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source("owner/model")
    assert (source.name, source.folder, asked["name"]) == ("owner/model", hf, "owner/model")
    assert "*.safetensors" in asked["allow_patterns"] and "*.bin" not in asked["allow_patterns"]


@pytest.mark.parametrize(
    "error",
    [huggingface_hub.errors.LocalEntryNotFoundError("no network\nmore"), ConnectionError("no network\nmore")],
)
def test_an_unreachable_hub(tmp_path, capsys, monkeypatch, error):
    def snapshot_download(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    status, lines = run_cli(capsys, "owner/model", tmp_path / "out")
    assert (status, lines) == (
        2,
        [
            "error: owner/model is not a folder here and the hub cannot be reached (no network): "
            "check the network, or give a folder"
        ],
    )
