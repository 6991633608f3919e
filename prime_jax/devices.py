"""What the device is that JAX computes on by itself."""

import jax


def on_gpu() -> bool:
    """Whether that is a GPU: some products are written in another way there, with the same result."""
    return jax.default_backend() == "gpu"
