"""Backbones: one file composes one family."""
