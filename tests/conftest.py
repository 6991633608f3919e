"""Set-up of every test: eight CPU devices, checked array shapes, one folder of compiled programs for all."""

import atexit
import os
import shutil
import tempfile

DEVICES = "--xla_force_host_platform_device_count=8"
# Tests compile much and compute little. Where a GPU may run them, programs are compiled as users have them.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", DEVICES if shutil.which("nvidia-smi") else f"{DEVICES} {QUICKLY}")
os.environ["PRIME_JAX_CACHE"] = ""  # no test depends on, or leaves, compiled programs in the user's folder
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Many tests compile the same programs. The folder is new in every session and goes with it; pytest's
    # workers and the processes that tests start inherit it.
    COMPILED = tempfile.mkdtemp(prefix="prime-jax-tests-")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxtyping import install_import_hook

install_import_hook("prime_jax", "beartype.beartype")

from collections.abc import Iterator

import jax
import jaxtyping
import pytest

LONGEST = (
    "test_benchmarks_gpu.py",
    "test_killed.py",
    "test_step.py",
    "test_together.py",
    "test_sharding.py",
    "test_loop.py",
    "test_encoders.py",
    "test_jasper.py",
    "test_steered_step.py",
    "test_mcs_search.py",
    "test_trained_run.py",
    "test_steps_for_gpus.py",
    "test_format_2.py",
    "test_rotation.py",
    "test_programs_for_gpus.py",
    "test_layers.py",
    "test_target_head.py",
    "test_modern_bert.py",
    "test_hybrid.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that no worker is left alone with one at the end.

    Skip tests marked gpu where there is no GPU, unless PRIME_JAX_GPU_TESTS=cpu asks for a dry run of them.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if any(device.platform == "gpu" for device in jax.devices()) or (
        os.environ.get("PRIME_JAX_GPU_TESTS") == "cpu"
    ):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the shape checks of the tests' import hook, so that the library's own checks are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
