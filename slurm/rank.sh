#!/usr/bin/env bash
# One rank, as srun starts it: rank.sh COMMAND ARGUMENT... Its number is in SLURM_PROCID, which the command reads.
set -uo pipefail

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
