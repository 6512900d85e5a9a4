#!/usr/bin/env bash
# launch.sh: the body of a batch script. Sourced by one that has set
#   PRESET, SETTINGS (array)   what is trained          RUN_DIR   where it is, the same for all lives of the job
#   TRAIN_NODES, TASKS         nodes, ranks a node      GPUS      GPUs that a node must have; 0: this run is on CPUs
# A site sets the rest in examples/site.env or in the environment:
#   IMAGE, MOUNTS              container for pyxis; without IMAGE, PYTHON (.venv/bin/python) runs on the node itself
#   MAX_STALLS=3               tries in a row without a new checkpoint after which the job fails
#   START_SECONDS=1800, SILENT_SECONDS=180   how long ranks may take to start, and be without a heartbeat later
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
  default TRITON_CACHE_DIR "/tmp/triton-${USER:-user}" "1,024 ranks that compile into one shared folder stall on its locks"
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
  echo "srun $(steps_of "$TRAIN_NODES" 1) ${container[*]} examples/check_node.sh $GPUS"
  echo "srun $(steps_of "$TRAIN_NODES" "$TASKS") --kill-on-bad-exit=1 --wait=60 ${container[*]} ${train[*]}"
  case "${DRY_RUN:-}" in
    brief) ;;
    "") CUDA_VISIBLE_DEVICES= "${check[@]}" || exit ;;
    *) "${check[0]}" "${train[@]:1}" --describe --world-size "$world" || exit ;;
  esac
  exit 0
fi

