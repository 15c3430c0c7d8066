#!/usr/bin/env bash
# One rank, as srun starts it: rank.sh COMMAND ARGUMENT... Its number is in SLURM_PROCID, which the command reads.
set -uo pipefail

# The interface through which this node reaches rank 0 is the one that collectives use. Left alone, Gloo takes the one
# that the node's own name resolves to, which on many systems is the loopback interface, and NCCL the first that it
# finds; NCCL uses InfiniBand for the data by itself and this only to get in touch.
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] || [ -z "${NCCL_SOCKET_IFNAME:-}" ]; then
    address=$(getent ahosts "$MASTER_ADDR" | sed -n '1s/ .*//p')
    source_address=$(ip -oneline route get "$address" 2> /dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p')
    interface=$(ip -oneline address show 2> /dev/null | sed -n "s|^[0-9]*: *\([^ ]*\) *inet6* $source_address/.*|\1|p")
    if [ -z "$interface" ]; then
        echo "note: no interface towards $MASTER_ADDR found; Gloo and NCCL choose theirs (set GLOO_SOCKET_IFNAME," \
            "NCCL_SOCKET_IFNAME in slurm/settings.sh)"
    else
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
        export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
    fi
fi

# Slurm signals every process of a rank. The command knows what they mean; this shell waits for it.
trap : TERM INT USR1 USR2
"$@"
status=$?
case $status in
    75) ;;           # asks to be started again
    138 | 140)       # died of USR1 or USR2 before it could catch them: starting, or making the product at the end
        status=75 ;; # nothing is lost, the newest checkpoint is as good as it was
    *) exit $status ;;
esac
touch "$LDM_RESTART_MARK"
exit $status
