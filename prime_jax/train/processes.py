"""How the processes of a training run find each other: explicit flags, Slurm, Open MPI, Kubernetes."""

import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from prime_jax.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 20_000  # a job's port is one of these, the same in all of its processes
START_TIMEOUT = 300  # seconds until all processes must be there


@dataclass(frozen=True)
class Processes:
    """One process's place among its siblings.

    Attributes:
        coordinator: `host:port` of the first process.
        count: How many there are.
        index: Which one this is, from 0.
        origin: Who says so, for messages.
        device: The one local device this process uses, None for all it sees.
    """

    coordinator: str
    count: int
    index: int
    origin: str
    device: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ConfigError(f"{self.origin}: the coordinator {self.coordinator!r} must be host:port")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError(f"{self.origin}: there is no process {self.index} among {self.count}")


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes | None:
    """What the flags or the launcher's environment say; None for a process on its own.

    Looks, in this order, at the flags, at PRIME_COORDINATOR with PRIME_NUM_PROCESSES and JOB_COMPLETION_INDEX
    (an indexed Kubernetes Job, train/jobset.yaml), at Slurm, and at Open MPI.

    Raises:
        ConfigError: If flags or variables are incomplete or contradict each other.
    """
    flags = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) < len(flags):
        if coordinator is None or count is None or index is None:
            raise ConfigError(f"{', '.join(missing)} missing: several processes need all three flags")
        return Processes(coordinator, count, index, "flags")
    if "PRIME_COORDINATOR" in environ:
        return _kubernetes(environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(environ)
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _open_mpi(environ)
    return None


@contextmanager
def connected(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Iterator[None]:
    """While the block runs, this process is one of the run's (see `detect`); nothing happens for one alone.

    Raises:
        ConfigError: If the processes do not find each other in time.
    """
    found = detect(environ, coordinator, count, index)
    if found is None or found.count == 1:
        yield
        return
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            local_device_ids=None if found.device is None else [found.device],
            initialization_timeout=START_TIMEOUT,
        )
    except (RuntimeError, ValueError) as failed:
        raise ConfigError(
            f"process {found.index} of {found.count} ({found.origin}) cannot join {found.coordinator}: "
            f"{str(failed).splitlines()[0]}"
        ) from None
    yield  # after an error the others must not be waited for; the coordinator notices that this one is gone
    jax.distributed.shutdown()


def _kubernetes(environ: Mapping[str, str]) -> Processes:
    for name in ("PRIME_NUM_PROCESSES", "JOB_COMPLETION_INDEX"):
        if name not in environ:
            raise ConfigError(f"PRIME_COORDINATOR is set, but {name} is not")
    count, index = _number(environ, "PRIME_NUM_PROCESSES"), _number(environ, "JOB_COMPLETION_INDEX")
    return Processes(environ["PRIME_COORDINATOR"], count, index, "Kubernetes")


def _slurm(environ: Mapping[str, str]) -> Processes:
    for name in ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"):
        if name not in environ:
            raise ConfigError(f"SLURM_STEP_NUM_TASKS is set, but {name} is not; start with srun")
    host = first_host(environ["SLURM_STEP_NODELIST"])
    port = _port(environ["SLURM_JOB_ID"] + "." + environ.get("SLURM_STEP_ID", "0"))
    count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    seen = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    local = _number(environ, "SLURM_LOCALID", 0)
    several_here = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] != "1"
    # With several tasks on a node that all see all of its GPUs, each takes its own.
    device = local if several_here and len(seen) > 1 else None
    return Processes(f"{host}:{port}", count, index, "Slurm", device)


def _open_mpi(environ: Mapping[str, str]) -> Processes:
    count, index = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK", -1)
    job = environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", "0"))
    if _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) == count:
        host = "127.0.0.1"
    else:
        address = re.search(r"tcp://([^,:;]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        if address is None:
            raise ConfigError(
                "this Open MPI does not say where its first process runs; pass --coordinator host:port, "
                "--num-processes and --process-id, or set PRIME_COORDINATOR"
            )
        host = address.group(1)
    return Processes(f"{host}:{_port(job)}", count, index, "Open MPI")


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,17],login1` begins with `gpu003`."""
    match = re.match(r"([^,\[\]]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ConfigError(f"Slurm: cannot read the node list {nodes!r}")
    return match.group(1) + (match.group(2) or "")


def _port(job: str) -> int:
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, not a number") from None
