"""The word-level tokenizer of the embedded models.

One token a word, one a coordinate with its punctuation (so an answer of four tokens reads `[0.12, 0.30, 0.45, 0.66]`
when they are joined by spaces), and one for each fixed sentence of an evaluation prompt.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.scenes.questions import WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
FORMAT_PHRASE = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1."
)
REC_PHRASE = "Please provide the bounding box coordinate of the region this sentence describes:"
VQA_PHRASE = "Answer the question using a single word or phrase."
PHRASES = (FORMAT_PHRASE, REC_PHRASE, VQA_PHRASE)
BINS = 101  # coordinates 0.00 .. 1.00
COORDINATE_FORMS = ("[{:.2f},", "{:.2f},", "{:.2f},", "{:.2f}]")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def coordinate_tokens() -> list[str]:
    """The 303 coordinate tokens: opening, middle, closing, each 0.00 to 1.00."""
    forms = dict.fromkeys(COORDINATE_FORMS)
    return [form.format(value / (BINS - 1)) for form in forms for value in range(BINS)]


def vocabulary() -> dict[str, int]:
    tokens = [*SPECIAL, *ROLES, *PHRASES, *WORDS, *coordinate_tokens()]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("?", " ?"), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, lstrip=True) for token in (*ROLES, *PHRASES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
