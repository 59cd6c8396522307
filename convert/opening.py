"""A checkpoint with the configuration that its files have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert.families import table_of
from convert.safetensors import equal, list_folder
from convert.source import Source, open_source
from convert.table import hf_key
from reroute_jax.config import ModelConfig
from reroute_jax.models import read_config

_TIED = "tie_word_embeddings"


def open_checkpoint(path: str | Path) -> tuple[Source, ModelConfig]:
    """The checkpoint, and its configuration from config.json, generation_config.json and the weights' headers.

    An output head that differs from the embeddings counts as the model's own, whatever config.json says of tied
    embeddings (as in transformers, `PreTrainedModel.tie_weights`). Raises RerouteError for what cannot be read.
    """
    source = open_source(path)
    config = read_config(source.config, source.generation)
    if source.manifest is None and config.decoder.tied_head:
        untied = source.config | {_TIED: False}
        if _has_own_head(source, read_config(untied, source.generation)):
            source = replace(source, config=untied)
            config = read_config(source.config, source.generation)
    return source, config


def _has_own_head(source: Source, untied: ModelConfig) -> bool:
    table = table_of(untied)
    named = {table.canonical(tensor.key): tensor for tensor in list_folder(source.folder)}
    head, embeddings = (named.get(hf_key(table, path)[0]) for path in ("decoder.head.kernel", "decoder.embed.table"))
    return head is not None and embeddings is not None and not equal(head, embeddings)
