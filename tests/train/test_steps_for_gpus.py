"""Every kind of training step compiles for a GPU.

XLA refused Llama's: it could not compile a concatenation of what was computed just before, on GPUs alone.
"""

from typing import Any

import jax.numpy as jnp
import pytest
from gpu_compiler import compiled, needs_gpu_compiler, there
from test_compute_dtype import STEPS, lowered

from prime_jax.nn import attention

pytestmark = needs_gpu_compiler


CASES = [(name, jnp.bfloat16) for name in STEPS if name != "rotated batches"]  # whose QR is no part of XLA
CASES += [("prime", jnp.float32)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_step_compiles(name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "on_gpu", lambda: True)
    assert compiled(lowered(**STEPS[name][1], dtype=dtype, placed=there))
