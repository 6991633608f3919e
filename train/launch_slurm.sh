#!/bin/bash
# One training run on several nodes of a Slurm cluster: one task per node, which drives all of its GPUs.
#
#   sbatch train/launch_slurm.sh configs/prime_base.yaml runs/base --data.path /shared/my-data
#
# The first argument is the configuration, the second the run folder, the rest settings. The folder must be on
# storage that every node sees. Two minutes before the time limit, and when the job is preempted, every task
# gets SIGTERM, saves and stops; the job is then put back in the queue and goes on where it stopped.
#SBATCH --job-name=prime-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: sbatch $0 CONFIG RUN [--section.name VALUE ...]" >&2
  exit 2
fi
config=$1 run=$2
shift 2

# A run folder that holds a checkpoint is gone on with; settings are then those it was started with.
resume=()
for manifest in "$run"/checkpoints/*/manifest.json; do
  if [[ -e $manifest ]]; then resume=(--resume); fi
done

# Since Slurm 22.05 srun does not take over --cpus-per-task; a task would feed all GPUs of its node from one core.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

status=0
srun --kill-on-bad-exit=0 python -m prime_jax.train --config "$config" --out "$run" "${resume[@]}" "$@" || status=$?

# 130: stopped by a signal, with everything saved.
if [[ $status -eq 130 && -n ${SLURM_JOB_ID:-} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  status=0
fi
exit "$status"
