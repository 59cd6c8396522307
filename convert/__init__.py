"""Hugging Face checkpoints to JAX parameters: `python -m convert SRC OUT`."""
