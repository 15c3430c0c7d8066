#!/usr/bin/env bash
# Encode a data set into latents on a Slurm cluster, one srun task per rank. From the repository's root:
#
#   sbatch slurm/encode_latents.sh runs/kl_f8/artifact /data/manifest.json --out /data/latents_kl_f8
#
# Every argument is one of `ldm-scale encode`. The ranks share the shards and never talk to each other, so a node that
# is lost takes only the shards with it that were under way. Submitted again with the same arguments, or requeued, the
# job keeps what is done; the number of ranks may be another one. Two minutes before the time limit every rank gets
# SIGTERM: it gives up its shard and writes the manifest of what there is, a mixture of latents and images that trains.
#
# Resources, in one place; each can be given to sbatch instead (sbatch --nodes=1 ... slurm/encode_latents.sh ...).
#SBATCH --job-name=ldm-scale-encode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# Slurm runs a copy of this file from its spool, so the repository is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:?error: submit this file with sbatch, from the root of the repository}"
if [ ! -f ldm_scale/encode.py ]; then
    echo "error: $(pwd) is not the root of ldm-scale; run sbatch there" >&2
    exit 1
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh

echo "$(date -Is) job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST"

# One process per core but one decodes pictures; arguments after it win.
workers=$((${SLURM_CPUS_PER_TASK:-1} > 1 ? SLURM_CPUS_PER_TASK - 1 : 1))
# --cpus-per-task: since Slurm 22.05 srun no longer takes it over from the job.
# shellcheck disable=SC2016  # the variables are each task's own
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
    exec python ldm_scale/encode.py "$@"
' rank --workers "$workers" "$@"
