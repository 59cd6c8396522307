"""PyTorch against JAX, number by number."""
