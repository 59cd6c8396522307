"""Measurements and the inputs they need; nothing here is imported by the library."""
