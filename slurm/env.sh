# shellcheck shell=bash
# The environment of every job in slurm/: sourced, with the repository's root as the working directory.
# A cluster's own modules (CUDA, an NCCL plugin for its network) belong here, in one place for all jobs.

if [ ! -x .venv/bin/python ]; then
    echo "error: $(pwd)/.venv is missing; run 'make env' in this folder on a node that reaches the package index" >&2
    exit 1
fi
# shellcheck source=/dev/null
source .venv/bin/activate

# Python's output appears as it is written: the log of a job that hangs or dies ends where the job did.
export PYTHONUNBUFFERED=1

# CPU threads of one rank. Without it each rank takes all cores of its node for its own.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# NCCL. The variables that matter on most clusters; each is a default, set yours before sbatch to win:
#   NCCL_SOCKET_IFNAME  interface of the cluster's network, where hosts have several (such as ib0 or bond0)
#   NCCL_IB_DISABLE=1   without InfiniBand or RoCE
#   NCCL_DEBUG=INFO     what NCCL chose, once per rank: the first thing to read when a start hangs
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that a lost node will never join becomes an error of all ranks instead of a job that waits for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
