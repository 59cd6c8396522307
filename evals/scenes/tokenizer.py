"""The word-level tokenizers of the embedded models.

One token a word, one a coordinate with its punctuation (so an answer of four tokens reads `[0.12, 0.30, 0.45, 0.66]`
when they are joined by spaces), and one for each fixed sentence of an evaluation prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.scenes.questions import WORDS
from evals.scenes.world import GRIDS, TOKEN
from reroute_jax.models import qwen3_vl

VQA_PHRASE = "Answer the question using a single word or phrase."
FORMAT_PHRASE = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1."
)
REC_PHRASE = "Please provide the bounding box coordinate of the region this sentence describes:"
SYSTEM_PHRASE = "system\nYou are a helpful assistant."
JSON_PHRASE = "in this image and output the bbox coordinates in JSON format."
MATCH_PHRASE = 'Locate every object that matches the description "'
REPORT_PHRASE = '" in the image. Report bbox coordinates in JSON format.'


@dataclass(frozen=True)
class Dialect:
    """The tokens of a family that are no words, and the order in which a conversation puts them.

    special: the tokenizer's own, first ids. fixed: sentences and roles. coordinates: one format a corner. numbers:
    what can stand there, evenly spaced from 0 on. far_side: what stands for the image's far side, None where numbers
    are pixels.
    opening, closing: around the image tokens. locate: around a referring expression; brief: an opening that stands in
    for it in a part of the training prompts. reply: between a question and its answer.
    """

    special: tuple[str, ...]
    pad: str
    unknown: str
    image: str
    end: str
    fixed: tuple[str, ...]
    coordinates: tuple[str, str, str, str]
    numbers: tuple[float, ...]
    far_side: float | None
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    locate: tuple[tuple[str, ...], tuple[str, ...]]
    brief: tuple[str, ...] | None
    reply: tuple[str, ...]
    chat_template: str

    def tokens(self) -> list[str]:
        """Every token in the order of its id."""
        return [*self.special, *self.fixed, *WORDS, *self.coordinate_tokens()]

    @property
    def density(self) -> float:
        """Numbers that make one unit of a coordinate."""
        return (len(self.numbers) - 1) / self.numbers[-1]

    def coordinate_tokens(self) -> list[str]:
        forms = dict.fromkeys(self.coordinates)
        return [form.format(number) for form in forms for number in self.numbers]


_LLAVA = Dialect(
    special=("<pad>", "<s>", "</s>", "<unk>", "<image>"),
    pad="<pad>",
    unknown="<unk>",
    image="<image>",
    end="</s>",
    fixed=("USER:", "ASSISTANT:", FORMAT_PHRASE, REC_PHRASE, VQA_PHRASE),
    coordinates=("[{:.2f},", "{:.2f},", "{:.2f},", "{:.2f}]"),
    numbers=tuple(value / 100 for value in range(101)),
    far_side=1.0,
    opening=("<s>", "USER:"),
    closing=(),
    locate=((FORMAT_PHRASE, REC_PHRASE), ()),
    brief=(REC_PHRASE,),
    reply=("ASSISTANT:",),
    chat_template=(
        "{% for message in messages %}"
        "{{ message['role'].upper() + ': ' }}"
        "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
)

# The forms keep the repetition penalty away from numbers that an earlier corner used, but for x2 equal to y1.
_QWEN = Dialect(
    special=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    ),
    pad="<|endoftext|>",
    unknown="<unk>",
    image="<|image_pad|>",
    end="<|im_end|>",
    fixed=(SYSTEM_PHRASE, "user", "assistant", "Locate", JSON_PHRASE, VQA_PHRASE),
    coordinates=('[{{"bbox_2d":[{},', "{},", "{},", "{}]}}]"),
    numbers=tuple(range(max(max(grid) for grid in GRIDS["qwen2_5_vl"]) * TOKEN + 1)),
    far_side=None,
    opening=("<|im_start|>", SYSTEM_PHRASE, "<|im_end|>", "<|im_start|>", "user", "<|vision_start|>"),
    closing=("<|vision_end|>",),
    locate=(("Locate",), (JSON_PHRASE,)),
    brief=None,
    reply=("<|im_end|>", "<|im_start|>", "assistant"),
    chat_template=(
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% else %}{{ content['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
)

_QWEN3 = Dialect(
    special=_QWEN.special,
    pad=_QWEN.pad,
    unknown=_QWEN.unknown,
    image=_QWEN.image,
    end=_QWEN.end,
    fixed=("user", "assistant", MATCH_PHRASE, REPORT_PHRASE, VQA_PHRASE),
    coordinates=_QWEN.coordinates,
    numbers=tuple(range(0, 1001, 10)),
    far_side=1000,
    opening=("<|im_start|>", "user", "<|vision_start|>"),
    closing=_QWEN.closing,
    locate=((MATCH_PHRASE,), (REPORT_PHRASE,)),
    brief=None,
    reply=_QWEN.reply,
    chat_template=qwen3_vl.CHAT_TEMPLATE,
)

DIALECTS = {"llava": _LLAVA, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN3}


@cache
def vocabulary(family: str = "llava") -> Mapping[str, int]:
    return MappingProxyType({token: index for index, token in enumerate(DIALECTS[family].tokens())})


def build_tokenizer(family: str = "llava") -> PreTrainedTokenizerFast:
    dialect, vocab = DIALECTS[family], vocabulary(family)
    tokenizer = Tokenizer(models.WordLevel(dict(vocab), unk_token=dialect.unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("?", " ?"), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": dialect.unknown, "pad_token": dialect.pad, "eos_token": dialect.end}
    if family == "llava":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
        names["bos_token"] = "<s>"
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dialect.special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, lstrip=True) for token in dialect.fixed])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={"image_token": dialect.image},
        chat_template=dialect.chat_template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **names,
    )
