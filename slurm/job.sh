# shellcheck shell=bash
# What the jobs of this folder share: sourced by them, with the repository's root as the working directory.
# Rank by rank the work is done by rank.sh; what differs between clusters is in settings.sh.

# What is said to people must not end a job whose log lies on a full disk, which `set -e` would make of it.
echo() { builtin echo "$@" 2> /dev/null || :; }

python=(.venv/bin/python) # how a rank starts Python; settings.sh may put a container before it
srun_options=()
prepare_job() { :; }
if [ -f slurm/settings.sh ]; then
    # shellcheck source=slurm/settings.example.sh
    source slurm/settings.sh
fi

# Started by hand and not by sbatch, a job submits itself; sbatch takes partition and account from the SBATCH_*
# variables that settings.sh has exported.
if [ -z "${SLURM_JOB_ID:-}" ]; then
    exec sbatch "slurm/$(basename "$0")" "$@"
fi
for name in partition account; do
    wanted="SBATCH_${name^^}" given="SLURM_JOB_${name^^}"
    if [ -n "${!wanted:-}" ] && [ "${!wanted}" != "${!given:-}" ]; then
        echo "note: $wanted=${!wanted} of slurm/settings.sh was not in effect when this was submitted" \
            "(${!given:-none}); run the script itself without sbatch, or 'source slurm/settings.sh' before"
    fi
done
if [ ! -x "${python[0]}" ] && ! command -v "${python[0]}" > /dev/null; then
    echo "error: $(pwd)/${python[0]} is missing; run 'make env' in this folder on a node that reaches the package" \
        "index, or name another Python in slurm/settings.sh" >&2
    exit 1
fi

# --- the environment of all ranks; values that are set already win, from the shell that submits or from settings.sh

# Python's output appears as it is written: the log of a job that hangs or dies ends where the job did.
export PYTHONUNBUFFERED=1
# CPU threads of one rank's libraries. Without it each rank takes all cores of its node for its own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# What NCCL finds wrong; INFO says what it chose, once per rank: the first thing to read when a start hangs.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that a lost rank will never join becomes an error of all ranks instead of a job that waits for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Rendezvous: where rank 0 listens. The address is the one by which Slurm itself reaches the first node; its name need
# not be known to the other nodes' resolvers. A node with several networks: set MASTER_ADDR in settings.sh.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
node_address=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$node_address}"
# Jobs that share a host get ports of their own, below the range from which kernels number outgoing connections.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}"
# Each rank takes the interface that leads there for its collectives, unless GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
# name another.

# A rank that wants the job to be started again leaves this file: srun's own status is that of the worst rank, and those
# that it had to kill are worse.
export LDM_RESTART_MARK="$PWD/slurm/logs/.restart-$SLURM_JOB_ID"

# Slurm's signals go to the ranks. Those that reach this script as well (scancel --full, TERM at a job's end) must not
# end it before the ranks have saved.
is_ending=""
trap 'is_ending=yes' TERM
trap : USR1 USR2

# start_again REASON: puts this job back into the queue, under its own number.
start_again() {
    echo "$(date -Is) job $SLURM_JOB_ID: $1; it is requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    # Slurm missed a node in the meantime and has put the job back itself.
    scontrol show job "$SLURM_JOB_ID" | grep -q JobState=PENDING && exit 0
    echo "error: this cluster does not let jobs requeue themselves; submit the same command again to continue" >&2
    exit 75
}

# leave_if_ending STATUS: returns if Slurm has not told this job to end. It brings the job back itself if it is
# preempted, requeued or has lost a node; a requeue of ours would bring it back to life after scancel, too.
leave_if_ending() {
    [ -n "$is_ending" ] || return 0
    echo "$(date -Is) job $SLURM_JOB_ID: ended by Slurm; the ranks' status is $1"
    exit "$1"
}

# Whether a process can be started on each of the job's nodes.
nodes_answer() {
    timeout 60 srun --overlap --quiet --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --gpus-per-node=0 true > /dev/null 2>&1
}

# run_ranks SRUN-OPTION... -- SCRIPT ARGUMENT...: runs the script on every rank; does not return.
run_ranks() {
    local options=() status=0 reason="" limit_s
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    prepare_job
    rm -f "$LDM_RESTART_MARK"
    echo "$(date -Is) job $SLURM_JOB_ID (start $((${SLURM_RESTART_COUNT:-0} + 1))): ${SLURM_NTASKS:-?} ranks on" \
        "$SLURM_JOB_NODELIST, rendezvous at $MASTER_ADDR:$MASTER_PORT"
    # --cpus-per-task: since Slurm 22.05 srun no longer takes it over from the job.
    # --label: each line of the log begins with its rank.
    srun --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${options[@]}" "${srun_options[@]}" \
        bash slurm/rank.sh "${python[@]}" "$@" || status=$?
    [ "$status" -ne 0 ] || exit 0
    # The status, too: a full disk may not take the file.
    if [ -e "$LDM_RESTART_MARK" ] || [ "$status" -eq 75 ]; then
        reason="its ranks stopped to be started again"
    fi
    rm -f "$LDM_RESTART_MARK"
    leave_if_ending "$status"
    if ! nodes_answer; then
        leave_if_ending "$status"
        # Ranks that lost their peers end before Slurm knows that a node is lost. Slurm then requeues the job by itself,
        # without that node; a job that asked for it now could get the dead node again.
        limit_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
        echo "$(date -Is) job $SLURM_JOB_ID: a node does not answer; waiting for Slurm to notice" \
            "(SlurmdTimeout=$limit_s s)"
        sleep $((${limit_s:-300} + 60)) &
        wait $! || exit "$status" # Slurm's TERM
        reason="a node did not answer"
    fi
    leave_if_ending "$status"
    [ -z "$reason" ] || start_again "$reason"
    echo "$(date -Is) job $SLURM_JOB_ID: the ranks ended with status $status" >&2
    exit "$status"
}
