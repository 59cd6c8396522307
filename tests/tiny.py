"""Tiny random LLaVA checkpoints on disk, and inputs for them: the raw material of the parity tests.

The weights are far stronger than an untrained model's: attention is peaked (so that a selection depends on content and
a wrong scale, norm or rotation shows in the logits), norms and biases are not trivial, and greedy tokens vary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# At these sizes torch's threads only wait for each other: many times slower on a busy machine.
torch.set_num_threads(1)

UNK, BOS, EOS, IMAGE, PAD = 0, 1, 2, 126, 127
VOCAB_SIZE = 128

# In-memory prefix (transformers 5) -> prefix on disk. `hub` is llava-hf/llava-1.5-7b-hf's spelling, `saved` what
# `save_pretrained` of transformers 5.23 writes, `v5` the in-memory names, `v5_nested` those of earlier transformers 5.
SPELLINGS = {
    "hub": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "saved": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
    "v5": {},
    "v5_nested": {"model.vision_tower.": "model.vision_tower.vision_model."},
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_TEXT = """
USER ASSISTANT : . , ? ! [ ] ( ) - ' / 0 1 2 3 4 5 6 7 8 9 a an the of to in on at is are it and or not yes no
what where which who how many locate find point box bounding region object image shape colour there this that
red green blue yellow purple orange black white grey cyan small large left right above below near between
circle square triangle star ring cross cup dog cat car tree man woman top bottom middle striped plain
"""
WORDS = tuple(_TEXT.split())


def tiny_llava(
    folder: Path,
    *,
    kv_heads: int,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    image_size: int = 84,
    patch: int = 14,
    vision_layers: int = 6,
    spelling: str = "hub",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    feature_layers: int | list[int] = -2,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with tokenizer and image processor to `folder` (made if absent) and return it.

    The image has `(image_size // patch) ** 2` tokens: 36 by default. `spelling` is a key of SPELLINGS; `hub` also
    writes a config as sparse as the hub's. With `shards > 1` there is an index, and every shard mixes all parts of the
    model. `tied` leaves the head out, as transformers does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(kv_heads, layers, hidden, heads, image_size, patch, vision_layers, tied, feature_layers)
    model = LlavaForConditionalGeneration(config)
    strengthen(model, np.random.default_rng(seed))
    tensors = {_spell(key, spelling): value.to(dtype).contiguous() for key, value in model.state_dict().items()}
    if tied:
        del tensors[_spell("lm_head.weight", spelling)]
    write_shards(folder, tensors, shards)
    written = _hub_config(config) if spelling == "hub" else config.to_dict()
    written["torch_dtype" if spelling == "hub" else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _write_processor(folder, image_size, patch)
    return folder


def load_torch(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The checkpoint as transformers loads it, in evaluation mode."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def random_pixels(images: int, image_size: int = 84, seed: int = 0) -> np.ndarray:
    """Normalised pixels `[images, 3, image_size, image_size]`, fp32: noise on a smooth gradient, so that neighbouring
    patches are alike and distant ones are not."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, image_size)
    slopes = rng.normal(size=(images, 3, 2, 1, 1))
    smooth = slopes[:, :, 0] * ramp[:, None] + slopes[:, :, 1] * ramp[None, :]
    return (smooth + 0.7 * rng.normal(size=(images, 3, image_size, image_size))).astype(np.float32)


def random_ids(length: int, *, visual: int = 36, start: int | None = 1, bos: bool = True, seed: int = 0) -> np.ndarray:
    """One prompt `[length]`, int64, of text ids with `visual` image ids from index `start` on (None: no image).

    `bos=True` puts BOS at index 0 unless the image stands there.
    """
    ids = np.random.default_rng(seed).integers(3, 3 + len(WORDS), size=length)
    if bos:
        ids[0] = BOS
    if start is not None:
        if start + visual > length:
            raise ValueError(f"{visual} image tokens from index {start} do not fit {length} tokens")
        ids[start : start + visual] = IMAGE
    return ids


def _config(
    kv_heads: int,
    layers: int,
    hidden: int,
    heads: int,
    image_size: int,
    patch: int,
    vision_layers: int,
    tied: bool,
    feature_layers: int | list[int],
) -> LlavaConfig:
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch,
            projection_dim=48,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        ),
        image_token_index=IMAGE,
        image_seq_length=(image_size // patch) ** 2,
        pad_token_id=PAD,
        tie_word_embeddings=tied,
        vision_feature_layer=feature_layers,
    )


def _hub_config(config: LlavaConfig) -> dict:
    """As sparse as the hub's: no head size, activation or rope, and no KV heads where they equal the heads."""
    text, vision = config.text_config, config.vision_config
    kept = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    kept += ["rms_norm_eps", "max_position_embeddings"]
    if text.num_key_value_heads != text.num_attention_heads:
        kept.append("num_key_value_heads")
    sizes = ["model_type", "hidden_size", "image_size", "intermediate_size", "num_attention_heads"]
    sizes += ["num_hidden_layers", "patch_size", "projection_dim"]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": config.image_token_index,
        "model_type": "llava",
        "pad_token_id": PAD,
        "projector_hidden_act": "gelu",
        "text_config": {name: getattr(text, name) for name in kept},
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": {**{name: getattr(vision, name) for name in sizes}, "vocab_size": 32000},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
        "vocab_size": VOCAB_SIZE,
    }


def strengthen(model: PreTrainedModel, rng: np.random.Generator) -> None:
    """Random weights of the kind this file's head describes, the same for the same names and shapes."""
    for name, parameter in sorted(model.named_parameters()):
        value = rng.normal(size=tuple(parameter.shape))
        if "norm" in name or "ln_q" in name:
            value = 0.15 * value + ("weight" in name)
        elif name.endswith("bias"):
            value *= 0.3
        elif "embed" in name and "patch" not in name:
            # A strong embedding that is also the head would make every token repeat itself.
            value *= 0.1 if model.config.tie_word_embeddings else 0.5
        else:
            value *= _gain(name) / np.sqrt(value[0].size)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))


def _gain(name: str) -> float:
    """Queries and keys get a larger gain: with normalised inputs the attention logits' deviation is its square."""
    if "q_proj" in name or "k_proj" in name or "attn.qkv" in name:
        return 1.7
    return 3.0 if "lm_head" in name else 1.0


def _spell(key: str, spelling: str) -> str:
    for prefix, written in SPELLINGS[spelling].items():
        if key.startswith(prefix):
            return written + key.removeprefix(prefix)
    return key


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Safetensors in one file, or in several that mix all parts of the model, with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_processor(folder: Path, image_size: int, patch: int) -> None:
    vocabulary = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, "<image>": IMAGE, "<pad>": PAD}
    vocabulary |= {word: 3 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[A-Za-z]+|."), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = {"height": image_size, "width": image_size}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side),
        tokenizer=fast,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
