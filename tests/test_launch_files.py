"""The launch files: what they would run, and that the processes they start find each other."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from prime_jax.train.processes import Processes, detect

TRAIN = Path(__file__).parents[1] / "train"


def submit(folder: Path, *arguments: str, ends_with: int = 0) -> tuple[int, list[str]]:
    """Run the Slurm script with doubles of srun and scontrol; its exit status and what it would have run."""
    tools, log = folder / "bin", folder / "log"
    tools.mkdir(exist_ok=True)
    log.write_text("")
    for name, status in (("srun", ends_with), ("scontrol", 0)):
        (tools / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "{log}"\nexit {status}\n')
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    command = ["bash", str(TRAIN / "launch_slurm.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, log.read_text().splitlines()


def test_slurm_starts_and_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, ran = submit(tmp_path, "c.yaml", str(run), "--train.seed", "1")
    assert status == 0
    assert ran == [
        f"srun --kill-on-bad-exit=0 python -m prime_jax.train --config c.yaml --out {run} --train.seed 1"
    ]
    (run / "checkpoints" / "5").mkdir(parents=True)
    assert "--resume" not in submit(tmp_path, "c.yaml", str(run))[1][0]  # cut off, no checkpoint
    (run / "checkpoints" / "5" / "manifest.json").touch()
    assert submit(tmp_path, "c.yaml", str(run))[1][0].endswith("--resume")


def test_slurm_tasks_get_their_cores(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\necho "$SRUN_CPUS_PER_TASK cores"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "32"}
    command = ["bash", str(TRAIN / "launch_slurm.sh"), "c.yaml", "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "32 cores\n"


def test_slurm_queues_again_what_was_stopped_and_only_that(tmp_path: Path) -> None:
    assert submit(tmp_path, "c.yaml", "run", ends_with=130)[0] == 0
    assert submit(tmp_path, "c.yaml", "run", ends_with=130)[1][-1] == "scontrol requeue 4711"
    status, ran = submit(tmp_path, "c.yaml", "run", ends_with=2)
    assert status == 2
    assert len(ran) == 1
    assert submit(tmp_path, "c.yaml") == (2, [])


@pytest.mark.parametrize("index", [0, 1])
def test_the_pods_of_the_jobset_find_each_other(index: int) -> None:
    jobset = yaml.safe_load((TRAIN / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    found = detect(environment | {"JOB_COMPLETION_INDEX": str(index)})
    # <jobset>-<job>-<replica>-<index>.<jobset> is the name JobSet gives to the first pod
    coordinator = f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}:8476"
    assert found == Processes(coordinator, spec["completions"], index, "Kubernetes")
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert container["ports"][0]["containerPort"] == 8476
    command = subprocess.run(["bash", "-n"], input=container["args"][0], text=True, timeout=60, check=False)
    assert command.returncode == 0
