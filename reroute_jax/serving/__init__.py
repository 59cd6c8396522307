"""A server that routes: continuous batching on static shapes, and an OpenAI-style endpoint in front of it."""
