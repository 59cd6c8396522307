"""The shapes that random checkpoints are written in: for each its config.json, image processor and special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The classes of transformers are looked up where they are used: image processors import PyTorch, which takes seconds.
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder, which all families name alike."""

    vocab: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int

    def config(self) -> dict:
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
        }


@dataclass(frozen=True)
class LlavaShape:
    """The sizes that set the parameter shapes of one LLaVA-1.5."""

    decoder: DecoderShape
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    image: int
    patch: int = 14

    @property
    def image_token(self) -> int:
        """<image> and <pad> are at the start of the last 64 ids."""
        return self.decoder.vocab - 64

    def config(self, dtype: str) -> dict:
        """config.json as the hub's."""
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "dtype": dtype,
            "image_token_index": self.image_token,
            "pad_token_id": self.image_token + 1,
            "image_seq_length": (self.image // self.patch) ** 2,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": {
                "model_type": "llama",
                **self.decoder.config(),
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": self.vision_width,
                "intermediate_size": self.vision_mlp,
                "num_hidden_layers": self.vision_layers,
                "num_attention_heads": self.vision_heads,
                "image_size": self.image,
                "patch_size": self.patch,
                "projection_dim": self.vision_width,
            },
        }

    def save_companions(self, folder: Path) -> None:
        """Tokenizer and image processor files."""
        special = {0: "<unk>", 1: "<s>", 2: "</s>", self.image_token: "<image>", self.image_token + 1: "<pad>"}
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessorPil(
                size={"shortest_edge": self.image}, crop_size={"height": self.image, "width": self.image}
            ),
            tokenizer=_byte_tokenizer(self.decoder.vocab, special, {"image_token": "<image>"}, **names),
            patch_size=self.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)


@dataclass(frozen=True)
class QwenShape:
    """The sizes that set the parameter shapes of one Qwen2.5-VL. first_special: id of <|endoftext|>; limits: fewest and
    most visual tokens of an image."""

    decoder: DecoderShape
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    full_attention: tuple[int, ...]
    sections: tuple[int, int, int]
    tied: bool
    first_special: int
    limits: tuple[int, int] = (4, 16384)

    def config(self, dtype: str) -> dict:
        """config.json as the hub's: flat, with `rope_scaling`."""
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "torch_dtype": dtype,
            **self.decoder.config(),
            "hidden_act": "silu",
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": list(self.sections)},
            "use_sliding_window": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.first_special,
            "eos_token_id": self.first_special + 2,
            "vision_start_token_id": self.first_special + 9,
            "vision_end_token_id": self.first_special + 10,
            "image_token_id": self.first_special + 12,
            "video_token_id": self.first_special + 13,
            "vision_config": {
                "depth": self.vision_layers,
                "hidden_act": "silu",
                "hidden_size": self.vision_width,
                "intermediate_size": self.vision_mlp,
                "num_heads": self.vision_heads,
                "in_chans": 3,
                "out_hidden_size": self.decoder.width,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
                "fullatt_block_indexes": list(self.full_attention),
            },
        }

    def save_companions(self, folder: Path) -> None:
        """Tokenizer and image processor files."""
        _qwen_tokenizer(self.decoder.vocab, self.first_special).save_pretrained(folder)
        fewest, most = (tokens * 28**2 for tokens in self.limits)
        transformers.Qwen2VLImageProcessorPil(min_pixels=fewest, max_pixels=most).save_pretrained(folder)


@dataclass(frozen=True)
class Qwen3Shape:
    """The sizes that set the parameter shapes of one Qwen3-VL. deepstack: blocks of the tower; table: its learned
    positions. first_special: id of <|endoftext|>; limits: fewest and most visual tokens of an image."""

    decoder: DecoderShape
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    deepstack: tuple[int, ...]
    tied: bool
    head_dim: int = 128
    sections: tuple[int, int, int] = (24, 20, 20)
    patch: int = 16
    table: int = 2304
    first_special: int = 151643
    limits: tuple[int, int] = (64, 16384)

    def config(self, dtype: str) -> dict:
        """config.json as the hub's: nested, with `rope_scaling`."""
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "tie_word_embeddings": self.tied,
            "vision_start_token_id": self.first_special + 9,
            "vision_end_token_id": self.first_special + 10,
            "image_token_id": self.first_special + 12,
            "video_token_id": self.first_special + 13,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "dtype": dtype,
                **self.decoder.config(),
                "head_dim": self.head_dim,
                "attention_bias": False,
                "hidden_act": "silu",
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-6,
                "rope_theta": 5000000,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": list(self.sections),
                    "rope_type": "default",
                },
                "bos_token_id": self.first_special,
                "eos_token_id": self.first_special + 2,
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": self.vision_layers,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": self.vision_width,
                "intermediate_size": self.vision_mlp,
                "num_heads": self.vision_heads,
                "num_position_embeddings": self.table,
                "in_channels": 3,
                "out_hidden_size": self.decoder.width,
                "patch_size": self.patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "deepstack_visual_indexes": list(self.deepstack),
            },
        }

    def save_companions(self, folder: Path) -> None:
        """Tokenizer and image processor files."""
        _qwen_tokenizer(self.decoder.vocab, self.first_special).save_pretrained(folder)
        fewest, most = (tokens * (2 * self.patch) ** 2 for tokens in self.limits)
        half = [0.5] * 3
        transformers.Qwen2VLImageProcessorPil(
            patch_size=self.patch, min_pixels=fewest, max_pixels=most, image_mean=half, image_std=half
        ).save_pretrained(folder)


