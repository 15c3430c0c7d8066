#!/usr/bin/env bash
# Encode a data set into latents on a Slurm cluster, one srun task per rank. From the repository's root:
#
#   sbatch slurm/encode_latents.sh runs/kl_f8/artifact /data/manifest.json --out /data/latents_kl_f8
#
# Every argument is one of `ldm-scale encode`. The ranks share the shards and never talk to each other, so a rank that
# is lost takes only the shard with it that was under way. Submitted again with the same arguments, or requeued, the job
# keeps what is done; the number of ranks may be another one. It comes back by itself as training does (train_ldm.sh):
# a rank that is told to stop gives up its shard and writes the manifest of what there is, a mixture of latents and
# images that trains.
#
# Resources, in one place; each can be given to sbatch instead (sbatch --nodes=1 ... slurm/encode_latents.sh ...).
#SBATCH --job-name=encode_latents
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
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

# One process per core but one decodes pictures; arguments after it win.
workers=$((${SLURM_CPUS_PER_TASK:-1} > 1 ? SLURM_CPUS_PER_TASK - 1 : 1))
# --kill-on-bad-exit=0, --wait=0: ranks end when their shards are done, each for itself.
run_ranks --kill-on-bad-exit=0 --wait=0 -- ldm_scale/encode.py --workers "$workers" "$@"
