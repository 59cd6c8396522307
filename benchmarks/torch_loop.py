"""`python -m benchmarks.torch_loop --model FOLDER --rates 0.4 0.8 --requests 28`

The plain way to serve: transformers' `generate` with the same weights, one question after the other as they come. The
questions, their arrivals and the limits on their answers are those of `benchmarks.load` with the same arguments, and so
are the records.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText
from transformers.generation.streamers import BaseStreamer

from benchmarks.load import Asked, Heard, questions, summary, table
from convert.embedded import locate
from reroute_jax.commandline.parsing import DATA, OUTPUT, RUN, Parser, exit_code, positive, positive_number, whole
from reroute_jax.engine.images import open_image
from reroute_jax.engine.side_files import SideFiles
from reroute_jax.models import read_config

NAME = "transformers, one by one"


class FirstToken(BaseStreamer):
    """When the first token behind the prompt came, on the clock of `time.perf_counter`."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt comes first
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


class Loop:
    """A checkpoint in transformers, all of the machine for one question."""

    def __init__(self, folder: Path) -> None:
        config = read_config(json.loads((folder / "config.json").read_text()))
        self.files = SideFiles(folder, config)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def ask(self, asked: Asked, due: float) -> Heard:
        """due: on the clock of `time.perf_counter`."""
        image, text = asked.messages[0]["content"]
        opened = open_image(Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))))
        ids = self.files.chat_layout.question_ids(text["text"], [self.files.visual_grid(opened)])
        pixels, _ = self.files.family.preprocess([opened], self.files.image_processor)
        first = FirstToken()
        with torch.inference_mode():
            self.model.generate(
                input_ids=torch.from_numpy(ids[None]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=torch.from_numpy(np.asarray(pixels)),
                max_new_tokens=asked.max_tokens,
                do_sample=False,
                streamer=first,
            )
        return Heard(200, first.at - due, time.perf_counter() - due)


def measured(args: argparse.Namespace, loop: Loop) -> Iterator[dict[str, Any]]:
    """A record for each rate, and one for the loop without a pause."""
    rng = np.random.default_rng(args.seed)
    asked = questions(args.requests, args.new_tokens, rng)
    loop.ask(asked[0], time.perf_counter())
    for rate in args.rates:
        arrivals = np.cumsum(rng.exponential(1 / rate, args.requests))
        start, heard = time.perf_counter(), []
        for one, arrival in zip(asked, arrivals.tolist(), strict=True):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            heard.append(loop.ask(one, start + arrival))
        yield summary(NAME, rate, heard, arrivals, args.limit)
    start = time.perf_counter()
    for one in asked:
        loop.ask(one, start)
    yield {"plan": NAME, "clients": 1, "saturated_per_s": round(len(asked) / (time.perf_counter() - start), 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after one line on bad input."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with args.out.open("w") as file:
        loop = Loop(Path(locate(args.model)))
        for record in tqdm(measured(args, loop), total=len(args.rates) + 1, unit="cell"):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(table(records))


def _parser() -> Parser:
    examples = ("--model scenes-llava", "--model runs/bench-llava --rates 0.4 0.8 --requests 28 --limit 6")
    parser = Parser("benchmarks.torch_loop", __doc__, examples)
    run, data = parser.group(RUN), parser.group(DATA)
    run.add_argument("--model", default="scenes-llava", help="folder or embedded model (default: %(default)s)")
    run.add_argument("--threads", type=positive, default=2, help="of torch (default: %(default)s)")
    data.add_argument("--rates", type=positive_number, nargs="+", default=[4.0, 8.0], help="(default: %(default)s)")
    data.add_argument("--requests", type=positive, default=100, help="of each cell (default: %(default)s)")
    data.add_argument("--new-tokens", type=positive, default=32, help="most of an answer (default: %(default)s)")
    data.add_argument(
        "--limit", type=positive_number, default=2.0, help="seconds for a good answer (default: %(default)s)"
    )
    data.add_argument("--seed", type=whole, default=0, help="of arrivals and lengths (default: %(default)s)")
    parser.group(OUTPUT).add_argument(
        "--out", type=Path, default=Path("runs/torch_loop.jsonl"), help="JSON lines (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