Shape = LlavaShape | QwenShape | Qwen3Shape

_CLIP_L = (1024, 4096, 24, 16, 336)
_QWEN_TOWER = (1280, 3420, 32, 16, (7, 15, 23, 31), (16, 24, 24))
_QWEN_TOWER_LARGE = (1280, 3456, *_QWEN_TOWER[2:])

_QWEN3_SMALL = (1024, 4096, 24, 16, (5, 11, 17))
_QWEN3_LARGE = (1152, 4304, 27, 16, (8, 16, 24))

SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": LlavaShape(DecoderShape(32064, 4096, 11008, 32, 32, 32), *_CLIP_L),
    "llava-1.5-13b": LlavaShape(DecoderShape(32064, 5120, 13824, 40, 40, 40), *_CLIP_L),
    # A two-core CPU runs it in a second; the tower has the share of the whole that CLIP-L has of the 7B.
    "bench-llava": LlavaShape(DecoderShape(32064, 1024, 2816, 16, 16, 16), 256, 1024, 12, 4, 336),
    "llava-small": LlavaShape(DecoderShape(2048, 512, 1376, 12, 8, 8), 256, 1024, 6, 4, 112),
    "llava-tiny": LlavaShape(DecoderShape(384, 32, 48, 4, 4, 4), 24, 40, 3, 2, 56),
    "llava-tiny-gqa": LlavaShape(DecoderShape(384, 32, 48, 4, 4, 2), 24, 40, 3, 2, 56),
    "qwen2.5-vl-3b": QwenShape(DecoderShape(151936, 2048, 11008, 36, 16, 2), *_QWEN_TOWER, True, 151643),
    "qwen2.5-vl-7b": QwenShape(DecoderShape(152064, 3584, 18944, 28, 28, 4), *_QWEN_TOWER, False, 151643),
    "qwen2.5-vl-32b": QwenShape(DecoderShape(152064, 5120, 27648, 64, 40, 8), *_QWEN_TOWER_LARGE, False, 151643),
    "qwen2.5-vl-72b": QwenShape(DecoderShape(152064, 8192, 29568, 80, 64, 8), *_QWEN_TOWER_LARGE, False, 151643),
    "qwen-tiny": QwenShape(
        DecoderShape(384, 32, 48, 4, 4, 2), 24, 40, 4, 2, (1, 3), (1, 2, 1), False, 320, limits=(4, 64)
    ),
    "qwen3-vl-2b": Qwen3Shape(DecoderShape(151936, 2048, 6144, 28, 16, 8), *_QWEN3_SMALL, True),
    "qwen3-vl-4b": Qwen3Shape(DecoderShape(151936, 2560, 9728, 36, 32, 8), *_QWEN3_SMALL, True),
    "qwen3-vl-8b": Qwen3Shape(DecoderShape(151936, 4096, 12288, 36, 32, 8), *_QWEN3_LARGE, False),
    "qwen3-vl-32b": Qwen3Shape(DecoderShape(151936, 5120, 25600, 64, 64, 8), *_QWEN3_LARGE, False),
    "qwen3-tiny": Qwen3Shape(
        DecoderShape(384, 32, 48, 4, 4, 2),
        *(24, 40, 4, 2, (0, 2)),
        False,
        head_dim=12,
        sections=(2, 2, 2),
        patch=4,
        table=36,
        first_special=320,
        limits=(4, 64),
    ),
}


def _qwen_tokenizer(vocab: int, first_special: int) -> transformers.PreTrainedTokenizerFast:
    """Special tokens at the hub's distances."""
    names = {0: "endoftext", 1: "im_start", 2: "im_end", 9: "vision_start", 10: "vision_end", 12: "image_pad"}
    names |= {13: "video_pad"}
    special = {first_special + at: f"<|{name}|>" for at, name in names.items()}
    extra = {name: f"<|{name}|>" for name in names.values()}
    return _byte_tokenizer(vocab, special, extra, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _byte_tokenizer(
    vocab: int, special: dict[int, str], extra: dict[str, str], **tokens: str
) -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens. Every id of the model has a name, so that random output can be decoded."""
    free = iter([*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<extra_{i}>" for i in range(vocab))])
    names = [special[i] if i in special else next(free) for i in range(vocab)]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=extra, **tokens)
