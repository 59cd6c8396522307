"""Plug-in for lmms-eval v0.7.1: `--model reroute_jax`, and grounding tasks with the reference's patches.

lmms-eval is imported by none of the project's own commands; it finds `manifest` through an entry point.
"""

from pathlib import Path

MODEL = "reroute_jax"
TASKS = Path(__file__).parent / "tasks"  # for lmms-eval's --include_path


def manifest():
    """lmms-eval's description of the model class, which is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.adapter.RerouteJax")
