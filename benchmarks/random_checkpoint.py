"""`python -m benchmarks.random_checkpoint llava-1.5-7b OUT --shards 3 --dtype bfloat16`

A LLaVA checkpoint of a named shape with random weights, in the Hugging Face form and the hub's key spelling, with a
byte-level tokenizer and an image processor: it converts, loads and can be prompted like the real one. Streamed: one
tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from convert.checkpoint import FLOATS, check_free
from convert.families import abstract_params, table_of
from convert.safetensors_io import write_folder
from convert.table import hf_shapes
from reroute_jax.config import ModelConfig
from reroute_jax.errors import RerouteError

# As in the initialisation of LLaMA and CLIP.
WEIGHT_STD = 0.02
# LLaVA-1.5 has <image> and <pad> at the start of the last 64 ids.
_RESERVED = 64
_SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """The sizes that set the parameter shapes of one LLaVA-1.5."""

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    image: int
    patch: int = 14


SHAPES = {
    "llava-1.5-7b": Shape(32064, 4096, 11008, 32, 32, 32, 1024, 4096, 24, 16, 336),
    "llava-1.5-13b": Shape(32064, 5120, 13824, 40, 40, 40, 1024, 4096, 24, 16, 336),
    "llava-small": Shape(2048, 512, 1376, 12, 8, 8, 256, 1024, 6, 4, 112),
    "llava-tiny": Shape(384, 32, 48, 4, 4, 4, 24, 40, 3, 2, 56),
    "llava-tiny-gqa": Shape(384, 32, 48, 4, 4, 2, 24, 40, 3, 2, 56),
}


def hf_config(shape: Shape, dtype: str) -> dict:
    """The config.json of a checkpoint of this shape."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "image_token_index": shape.vocab - _RESERVED,
        "pad_token_id": shape.vocab - _RESERVED + 1,
        "image_seq_length": (shape.image // shape.patch) ** 2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_mlp,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.image,
            "patch_size": shape.patch,
            "projection_dim": shape.vision_width,
        },
    }


def write(shape: Shape, out: Path, shards: int = 1, dtype: str = "bfloat16", seed: int = 0) -> None:
    """Write the checkpoint folder `out`, the same for the same arguments. Raises RerouteError if `out` exists."""
    check_free(out)
    config = hf_config(shape, dtype)
    model = ModelConfig.from_hf(config)
    target = {path: value.shape for path, value in abstract_params(model).items()}
    shapes = hf_shapes(table_of(model), target)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _processor(shape).save_pretrained(out)
    kind = FLOATS[dtype]
    total = sum(math.prod(size) for size in shapes.values()) * kind.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing") as bar:

        def produce(key: str) -> np.ndarray:
            bar.update(math.prod(shapes[key]) * kind.itemsize)
            return _random(key, shapes[key], seed).astype(kind)

        write_folder(out, shapes, kind, produce, shards)


def _random(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Each tensor has its own stream, so that the sharding does not change the values."""
    values = np.random.default_rng((seed, zlib.crc32(key.encode()))).standard_normal(shape, np.float32)
    values *= WEIGHT_STD
    if "norm" in key and key.endswith(".weight"):
        values += 1
    return values


def _processor(shape: Shape) -> LlavaProcessor:
    image = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=_tokenizer(shape.vocab),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Bytes as tokens. Every id of the model has a name, so that random output can be decoded."""
    image = vocab - _RESERVED
    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<extra_{i}>" for i in range(len(names), vocab)]
    names[image : image + 2] = ["<image>", "<pad>"]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_checkpoint", description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files (default: 1)")
    parser.add_argument("--dtype", choices=list(FLOATS), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.shards < 1:
            raise RerouteError(f"--shards {args.shards}: expected at least 1")
        write(SHAPES[args.shape], args.out, args.shards, args.dtype, args.seed)
    except RerouteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
