# shellcheck shell=bash
# What your cluster wants to be told. Copy this file to slurm/settings.sh, which git ignores, and take the # away from
# what you need. Without settings.sh the jobs use the cluster's defaults and this folder's .venv.
#
# The file is sourced in two places: by a job when it starts on its first node, and by slurm/train_ldm.sh (and the
# others) when you run it without sbatch, which then submits itself. #SBATCH lines cannot read files; sbatch takes the
# same options from SBATCH_* variables, so with plain sbatch source this file first:
#     source slurm/settings.sh && sbatch slurm/train_ldm.sh experiment=sd2
# Or without that: slurm/train_ldm.sh experiment=sd2. An option on sbatch's command line wins over both.

# Who pays and where it runs. All SBATCH_* variables are in `man sbatch`, INPUT ENVIRONMENT VARIABLES.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=a100

# Modules; runs once in the job's script, and the ranks inherit the environment that it leaves.
# prepare_job() {
#     module load cuda nccl
# }

# How a rank starts Python: with a container before it, or another environment.
# python=(apptainer exec --nv --bind /data /containers/ldm-scale.sif python)
# python=(/shared/envs/ldm-scale/bin/python)

# More options of srun, such as pyxis' container (its Python is then `python=(python)`).
# srun_options=(--container-image=/containers/ldm-scale.sqsh --container-mounts="$PWD,/data" --container-workdir="$PWD")

# Network: where hosts have several. Otherwise the interface is the one that leads to the first node's address.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_DISABLE=1   # without InfiniBand or RoCE
