#!/usr/bin/env bash
# Turn files into shards with an array of jobs; each element takes its own part of the files.
#   INPUT=/data/raw OUTPUT=data/train TOKENIZER=tokenizer.json sbatch --array=0-63 examples/preprocess_array.sh
#   ... then:  .venv/bin/python tools/shards.py merge --help
# An element that fails or is preempted is done again alone: nothing appears under its name before it is whole.
#SBATCH --job-name=mm-preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ ! -e examples/site.env ] || . examples/site.env

for name in INPUT OUTPUT TOKENIZER; do
  [ -n "${!name:-}" ] || { echo "error: set $name: see the head of examples/preprocess_array.sh" >&2; exit 2; }
done
# The number of shares is that of the whole array, also when only element 17 of it is submitted again.
TASK=${SLURM_ARRAY_TASK_ID:-0} TASKS=${TASKS:-${SLURM_ARRAY_TASK_COUNT:-1}}
container=() python=${PYTHON:-$PWD/.venv/bin/python}
if [ -n "${IMAGE:-}" ]; then
  python=${PYTHON:-python}
  container=(--container-image="$IMAGE" --container-mounts="$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
fi
# shellcheck disable=SC2206  # INPUT may be several paths
command=("$python" tools/preprocess_data.py --input $INPUT --output-prefix "$OUTPUT" --tokenizer "$TOKENIZER"
  --workers "${SLURM_CPUS_PER_TASK:-2}" --task "$TASK" --tasks "$TASKS" "$@")
if [ -n "${DRY_RUN:-}" ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "srun ${container[*]} ${command[*]}"
  exit 0
fi
exec srun --kill-on-bad-exit=1 "${container[@]}" "${command[@]}"
