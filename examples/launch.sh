#!/usr/bin/env bash
# launch.sh: the body of a batch script. Sourced by one that has set
#   PRESET, SETTINGS (array)   what is trained          RUN_DIR   where it is, the same for all lives of the job
#   TRAIN_NODES, TASKS         nodes, ranks a node      GPUS      GPUs that a node must have; 0: this run is on CPUs
# A site sets the rest in examples/site.env or in the environment:
#   IMAGE, MOUNTS              container for pyxis; without IMAGE, PYTHON (.venv/bin/python) runs on the node itself
#   MAX_STALLS=3               tries in a row without a new checkpoint after which the job fails
#   START_SECONDS=1800, SILENT_SECONDS=180   how long ranks may take to start, and be without a heartbeat later
#   RETRY_MINUTES=10           how long what is no node's own fault (run_dir that cannot be written) is waited for
#   MARGIN_SECONDS=900         how long before the time limit the run saves and is queued again
# Outside of SLURM it checks all that a start would (--check), prints what would run, and starts nothing; with SUBMIT=1 it
# then hands the script to sbatch, so that nothing that is wrong asks for nodes. DRY_RUN=1 prints the model and layout as
# counted from the built modules instead of the check, DRY_RUN=brief neither.
set -uo pipefail
say() { echo "$(date +%FT%T) [${SLURM_JOB_ID:-dry}.${SLURM_RESTART_COUNT:-0}] $*"; }
fail() { say "error: $*"; exit 1; }
[ ! -e examples/site.env ] || . examples/site.env

environment=()
default() { # NAME VALUE REASON: what the site or the user has set stays
  export "$1=${!1:-$2}"; environment+=("$1=${!1}    # $3"); }
default OMP_NUM_THREADS 1 "ranks share the cores of a node; gloo and the loader have threads of their own"
default TORCH_FR_BUFFER_SIZE 2000 "flight recorder: the collectives that a hang report names"
if ((GPUS)); then
  default CUDA_DEVICE_MAX_CONNECTIONS 1 "kernels start in the order of launch, so communication overlaps what follows it"
  default NCCL_NVLS_ENABLE 0 "NVLink SHARP keeps buffers of its own on every GPU, and the 88B needs that memory"
  default NCCL_IB_TIMEOUT 22 "4 us * 2^22 = 17 s before a packet is sent again: a switch that reroutes is no failure"
  default NCCL_IB_RETRY_CNT 7 "the most that InfiniBand allows, for the same reason"
  default TORCH_NCCL_ASYNC_ERROR_HANDLING 1 "a rank whose peer died ends, instead of waiting for ever"
  default TORCH_NCCL_DUMP_ON_TIMEOUT 1 "each rank leaves its flight record when a collective times out"
  default TORCH_FR_DUMP_TEMP_FILE "$RUN_DIR/health/flight_rank_" "that record lies beside hang.txt, not on a node that may be gone"
  default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True "packed batches differ in size: no fragments"
  default NVTE_FWD_LAYERNORM_SM_MARGIN 16 "TransformerEngine leaves multiprocessors to NCCL, which runs beside its norms"
  default NVTE_BWD_LAYERNORM_SM_MARGIN 16 "the same in the backward pass"
fi

container=() python=${PYTHON:-$PWD/.venv/bin/python}
if [ -n "${IMAGE:-}" ]; then
  python=${PYTHON:-python}
  container=(--container-image="$IMAGE" --container-mounts="$PWD,$RUN_DIR${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD"
    --no-container-mount-home)  # a home folder brings packages that the image does not know
fi

container_of_one=()
[ -z "${IMAGE:-}" ] || container_of_one=(srun --overlap --mpi=none --nodes=1 --ntasks=1 "${container[@]}")

world=$((TRAIN_NODES * TASKS))
train=("$python" -m megatron_mm.train "$PRESET" "run_dir=$RUN_DIR" "${SETTINGS[@]}")
steps_of() { # NODES TASKS-A-NODE [OPTION...]: srun's arguments for one step
  echo --overlap --mpi=none --nodes="$1" --ntasks=$(($1 * $2)) --ntasks-per-node="$2" --distribution=block:block; }

check=("${PYTHON:-$PWD/.venv/bin/python}" "${train[@]:1}" --check --world-size "$world")

if [ -n "${DRY_RUN:-}" ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  if [ -n "${SUBMIT:-}" ]; then
    CUDA_VISIBLE_DEVICES= "${check[@]}" || fail "nothing was submitted"
    exec sbatch "examples/$(basename "$0")" "${ARGUMENTS[@]}"
  fi
  echo "# $TRAIN_NODES nodes x $TASKS ranks = $world ranks; logs in $RUN_DIR/logs/JOB.LIFE/tryN/rank_N.log"
  printf 'export %s\n' "${environment[@]}"
  echo "srun $(steps_of "$TRAIN_NODES" 1) ${container[*]} examples/check_node.sh $GPUS $RUN_DIR"
  echo "srun $(steps_of "$TRAIN_NODES" "$TASKS") --kill-on-bad-exit=1 --wait=60 ${container[*]} examples/start_rank.sh ${train[*]}"
  case "${DRY_RUN:-}" in
    brief) ;;
    "") CUDA_VISIBLE_DEVICES= "${check[@]}" || exit ;;
    *) "${check[0]}" "${train[@]:1}" --describe --world-size "$world" || exit ;;
  esac
  exit 0
fi

. examples/one_life.sh
