"""The plug-in for lmms-eval: with stand-ins for the few classes of it that the adapter uses, and with the real one."""

import importlib
import importlib.util
import json
import subprocess
import sys
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from evals import lmms_plugin, pope, refcoco
from evals.harness import vqa
from evals.harness.boxes import REC_METRICS
from evals.harness.data import rec_docs, rec_source
from evals.harness.prompts import single_word
from reroute_jax.errors import RerouteError
from tests.evals.harness.test_data import encoded, photo, row, write
from tests.evals.stub import QwenStub, StubModel

ADAPTER = "evals.lmms_plugin.adapter"
PROTOCOL = {
    "llava": {"BBOX_COORD_FORMAT": "normalized", "REFCOCO_PROMPT_STYLE": "full"},
    "qwen2_5_vl": {"BBOX_COORD_FORMAT": "pixel", "REFCOCO_PROMPT_STYLE": "nuwa"},
}
SETTINGS = {"until": ["ASSISTANT:"]}


class Lmms(ABC):
    """lmms_eval.api.model.lmms."""

    is_simple = True
    rank = 0

    def __init__(self) -> None:
        self.task_dict = {}

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class Manifest:
    model_id: str
    chat_class_path: str


class ChatMessages:
    def __init__(self, messages: list[dict]) -> None:
        self.messages = [
            SimpleNamespace(role=turn["role"], content=[SimpleNamespace(**part) for part in turn["content"]])
            for turn in messages
        ]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The adapter, imported beside stand-ins for lmms-eval's modules, whether or not the real ones are there."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.instance": {"Instance": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    module = importlib.import_module(ADAPTER)
    yield module
    sys.modules.pop(ADAPTER, None)


class Stub(StubModel):
    """Images come in lists. Of several sizes, so that batches are not in the order of the questions."""

    def visual_grid(self, image) -> tuple[int, int]:
        return image.height // 14, image.width // 14

    def _answer(self, images, prompt: str, label: str) -> str:
        return super()._answer(_single(images), prompt, label)


class Qwen(QwenStub):
    def _answer(self, images, prompt: str, label: str) -> str:
        return super()._answer(_single(images), prompt, label)


def _single(images):
    if isinstance(images, list):
        (images,) = images
    return images


def lmms(adapter: ModuleType, model: StubModel, monkeypatch: pytest.MonkeyPatch, **options):
    monkeypatch.setattr(adapter, "load_model", lambda *arguments, **options: model)
    return adapter.RerouteJax(**options)


def messages(*parts: tuple[str, object], role: str = "user") -> list[dict]:
    keys = {"text": "text"}
    return [{"role": role, "content": [{"type": kind, keys.get(kind, "url"): what} for kind, what in parts]}]


def requests(
    task: str, count: int, to_messages: Callable[[dict], list[dict]], settings: dict = SETTINGS
) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=("", to_messages, dict(settings), index, task, "test")) for index in range(count)]


