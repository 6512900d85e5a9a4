#!/usr/bin/env bash
# The same job as pretrain_88b.sh at toy size: 4 nodes of one CPU rank each, on the sample data.
#   sbatch examples/pretrain_tiny.sh [section.key=value ...]
#   examples/pretrain_tiny.sh                                   outside of SLURM: checks all, prints what would run
#   SUBMIT=1 examples/pretrain_tiny.sh                          checks all, then submits itself
#   DRY_RUN=1 examples/pretrain_tiny.sh                         prints what would run
#SBATCH --job-name=mmtiny
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 1  # $0 is SLURM's copy of this file

PRESET=${PRESET:-tiny} TRAIN_NODES=${TRAIN_NODES:-4} TASKS=1 GPUS=0 MARGIN_SECONDS=${MARGIN_SECONDS:-300}
RUN_DIR=${RUN_DIR:-$PWD/runs/${SLURM_JOB_NAME:-mmtiny}}
SETTINGS=(parallel.tp=2 parallel.pp=2 "$@")
ARGUMENTS=("$@")
. examples/launch.sh