saved_step() { # of the newest committed checkpoint
  local newest; newest=$(cd "$RUN_DIR/checkpoints" 2>/dev/null && ls -d step_*/COMMITTED 2>/dev/null | grep -E '^step_[0-9]+/' | tail -1)
  newest=${newest#step_} newest=${newest%%/*}; echo $((10#${newest:-0})); }
is_done() { # DONE is of this run if the weights that it speaks of are there: another one may have left it
  [ -e "$RUN_DIR/DONE" ] && [ "$(cat "$RUN_DIR/DONE")" = "$(saved_step)" ]; }

if [ -n "${IMAGE:-}" ]; then
  srun --help 2>&1 | grep -q -- --container-image || fail "IMAGE=$IMAGE is set, but this SLURM has no pyxis: unset IMAGE to run in $PWD/.venv"
else
  [ -x "$python" ] || fail "$python is missing: run make setup, set PYTHON, or name a container in IMAGE"
fi
life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} logs=$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$logs" || fail "$RUN_DIR cannot be written"
scontrol show job "$SLURM_JOB_ID" >"$logs/job.txt" 2>&1
{ git rev-parse HEAD 2>/dev/null; printf '%s\n' "${environment[@]}" "${train[*]}"; } >"$logs/launch.txt"

# A signal ends the wait of bash, not srun. USR1 comes before the time limit; TERM means that the job is over, and a job
# that queues itself again because of TERM cannot be cancelled.
time_is_up= over=
export MEGATRON_MM_STOP_FILE=$logs/stop
trap 'time_is_up=1; : >"$MEGATRON_MM_STOP_FILE"; say "time is nearly up: the ranks are asked to save and end"' USR1
trap 'over=1; say "TERM: the job was cancelled, requeued or preempted, or a node failed"' TERM
await() { local status; while :; do wait "$1"; status=$?; kill -0 "$1" 2>/dev/null || return $status; done; }
live_nodes() { scontrol show hostnames "$(squeue -h -j "$SLURM_JOB_ID" -o %N)"; }  # SLURM_JOB_NODELIST keeps dead ones
seconds_left() { # until the time limit; nothing if there is none
  local left days=0 h=0 m=0 s=0; left=$(squeue -h -j "$SLURM_JOB_ID" -o %L)
  [[ $left =~ ^[0-9:-]+$ ]] || return 0
  [[ $left != *-* ]] || { days=${left%%-*}; left=${left#*-}; }
  IFS=: read -r -a part <<<"$left"; s=${part[-1]}; ((${#part[@]} < 2)) || m=${part[-2]}; ((${#part[@]} < 3)) || h=${part[-3]}
  echo $((10#$days * 86400 + 10#$h * 3600 + 10#$m * 60 + 10#$s)); }
requeue() { # [NODES TO AVOID]
  say "queued again${1:+, without $1}"
  scontrol requeue "$SLURM_JOB_ID" || fail "the job cannot be requeued: submit it again"
  # Possible only once the job is pending; and the TERM that follows a requeue also ends a scontrol that is under way.
  [ -z "${1:-}" ] || for _ in {1..60}; do scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$1" && break; sleep 0.3; done
  sleep 120; exit 1; }  # SLURM ends this shell
joined() { local IFS=,; echo "$*"; }

check_nodes() { # sets good and bad; a node that says nothing is bad
  local all; mapfile -t all < <(live_nodes); [ -n "${all[0]:-}" ] || exit 1
  mkdir -p "$try_logs/nodes"
  timeout -k 10 "${CHECK_SECONDS:-300}" srun $(steps_of ${#all[@]} 1) --nodelist="$(joined "${all[@]}")" --no-kill --kill-on-bad-exit=0 \
    --output="$try_logs/nodes/%N.log" "${container[@]}" examples/check_node.sh "$GPUS" "$RUN_DIR" "$try_logs/nodes" "$(date +%s)" & await $!
  good=() bad=()
  for node in "${all[@]}"; do
    if [ -e "$try_logs/nodes/$node.ok" ]; then good+=("$node"); continue; fi
    bad+=("$node"); say "$node is unfit: $(sed -n 's/^unfit: //p' "$try_logs/nodes/$node.log" 2>/dev/null | head -1)"
  done; }

watch_heartbeats() { # SRUN-PID: end the step when a rank has no heartbeat: SLURM itself waits SlurmdTimeout for a dead node
  trap - USR1 TERM; local began=$SECONDS stale
  while sleep "${POLL_SECONDS:-15}"; do
    if [ -z "$(find "$RUN_DIR/health" -name 'rank_*.json' -print -quit 2>/dev/null)" ]; then
      ((SECONDS - began > ${START_SECONDS:-1800})) || continue; stale="all ranks"
    else
      stale=$(find "$RUN_DIR/health" -name 'rank_*.json' -not -newermt "-${SILENT_SECONDS:-180} seconds" 2>/dev/null | sed 's/.*rank_//; s/.json//' | sort -n | head -8 | xargs)
      [ -n "$stale" ] || continue
    fi
    say "no heartbeat of rank $stale: ending the step"
    kill -TERM "$1" 2>/dev/null; sleep 5; kill -KILL "$1" 2>/dev/null
    step=$(squeue -s -h -j "$SLURM_JOB_ID" -o '%i %j' | awk '$2 == "train" {print $1}'); [ -z "$step" ] || scancel -s KILL $step
    break
  done; }

train_once() { # on the first TRAIN_NODES of good
  local use=("${good[@]:0:TRAIN_NODES}") srun_pid dog before left margin
  export MASTER_ADDR=${use[0]} MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + try) % 10000))
  export WORLD_SIZE=$world LOCAL_WORLD_SIZE=$TASKS
  left=$(seconds_left) margin=${MARGIN_SECONDS:-900}
  if [ -n "$left" ]; then
    ((margin <= left / 4)) || margin=$((left / 4))
    export MEGATRON_MM_DEADLINE=$(($(date +%s) + left - margin))
  fi
  rm -f "$RUN_DIR"/health/rank_*.json
  before=$(saved_step); say "try $try: $world ranks on $TRAIN_NODES nodes, $MASTER_ADDR:$MASTER_PORT, from step $before"
  # exec: signals and exit status are the rank's own. One rank that fails ends all; one that ends early, all after 60 s.
  srun $(steps_of "$TRAIN_NODES" "$TASKS") --job-name=train --nodelist="$(joined "${use[@]}")" --kill-on-bad-exit=1 --wait=60 \
    --output="$try_logs/rank_%t.log" "${container[@]}" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' rank "${train[@]}" & srun_pid=$!
  watch_heartbeats $srun_pid & dog=$!
  await $srun_pid; status=$?
  kill $dog 2>/dev/null; wait $dog 2>/dev/null
  after=$(saved_step); say "try $try: srun ended with $status; saved steps $before -> $after"
  if ((after > before)); then stalls=0; else stalls=$((stalls + 1)); fi; }

# All that a start would check, on this host's CPU, before any rank runs: a mistake ends the job in a minute.
"${container_of_one[@]}" env CUDA_VISIBLE_DEVICES= timeout "${CHECK_SECONDS:-300}" "$python" "${train[@]:1}" --check --world-size "$world" >"$logs/check.txt" 2>&1 & await $!; status=$?
if ((status == 2)); then fail "trying again will not help: $(sed -n '/^error: /,$ {s/^error: //;p}' "$logs/check.txt")"; fi
! grep -qs '^start .*nothing is left to do' "$logs/check.txt" || { say "done already: give more training.steps to train for longer"; exit 0; }
((status == 0)) || say "the check before the start ended with $status (see $logs/check.txt); the ranks check again"

stalls=0 try=0 first_step=$(saved_step)
while :; do
  try=$((try + 1)) try_logs=$logs/try$try; mkdir -p "$try_logs"
  check_nodes
  [ -z "$time_is_up$over" ] || break
  say "try $try: ${#good[@]} of $((${#good[@]} + ${#bad[@]})) nodes are fit"
  ((${#good[@]} >= TRAIN_NODES)) || requeue "$(joined "${bad[@]}")"
  train_once
  # srun's status is the largest of all ranks', those that it killed included: files tell what happened.
  ! is_done || { say "done"; exit 0; }
  first=$(cat "$RUN_DIR/health/hang.txt" 2>/dev/null; grep -hE '^(\[rank [0-9]+\] )?(error: |[A-Za-z_.]*(Error|Exception|Diverged|Differ|Failed|Missing|TakenOver): )' "$try_logs"/rank_*.log 2>/dev/null | sort | uniq -c | sort -rn | head -5)
  [ -z "$first" ] || say "the ranks said:"$'\n'"$first"
  [ -z "$over" ] || break
  ! grep -qsE '^(\[rank [0-9]+\] )?error: ' "$try_logs"/rank_*.log || fail "a setting or a file is wrong: trying again will not help"
  if [ -n "$time_is_up" ] || ((status == 0)); then  # an early stop, for the time limit or its deadline
    ((after > first_step || SECONDS < ${START_SECONDS:-1800})) || fail "a whole life of the job has saved nothing new"
    requeue
  fi
  ((stalls < ${MAX_STALLS:-3})) || fail "$stalls tries in a row have saved nothing new"
done
say "stopped"
[ -z "$over" ] || exit 143
requeue
