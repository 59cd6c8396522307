"""Evaluation: benchmarks that run the library the way a published number is made, and the data they need."""
