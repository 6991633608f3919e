"""How the processes of a training run find each other: explicit flags, Slurm, Open MPI, Kubernetes."""

import os
import re
import socket
import sys
import threading
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
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
            raise ConfigError(
                f"{self.origin}: the coordinator {self.coordinator!r} must be host:port, port 1 to 65535"
            )
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError(f"{self.origin}: there is no process {self.index} among {self.count}")


def detect(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes | None:
    """What the flags or the launcher's environment say; None for a process on its own.

    Looks, in this order, at the flags, at Open MPI (within a Slurm job, Slurm's variables describe mpirun's
    helpers), at Slurm, and at PRIME_COORDINATOR with PRIME_NUM_PROCESSES and JOB_COMPLETION_INDEX (an indexed
    Kubernetes Job, train/jobset.yaml). PRIME_COORDINATOR=host:port also overrules the choice made for the
    other two.

    Raises:
        ConfigError: If flags or variables are incomplete or contradict each other.
    """
    flags = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) < len(flags):
        if coordinator is None or count is None or index is None:
            raise ConfigError(f"{', '.join(missing)} missing: several processes need all three flags")
        return Processes(coordinator, count, index, "flags")
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _open_mpi(environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(environ)
    if "PRIME_COORDINATOR" in environ:
        return _kubernetes(environ)
    return None


@contextmanager
def connected(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Iterator[None]:
    """While the block runs, this process is one of the run's (see `detect`); nothing happens for one alone.

    If not all processes come within START_TIMEOUT, this one ends with a line on stderr and exit code 2.

    Raises:
        ConfigError: If this process cannot take its place, for instance because the port is in use.
    """
    found = detect(environ, coordinator, count, index)
    if found is None or found.count == 1:
        yield
        return
    if found.index == 0:
        _check_port(found)
    device = None if found.device is None else [found.device]
    patience = threading.Timer(START_TIMEOUT, _give_up, [found])
    patience.daemon = True
    patience.start()
    try:
        # Left to detect a launcher, JAX would give each process one GPU, also where it is alone on its node.
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            local_device_ids=device,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * START_TIMEOUT,
        )
    except (RuntimeError, ValueError) as failed:
        raise ConfigError(
            f"{_who(found)} cannot join {found.coordinator}: {str(failed).splitlines()[0]}"
        ) from None
    finally:
        patience.cancel()
    yield  # after an error the others must not be waited for; the coordinator notices that this one is gone
    jax.distributed.shutdown()


def _who(found: Processes) -> str:
    return f"process {found.index} of {found.count} ({found.origin})"


def _check_port(found: Processes) -> None:
    """Refuse a port that another program listens on; JAX's coordinator may crash there."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    port = int(found.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as taken:
        raise ConfigError(
            f"{_who(found)} cannot listen at {found.coordinator}: {taken.strerror}; "
            "another program may be using the port"
        ) from None


def _give_up(found: Processes) -> None:
    """End a process whose siblings do not come; JAX's own timeout aborts it with a trace of C++ frames."""
    print(
        f"{_who(found)}: not all processes met at {found.coordinator} within {START_TIMEOUT} seconds; "
        "are all of them running, and can they reach that address?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)  # the main thread waits inside JAX, where no exception reaches it


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
    port = _port(environ["SLURM_JOB_ID"] + "." + environ.get("SLURM_STEP_ID", "0"))
    coordinator = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    alone = environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0] == "1"
    device = None if alone else _own_device(environ, "SLURM_LOCALID")
    return Processes(environ.get("PRIME_COORDINATOR", coordinator), count, index, "Slurm", device)


def _open_mpi(environ: Mapping[str, str]) -> Processes:
    count, index = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK", -1)
    here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0)
    launcher = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    port = _port(environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", "0")))
    if "PRIME_COORDINATOR" in environ:
        coordinator = environ["PRIME_COORDINATOR"]
    elif here == count:
        coordinator = f"127.0.0.1:{port}"
    elif launcher is not None:
        coordinator = f"{launcher[1] or f'[{launcher[2]}]'}:{port}"
    else:
        raise ConfigError(
            "this Open MPI does not say where its first process runs; "
            "name that machine and a free port: mpirun -x PRIME_COORDINATOR=host:port ..."
        )
    device = None if here <= 1 else _own_device(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    return Processes(coordinator, count, index, "Open MPI", device)


def _own_device(environ: Mapping[str, str], local_index: str) -> int | None:
    """The GPU of a process with siblings on its node; None where its launcher lets it see no other."""
    seen = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return None if len(seen) == 1 else _number(environ, local_index)


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
