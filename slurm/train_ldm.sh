#!/usr/bin/env bash
# Train a diffusion model (stage 2) on a Slurm cluster, one srun task per rank. From the repository's root:
#
#   sbatch slurm/train_ldm.sh experiment=sd2 data.manifest=/data/manifest.json artifact=runs/kl_f8/artifact
#
# Every argument is an override of `ldm-scale train`. The cluster's partition, account, modules and container go into
# slurm/settings.sh (see settings.example.sh). The job comes back by itself, and continues from the newest checkpoint of
# its run folder, at its time limit, after `scancel --signal=USR1` or USR2, a preemption, `scontrol requeue` and the
# failure of a node; a hang that was ended counts as such. `scancel` writes a checkpoint and ends it; the same command
# continues. A job that fails by itself stays ended, and so does one that comes back again and again without progress.
#
# Resources, in one place; each can be given to sbatch instead (sbatch --nodes=1 ... slurm/train_ldm.sh ...).
#SBATCH --job-name=train_ldm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# USR1 to every rank 5 minutes before the time limit (Slurm may send it a minute earlier): longer than a step, a
# validation with pictures and a checkpoint take together. The job then requeues itself.
#SBATCH --signal=USR1@300
# Back into the queue after a node failure or a preemption, whatever the cluster's default.
#SBATCH --requeue
# One log per job, which goes on when the job comes back. Slurm makes no folders; this one is in the repository.
#SBATCH --output=slurm/logs/%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# Slurm runs a copy of this file from its spool: the repository is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:-"$(dirname "$0")/.."}"
if [ ! -f slurm/job.sh ]; then
    echo "error: $(pwd) is not the root of ldm-scale; run sbatch there" >&2
    exit 1
fi
# shellcheck source=slurm/job.sh
source slurm/job.sh

# --kill-on-bad-exit: a rank that died would otherwise leave the others waiting in a collective until its timeout.
# --wait: all ranks leave together; one that is not out a minute after the first is stuck.
run_ranks --kill-on-bad-exit=1 --wait=60 -- ldm_scale/train.py "$@"
