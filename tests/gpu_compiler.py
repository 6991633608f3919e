"""XLA's compiler for GPUs, on a machine without one: whether a program compiles for an H100 at all.

It is part of JAX's plugin for CUDA, which `make programs` puts into a folder of its own: in the environment
itself every process would look for a GPU. Kernels are taken by rule and not timed, and products are left to
cuBLAS, whose calls need no compiling.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jaxlib import xla_client

FOLDER = os.environ.get("PRIME_JAX_GPU_COMPILER", "")
needs_gpu_compiler = pytest.mark.skipif(not FOLDER, reason="PRIME_JAX_GPU_COMPILER names no folder")
OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def sharding() -> jax.sharding.Sharding:
    """The one device of a machine with an H100, which is not here."""
    plugin = next(Path(FOLDER).glob("jax_plugins/xla_cuda*/xla_cuda_plugin.so"))
    interface = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    if not xla_client.pjrt_plugin_initialized("cuda"):
        xla_client.initialize_pjrt_plugin("cuda")
    made = xla_client.make_c_api_device_topology(interface, "", target_config=H100, topology="1x1x1")
    devices = topologies.TopologyDescription(made._make_compile_only_devices()).devices
    return jax.sharding.SingleDeviceSharding(devices[0])


def there(tree: Any) -> Any:
    """The shapes of arrays, on that device."""
    where = sharding()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)


def compiled(lowered: Any) -> str:
    """Compile what was lowered for arguments that are there; gives the optimised program as text."""
    text: str = lowered.compile(compiler_options=OPTIONS).as_text()
    return text
