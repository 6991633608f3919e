"""Where a process finds its siblings, from plain environments."""

import pytest

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
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMIX_NAMESPACE": "prterun-1"}


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
    found = [detect(SLURM | {"SLURM_PROCID": str(index)}) for index in range(8)]
    assert len({one.coordinator for one in found if one}) == 1
    assert [one.index for one in found if one] == list(range(8))
    first = found[0]
    assert first is not None
    assert first.coordinator.startswith("gpu003:")
    assert first.device is None  # its own GPU is all it sees
    seeing_all = detect(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert seeing_all is not None
    assert seeing_all.device == 1
    other_job = detect(SLURM | {"SLURM_JOB_ID": "4712"})
    assert other_job is not None
    assert other_job.coordinator != first.coordinator


def test_open_mpi_on_one_machine_and_on_many() -> None:
    here = detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert here is not None
    assert (here.coordinator.split(":")[0], here.count, here.index) == ("127.0.0.1", 4, 2)
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    many = detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"} | uri)
    assert many is not None
    assert many.coordinator.startswith("10.96.0.1:")
    with pytest.raises(ConfigError, match="pass --coordinator"):
        detect(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


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
        ({"PRIME_COORDINATOR": "a:1"}, (), "PRIME_NUM_PROCESSES is not"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "x"}, (), "JOB_COMPLETION_INDEX is 'x', not a number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, (), "SLURM_PROCID is not; start with srun"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, (), "cannot read the node list"),
    ],
)
def test_what_is_incomplete_or_wrong_is_named(environ: dict, flags: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(environ, *flags)
