"""What kind of device JAX computes on where nothing else is said."""

import jax


def on_gpu() -> bool:
    """Whether it is a GPU: some products are written in another way there, with the same result.

    `jax.default_device` is not asked: on a machine with a GPU these ways are taken on its processor as well.
    """
    return jax.default_backend() == "gpu"
