#!/usr/bin/env bash
# Train on a Slurm cluster, one srun task per rank. From the repository's root:
#
#   sbatch slurm/train_ldm.sh experiment=sd2 data.manifest=/data/manifest.json artifact=runs/kl_f8/artifact
#
# Every argument is an override of `ldm-scale train`. Submitted again with the same arguments it continues from the
# newest checkpoint of its run folder, and so it does when Slurm requeues it after a node failed or a preemption. Two
# minutes before the time limit every rank gets SIGTERM: a checkpoint is written and the job ends.
#
# Resources, in one place; each can be given to sbatch instead (sbatch --nodes=1 ... slurm/train_ldm.sh ...).
#SBATCH --job-name=ldm-scale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail

# Slurm runs a copy of this file from its spool, so the repository is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:?error: submit this file with sbatch, from the root of the repository}"
if [ ! -f ldm_scale/train.py ]; then
    echo "error: $(pwd) is not the root of ldm-scale; run sbatch there" >&2
    exit 1
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh

# The address by which Slurm itself reaches the first node: its name need not be known to the other nodes' resolvers.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Jobs that share a host get ports of their own, below the range from which kernels number outgoing connections.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT

echo "$(date -Is) job $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"

# --kill-on-bad-exit: a rank that died would otherwise leave the others waiting in a collective until its timeout.
# --cpus-per-task: since Slurm 22.05 srun no longer takes it over from the job.
# shellcheck disable=SC2016  # the variables are each task's own
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}"
    exec python ldm_scale/train.py "$@"
' rank "$@"
