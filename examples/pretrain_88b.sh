#!/usr/bin/env bash
# Pretrain the 88B on 128 nodes of 8 GPUs: A100 in BF16, H100 and later in FP8.
#   sbatch examples/pretrain_88b.sh [section.key=value ...]
#   sbatch --nodes=130 --no-kill examples/pretrain_88b.sh       two spare nodes: restarts without the queue
#   for _ in 1 2 3; do sbatch examples/pretrain_88b.sh; done    a chain: each goes on where the one before ended
#   examples/pretrain_88b.sh                                    outside of SLURM: checks all, prints what would run
#   SUBMIT=1 examples/pretrain_88b.sh                           checks all, then submits itself
#   DRY_RUN=1 examples/pretrain_88b.sh                          prints what would run
# Account, partition, data, pretrained encoders, container and fabric of a site go into examples/site.env; docs/cluster.md
# says which.
#SBATCH --job-name=mm88b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 1  # $0 is SLURM's copy of this file
[ ! -e examples/site.env ] || . examples/site.env

GPU=${GPU:-$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)}
case $GPU in
  *A100*) preset=mm_88b ;;  # has no FP8
  *) preset=mm_88b_fp8 ;;
esac
PRESET=${PRESET:-$preset} TRAIN_NODES=${TRAIN_NODES:-128} TASKS=8 GPUS=${GPUS:-8}
RUN_DIR=${RUN_DIR:-$PWD/runs/${SLURM_JOB_NAME:-mm88b}}
if [ -z "${TRAIN_DATA:-}" ] && [[ " $*" != *" data.train="* ]] && [ -z "${DRY_RUN:-}" ] && [ ! -e data/train.json ]; then
  echo "error: there are no shards data/train: set TRAIN_DATA in examples/site.env, or give data.train=[...]"; exit 1
fi
SETTINGS=("data.train=${TRAIN_DATA:-[data/train]}" "data.validation=${HELDOUT_DATA:-[data/heldout]}")

setting_of() { # KEY ARGUMENT...: what the command line says last; nothing if it does not, or says null
  local key=$1 value= argument; shift
  for argument in "$@"; do [[ $argument != "$key="* ]] || value=${argument#*=}; done
  [ "$value" = null ] || echo "$value"; }

# Encoders start from pretrained files, which the command line or the site names, or come with training.start_from.
wrong=
if [ -n "${VISION_PRETRAINED:-}" ]; then
  wrong=1; echo "error: VISION_PRETRAINED is now called IMAGE_PRETRAINED: rename it in examples/site.env"
fi
for encoder in image audio; do
  name=${encoder^^}_PRETRAINED file=$(setting_of "$encoder.pretrained" "$@")
  if [ -z "$file" ] && [ -z "$(setting_of training.start_from "$@")" ]; then
    file=${!name:-}
    if [ -n "$file" ]; then SETTINGS+=("$encoder.pretrained=$file")
    elif [ ! -f "$PRESET" ]; then  # a file of the user's may name them
      wrong=1; echo "error: there is no pretrained $encoder encoder: set $name to its file in examples/site.env, or give $encoder.pretrained=..."
    fi
  fi
  if [ -n "$file" ] && [ "$file" != random ] && [ ! -e "$file" ]; then
    wrong=1; echo "error: the pretrained $encoder encoder $file does not exist: set $name to its file in examples/site.env, or give $encoder.pretrained=..."
  fi
done
[ -z "$wrong" ] || [ -n "${DRY_RUN:-}" ] || exit 1
SETTINGS+=("$@")
ARGUMENTS=("$@")
. examples/launch.sh
