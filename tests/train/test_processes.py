"""Where a process finds its siblings, from plain environments; and that real processes join."""

import socket
import subprocess
import sys

import pytest
from commands import environment

from prime_jax.errors import ConfigError
from prime_jax.train.processes import Processes, connected, detect, first_host

SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_LOCALID": "1",
}
KUBERNETES = {
    "PRIME_COORDINATOR": "prime-workers-0-0.prime:8476",
    "PRIME_NUM_PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "PMIX_NAMESPACE": "prterun-1",
}
JOIN = """
import os, sys
import jax, numpy as np
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from prime_jax.errors import ConfigError
from prime_jax.train import processes
processes.START_TIMEOUT = int(sys.argv[1])
try:
    with processes.connected(os.environ):
        rows = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
        mine = np.array([10.0 ** jax.process_index()], np.float32)
        values = jax.make_array_from_process_local_data(rows, mine)
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(rows.mesh, PartitionSpec()))(values)
        print("total", float(total), "GPUs", CUDA_VISIBLE_DEVICES.value)
except ConfigError as mistake:
    sys.exit(str(mistake))
"""


def join(*environs: dict[str, str], timeout: int = 300) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of processes that sum 1, 10, 100 ... over all of them."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, str(timeout)],
            env=environment() | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environ in environs
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def listening() -> tuple[socket.socket, dict[str, str]]:
    """A taken port, and a coordinator there."""
    taken = socket.create_server(("", 0))
    return taken, {"PRIME_COORDINATOR": f"127.0.0.1:{taken.getsockname()[1]}"}


def test_alone() -> None:
    assert detect({}) is None
    assert detect({"SLURM_STEP_NUM_TASKS": "1"}) is None
    with connected({}):
        pass


def test_flags_come_first() -> None:
    found = detect(SLURM, "10.0.0.1:1234", 2, 1)
    assert found == Processes("10.0.0.1:1234", 2, 1, "flags")


def test_kubernetes() -> None:
    assert detect(KUBERNETES) == Processes("prime-workers-0-0.prime:8476", 4, 3, "Kubernetes")


def test_slurm_agrees_on_one_coordinator_and_gives_each_task_its_gpu() -> None:
    seeing_all = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    found = [detect(seeing_all | {"SLURM_PROCID": str(index)}) for index in range(8)]
    assert len({one.coordinator for one in found if one}) == 1
    assert [one.index for one in found if one] == list(range(8))
    first = found[0]
    assert first is not None
    assert first.coordinator.startswith("gpu003:")
    assert first.device == 1
    seeing_its_own = detect(SLURM | {"CUDA_VISIBLE_DEVICES": "3"})
    assert seeing_its_own is not None
    assert seeing_its_own.device is None
    alone_on_its_node = detect(seeing_all | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"})
    assert alone_on_its_node is not None
    assert alone_on_its_node.device is None
    other_job = detect(SLURM | {"SLURM_JOB_ID": "4712"})
    assert other_job is not None
    assert other_job.coordinator != first.coordinator


def test_open_mpi_on_one_machine_gives_each_process_its_gpu() -> None:
    here = detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"})
    assert here is not None
    assert (here.coordinator.split(":")[0], here.count, here.index, here.device) == ("127.0.0.1", 4, 2, 2)


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}, "10.96.0.1"),
        ({"OMPI_MCA_orte_hnp_uri": "13.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"}, "[fe80::b9b:ac5d]"),
        ({"PRIME_COORDINATOR": "node1:1234"}, "node1"),
        # mpirun within a Slurm job: these variables are those of the daemon that started the process
        ({"PRIME_COORDINATOR": "node1:1234", **SLURM}, "node1"),
    ],
)
def test_open_mpi_on_many_machines(variables: dict, host: str) -> None:
    many = detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"} | variables)
    assert many is not None
    assert many.coordinator.rpartition(":")[0] == host
    assert (many.count, many.index, many.device, many.origin) == (4, 2, None, "Open MPI")


def test_slurms_coordinator_can_be_overruled() -> None:
    found = detect(SLURM | {"PRIME_COORDINATOR": "fast-network:1234"})
    assert found is not None
    assert (found.coordinator, found.index, found.origin) == ("fast-network:1234", 5, "Slurm")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-010,17],login1", "gpu003"),
        ("node7", "node7"),
        ("a-b[1,5]", "a-b1"),
        ("x1,x2", "x1"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, ("a:1", None, None), "--num-processes, --process-id missing"),
        ({}, ("a:1", 2, 2), "no process 2 among 2"),
        ({}, ("host", 2, 0), "must be host:port"),
        ({}, (":1234", 2, 0), "must be host:port"),
        ({}, ("host:99999", 2, 0), "port 1 to 65535"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (), "mpirun -x PRIME_COORDINATOR=host:port"),
        ({"PRIME_COORDINATOR": "a:1"}, (), "PRIME_NUM_PROCESSES is not"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "x"}, (), "JOB_COMPLETION_INDEX is 'x', not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, (), "SLURM_PROCID is not; start with srun"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, (), "cannot read the node list"),
    ],
)
def test_what_is_incomplete_or_wrong_is_named(environ: dict, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(environ, *flags)


def test_two_processes_sum_a_value_and_keep_every_gpu_of_their_nodes() -> None:
    """Also where JAX would recognise Slurm and leave each process a single GPU."""
    taken, coordinator = listening()
    taken.close()
    one_per_node = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    one_per_node |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", **coordinator}
    ended = join(*(one_per_node | {"SLURM_PROCID": str(index)} for index in range(2)))
    for code, said, complaints in ended:
        assert code == 0, complaints
        assert "total 11.0 GPUs all" in said


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_process_without_its_sibling_ends_in_plain_words(index: str) -> None:
    taken, coordinator = listening()
    taken.close()
    ((code, _, complaints),) = join(
        KUBERNETES | coordinator | {"PRIME_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": index}, timeout=2
    )
    assert code == 2
    assert f"process {index} of 2 (Kubernetes): not all processes met at 127.0.0.1:" in complaints
    assert "stack trace" not in complaints


def test_a_taken_port_is_named() -> None:
    taken, coordinator = listening()
    with taken:
        ((code, _, complaints),) = join(KUBERNETES | coordinator | {"JOB_COMPLETION_INDEX": "0"})
    assert code == 1
    assert f"cannot listen at {coordinator['PRIME_COORDINATOR']}" in complaints
    assert "another program may be using the port" in complaints
