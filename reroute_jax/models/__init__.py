"""The model families by the name that `config.json` calls them (`model_type`)."""

from reroute_jax.models import llava, qwen2_5_vl
from reroute_jax.models.family import Family

FAMILIES: dict[str, Family] = {"llava": llava.FAMILY, "qwen2_5_vl": qwen2_5_vl.FAMILY}