def rec_utils() -> ModuleType:
    """The functions of the task folder, loaded by their path, as lmms-eval does."""
    spec = importlib.util.spec_from_file_location("rec_utils", lmms_plugin.TASKS / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of several sizes: JPEG, whose re-saves show, PNG, and one with expressions that lmms-eval never sees."""
    sizes = [(96, 64), (56, 56), (128, 96), (64, 96), (96, 64), (140, 70), (70, 70), (112, 84), (98, 98)]
    rows = []
    for number, (width, height) in enumerate(sizes):
        form = "PNG" if number == 2 else "JPEG"
        image = encoded(photo(width, height, number), form)
        answers = [f"thing {number}.{index} {{braced}}" for index in range(number % 4)]
        rows.append(row(f"q{number}", image, answers, [5.3 + number, 7.0, 20.7, 16.1]))
    return write(tmp_path / "photos" / "x.parquet", rows)


def test_entry_point_is_found_and_needs_no_lmms_eval() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["lmms_eval.models"]
    assert list(points) == [lmms_plugin.MODEL]
    module, name = points[lmms_plugin.MODEL].split(":")
    absent = f"import sys; sys.modules['lmms_eval'] = None; from {module} import {name}"
    subprocess.run([sys.executable, "-c", absent], check=True, cwd=Path(__file__).parents[3])


def test_manifest_names_a_chat_model(adapter: ModuleType) -> None:
    manifest = lmms_plugin.manifest()
    assert manifest.model_id == "reroute_jax"
    module, name = manifest.chat_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms)
    assert not found.is_simple


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_grounding_equals_our_own_runner(
    adapter: ModuleType,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    batch_size: int,
) -> None:
    """Same documents, same batches, same answers, same metrics, for the routed run as for the full one."""
    for name, value in PROTOCOL[family].items():
        monkeypatch.setenv(name, value)
    docs = list(rec_docs(rec_source(str(photos), None), 0, 99, 2))

    def model() -> StubModel:
        return Stub() if family == "llava" else Qwen(docs)

    ours = model()
    monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: ours)
    how = ["--method", "pdrop", "--action", "delete", "--budget", "64"]
    batched = ["--batch-size", str(batch_size)]
    assert refcoco.main(["--data", str(photos), *how, *batched, "--out", str(tmp_path / "o")]) == 0
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())

    utils = rec_utils()
    stored = datasets.load_dataset("parquet", data_files=str(photos), split="train", cache_dir=str(tmp_path / "cache"))
    split = utils.expressions(stored)
    assert len(split) == len(docs) == 12
    asked = []
    for run, options in {"full": {}, "pdrop-delete-64": {"method": "pdrop", "action": "delete", "budget": 64}}.items():
        plugin = lmms(adapter, model(), monkeypatch, batch_size=batch_size, **options)
        plugin.task_dict = {"rec": {"test": split}}
        to_messages = lambda doc: messages(("image", utils.image(doc)[0]), ("text", utils.text(doc)))  # noqa: E731
        answers = plugin.generate_until(requests("rec", len(split), to_messages))
        lines = [json.loads(line) for line in (tmp_path / "o" / f"{run}.jsonl").read_text().splitlines()]
        assert answers == [line["text"] for line in lines]
        scores = [utils.metrics(doc, [answer.strip()]) for doc, answer in zip(split, answers, strict=True)]
        for name in REC_METRICS:
            expected = summary["runs"][run]["metrics"][name]
            assert np.mean([score[name] for score in scores]) == pytest.approx(expected, abs=1e-12)
        assert plugin.model.max_new_tokens == ours.max_new_tokens
        assert plugin.model.batches == ours.batches[::2]  # the two runs take turns
        asked += plugin.model.prompts
    assert sorted(asked) == sorted(ours.prompts)


def test_documents_are_those_of_our_own_reader(photos: Path, tmp_path: Path) -> None:
    """Pixels after two re-saves, float32 truth, sizes, order."""
    stored = datasets.load_dataset("parquet", data_files=str(photos), split="train", cache_dir=str(tmp_path))
    utils = rec_utils()
    split = utils.expressions(stored)
    docs = list(rec_docs(rec_source(str(photos), None), 0, 99, 2))
    once = list(rec_docs(rec_source(str(photos), None), 0, 99, 1))
    assert [doc.image.tobytes() for doc in docs] != [doc.image.tobytes() for doc in once]
    for found, doc in zip(split, docs, strict=True):
        assert utils.image(found)[0].tobytes() == doc.image.tobytes()
        assert (found["image_width"], found["image_height"]) == doc.size
        assert tuple(found["bbox"]) == doc.truth
        assert (found["question_id"], found["answer"]) == (doc.question_id, doc.text)


def test_question_answering_equals_our_own_runner(
    adapter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Stub()
    monkeypatch.setattr(vqa, "load_model", lambda *arguments, **options: ours)
    how = ["--method", "none", "--limit", "9", "--batch-size", "4", "--out", str(tmp_path)]
    assert pope.main(how) == 0
    rows = [found for found, _ in zip(pope.stand_in("test", "llava"), range(9), strict=False)]
    plugin = lmms(adapter, Stub(), monkeypatch, batch_size="4")
    plugin.task_dict = {"pope": {"test": rows}}
    to_messages = lambda doc: messages(("image", doc["image"]), ("text", single_word(doc["question"])))  # noqa: E731
    answers = plugin.generate_until(requests("pope", 9, to_messages, SETTINGS | {"max_new_tokens": 16}))
    lines = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    assert answers == [line["text"] for line in lines]
    assert plugin.model.batches == ours.batches


def test_order_is_kept_over_tasks_lengths_and_sizes(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of two tasks and lengths, large images before small ones: each gets the answer to its own question."""
    pictures = [{"image": photo(28 * (9 - index), 28, index)} for index in range(9)]
    to_messages = lambda doc: messages(("image", doc["image"]), ("text", "?"))  # noqa: E731
    plugin = lmms(adapter, Stub(), monkeypatch, batch_size=2)
    plugin.task_dict = {"a": {"test": pictures}, "b": {"test": pictures[::-1]}}
    greedy = {"temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0}
    asked = requests("a", 9, to_messages) + requests("b", 5, to_messages, greedy | {"max_new_tokens": 7})
    answers = plugin.generate_until(asked)
    assert answers == [Stub()._answer([doc["image"]], "?", "none") for doc in [*pictures, *pictures[::-1][:5]]]
    assert plugin.model.max_new_tokens == {1024, 7}
    assert max(plugin.model.batches) == 2


def test_options_are_the_commands_routes(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def label(**options) -> str:
        return lmms(adapter, StubModel(), monkeypatch, device="cuda", max_batch_size=4, **options).schedule.label

    assert label() == label(method="none") == "none"
    assert label(method="pdrop", action="delete", budget=64) == "pdrop delete 64"
    assert label(method="fastv", budget="1/9", decisions="every:2") == "fastv reroute 0.1111 every:2"
    assert label(method="nuwa", budget=0.15) == "nuwa reroute 0.15"
    assert label(method="random", seed=3) == "random reroute 128 seed=3"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 64}, "all tokens run without a method, which has no use for budget"),
        ({"method": "pdrop", "pruning": 1}, "unknown options pruning, expected some of method, action"),
        ({"method": "pdrop", "budget": "half"}, "budget 'half' is neither 192, 128, 64 nor a share"),
        ({"method": "drop"}, "method is 'drop', expected one of"),
        ({"preset": "llava15_fastv_K3_avg64"}, "is for 32 decoder layers and the model has 12"),
        ({"preset": "llava15_fastv_K3_avg64", "budget": 64}, "--preset fixes the whole schedule, leave out --budget"),
        ({"batch_size": "auto"}, "batch_size is 'auto', expected a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, options: dict, expected: str
) -> None:
    with pytest.raises(RerouteError, match=expected):
        lmms(adapter, StubModel(), monkeypatch, **options)


PICTURE = ("image", photo())


@pytest.mark.parametrize(
    ("turns", "settings", "expected"),
    [
        (messages(("text", "?"), PICTURE), {}, "document 0 has text, image in turns of user: expected one user turn"),
        (messages(PICTURE, ("video", "x.mp4"), ("text", "?")), {}, "image, video, text"),
        (messages(("image", "x.jpg"), ("text", "?")), {}, "of decoded images"),
        (messages(PICTURE, ("text", "?"), role="system"), {}, "in turns of system"),
        (messages(PICTURE, ("text", "?")), {"temperature": 0.7}, "only greedy decoding is supported"),
        (messages(PICTURE, ("text", "?")), {"num_beams": 4}, "only greedy decoding is supported"),
    ],
)
def test_requests_that_cannot_be_asked_are_refused(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, turns: list[dict], settings: dict, expected: str
) -> None:
    plugin = lmms(adapter, Stub(), monkeypatch)
    plugin.task_dict = {"t": {"test": [{}]}}
    with pytest.raises(RerouteError, match=expected):
        plugin.generate_until(requests("t", 1, lambda doc: turns, settings))
    assert plugin.model.batches == []


def test_text_and_several_images_are_passed_on(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(Stub):
        def _answer(self, images: list[Image.Image], prompt: str, label: str) -> str:
            return f"{len(images)} {prompt}"

    plugin = lmms(adapter, Counts(), monkeypatch, batch_size=3)
    turns = [messages(*[PICTURE] * count, ("text", f"q{count}")) for count in (2, 0, 1)]
    plugin.task_dict = {"t": {"test": [{"turns": turn} for turn in turns]}}
    assert plugin.generate_until(requests("t", 3, lambda doc: doc["turns"])) == ["2 q2", "0 q0", "1 q1"]


def test_other_kinds_of_requests_say_so(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = lmms(adapter, StubModel(), monkeypatch)
    for method in (plugin.loglikelihood, plugin.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose a generate_until task"):
            method([])


@pytest.mark.parametrize("name", ["BBOX_COORD_FORMAT", "REFCOCO_PROMPT_STYLE"])
@pytest.mark.parametrize("value", [None, "pixels"])
def test_tasks_refuse_an_unknown_protocol(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    for known, right in PROTOCOL["llava"].items():
        monkeypatch.setenv(known, right)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    utils = rec_utils()
    doc = {"answer": "a cup", "image_width": 8, "image_height": 8, "bbox": [0.0, 0.0, 1.0, 1.0]}
    with pytest.raises(RerouteError, match=f"the environment variable {name} is {value!r}, expected one of"):
        utils.text(doc), utils.metrics(doc, ["[0, 0, 1, 1]"])


def test_there_is_a_task_for_each_of_the_eight_splits() -> None:
    splits = {"refcoco": "val testA testB", "refcocoplus": "val testA testB", "refcocog": "val test"}
    names = {f"reroute_{name}_{split}.yaml" for name, those in splits.items() for split in those.split()}
    assert {file.name for file in lmms_plugin.TASKS.glob("*.yaml")} == names


def test_real_lmms_eval_runs_it_end_to_end(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, through the entry point: needs lmms-eval v0.7.1 and an installed reroute-jax."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import list_available_models
    from lmms_eval.tasks import TaskManager

    if lmms_plugin.MODEL not in list_available_models():
        pytest.skip("lmms-eval finds the plug-in where reroute-jax is installed, not in a source tree")
    adapter = importlib.import_module(ADAPTER)
    docs = list(rec_docs(rec_source(str(photos), None), 0, 99, 2))
    for name, value in PROTOCOL["qwen2_5_vl"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = [
        "task: local_rec",
        f"include: {lmms_plugin.TASKS / '_rec'}",
        "dataset_path: parquet",
        f"dataset_kwargs: {{data_files: {{val: {photos}}}, cache_dir: {tmp_path / 'cache'}}}",
        "test_split: val",
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_rec.yaml").write_text("\n".join(task))

    def evaluate(model_args: str) -> dict:
        monkeypatch.setattr(adapter, "load_model", lambda *arguments, **options: Qwen(docs))
        manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
        how = {"tasks": ["local_rec"], "batch_size": 2, "task_manager": manager}
        return simple_evaluate(model=lmms_plugin.MODEL, model_args=model_args, **how)

    def ours(*how: str) -> dict[str, float]:
        monkeypatch.setattr(refcoco, "load_model", lambda *arguments, **options: Qwen(docs))
        out = tmp_path / "-".join(how)
        assert refcoco.main(["--data", str(photos), "--batch-size", "2", "--out", str(out), *how]) == 0
        return list(json.loads((out / "summary.json").read_text())["runs"].values())[-1]["metrics"]

    for model_args, how in (("", ["--method", "none"]), ("method=nuwa,budget=128", ["--method", "nuwa"])):
        found = evaluate(model_args)
        expected = ours(*how)
        assert found["n-samples"]["local_rec"]["effective"] == len(docs)
        for name in REC_METRICS:
            assert found["results"]["local_rec"][f"{name},none"] == pytest.approx(expected[name], abs=1e-12)
        assert [sample["doc"]["answer"] for sample in found["samples"]["local_rec"]] == [doc.text for doc in docs]
