#!/usr/bin/env bash
# one_life.sh: one life of a job in SLURM, from its start to its end or to its place in the queue. Sourced by launch.sh.
# Durations come from the clock since boot (date and bash's SECONDS follow the wall clock, which steps), and whether a rank
# lives from its heartbeat's content.
now() { local up; read -r up _ <"${UPTIME_FILE:-/proc/uptime}"; echo "${up%%.*}"; }
saved_step() { # of the newest committed checkpoint
  local newest; newest=$(cd "$RUN_DIR/checkpoints" 2>/dev/null && ls -d step_*/COMMITTED 2>/dev/null | grep -E '^step_[0-9]+/' | tail -1)
  newest=${newest#step_} newest=${newest%%/*}; echo $((10#${newest:-0})); }
is_done() { # DONE is of this run if the weights that it speaks of are there: another one may have left it
  [ -e "$RUN_DIR/DONE" ] && [ "$(cat "$RUN_DIR/DONE")" = "$(saved_step)" ]; }
owner() { cat "$RUN_DIR/checkpoints/OWNER" 2>/dev/null; }  # JOB.LIFE.HOST.NUMBER of who may commit
storage_is_writable() { examples/probe_storage.sh "$RUN_DIR" "batch.$SLURM_JOB_ID"; }
joined() { local IFS=,; echo "$*"; }

# A signal ends the wait of bash, not srun. USR1 comes before the time limit; TERM means that the job is over, and a job
# that queues itself again because of TERM cannot be cancelled.
life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} logs=$RUN_DIR/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
time_is_up= over= life_began=$(now)
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

excluded() { sed -n 's/^ *.*ExcNodeList=\([^ ]*\).*/\1/p' "$1" 2>/dev/null | grep -v null; }  # in what scontrol shows of the job
exclude() { # [NODE,...]: the queued job avoids these, and those that its user named; possible only once it is pending
  local list; list=$(joined $(excluded "$by_user") ${1:-})
  for _ in {1..60}; do scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$list" && return; sleep 0.3; done; }
requeue() { # [NODE,...]: avoid these, and none that was avoided before
  say "queued again${1:+, without $1}"
  scontrol requeue "$SLURM_JOB_ID" || fail "the job cannot be requeued: submit it again"
  # SLURM ends this shell now; the TERM that comes first also ends a scontrol that is under way.
  [ "${1:-}$(excluded "$logs/job.txt")" = "$(excluded "$by_user")" ] || exclude "${1:-}"
  for _ in {1..60}; do
    case ${1:+$(squeue -h -j "$SLURM_JOB_ID" -o %r)} in
      *BadConstraints* | *ReqNodeNotAvail*) exclude; say "it cannot run without $1: nobody is excluded"; break ;;
    esac
    sleep 2
  done
  exit 1; }
leaves_enough() { # COUNT: may so many nodes be excluded? Never so many that the job could not run on those that are up
  local up need=${SLURM_JOB_NUM_NODES:-$TRAIN_NODES}; ((need >= TRAIN_NODES)) || need=$TRAIN_NODES
  up=$(sinfo -h -N -p "${SLURM_JOB_PARTITION:-}" -o '%N %t' | awk '$2 !~ /^(down|dr|fail|maint|unk|pow)|[*]$/ {print $1}' | sort -u | wc -l)
  ((up - $1 >= need)); }
await_recovery() { # what is no node's own fault is waited for; then the job queues again, and nobody is excluded
  waits_since=${waits_since:-$(now)}
  if (($(now) - waits_since >= ${RETRY_MINUTES:-10} * 60)); then
    say "waited ${RETRY_MINUTES:-10} minutes for this to pass"; requeue
  fi
  say "excluding nobody, looking again in $pause s"
  sleep "$pause"; pause=$((pause < 30 ? 2 * pause : 60)); }

compare_clock() { # NODE SECONDS BEGAN: through one round trip, so a slow start of the step is no skew
  local at skew=0; printf -v at '%(%s)T' -1
  (($2 >= $3)) || skew=$(($2 - $3)); (($2 <= at)) || skew=$(($2 - at))
  ((${skew#-} < ${SKEW_SECONDS:-120})) || say "warning: the clock of $1 is off by $skew s; its logs have wrong times, nothing else depends on it"; }
check_nodes() { # sets good and bad, and common if more fail the same check than can be their own fault
  local all node what reason check began few line; local -A said=() failing=() example=()
  mapfile -t all < <(live_nodes); [ -n "${all[0]:-}" ] || exit 1
  printf -v began '%(%s)T' -1
  while read -r line; do
    { echo "$line" >>"$logs/nodes.txt"; } 2>/dev/null
    read -r node what reason <<<"$line"
    case $what in
      clock) compare_clock "$node" "$reason" "$began" ;;
      fit) said[$node]=fit ;;
      unfit) said[$node]=$reason ;;
    esac
  done < <(timeout -k 10 "${CHECK_SECONDS:-300}" srun $(steps_of ${#all[@]} 1) --nodelist="$(joined "${all[@]}")" --no-kill \
    --kill-on-bad-exit=0 "${container[@]}" examples/check_node.sh "$GPUS" "$RUN_DIR" </dev/null 2>&1)
  good=() bad=() common= few=$((${#all[@]} / 4)); ((few)) || few=1
  for node in "${all[@]}"; do
    if [ "${said[$node]:-}" = fit ]; then good+=("$node"); continue; fi
    bad+=("$node") said[$node]=${said[$node]:-silence it says nothing} check=${said[$node]%% *} check=${check//[!a-z]/}
    failing[$check]=$((${failing[$check]:-0} + 1)) example[$check]=${said[$node]#* } said[$node]=$check:${example[$check]}
  done
  for check in "${!failing[@]}"; do
    ((failing[$check] > few || ! ${#good[@]})) || { [ "$check" = storage ] && ! storage_is_writable; } || continue
    common+=" $check"; say "${failing[$check]} of ${#all[@]} nodes fail the same check, which is no fault of theirs: ${example[$check]}"
  done
  for node in "${bad[@]}"; do
    [[ " $common " == *" ${said[$node]%%:*} "* ]] || say "$node is unfit: ${said[$node]#*:}"
  done; }

beats() { (cd "$RUN_DIR/health" 2>/dev/null && cksum rank_*.json 2>/dev/null); }
watch_heartbeats() { # SRUN-PID BEATS-BEFORE: end the step when a rank's heartbeat stands still; SLURM is slow to see a dead node
  trap - USR1 TERM; local began at sum file silent doubted=; local -A last=() moved=() there; began=$(now)
  while read -r sum _ file; do [ -z "$file" ] || last[$file]=$sum; done <<<"$2"
  while sleep "${POLL_SECONDS:-15}"; do
    at=$(now) there=() silent=
    while read -r sum _ file; do
      there[$file]=1
      [ "${last[$file]:-}" = "$sum" ] || moved[$file]=$at
      last[$file]=$sum
    done < <(beats)
    for file in "${!moved[@]}"; do
      if [ -n "${there[$file]:-}" ]; then ((at - moved[$file] <= ${SILENT_SECONDS:-180})) || silent+=" ${file//[!0-9]/}"
      else unset "moved[$file]"; fi  # it has ended
    done
    if [ -z "$silent" ]; then ((${#moved[@]} || at - began <= ${START_SECONDS:-1800})) && { doubted=; continue; }; silent=" all ranks"; fi
    if ! storage_is_writable; then  # heartbeats are files there: while it takes nothing, nobody is silent
      say "no heartbeat of rank$silent, but $RUN_DIR cannot be written from here either: nobody is blamed"
      began=$(now) doubted=; for file in "${!moved[@]}"; do moved[$file]=$began; done
      continue
    fi
    [ -n "$doubted" ] || { doubted=1; continue; }  # it may have been full until now
    say "no heartbeat of rank $(tr ' ' '\n' <<<"$silent" | sort -n | head -8 | xargs): ending the step"
    kill -TERM "$1" 2>/dev/null; sleep 5; kill -KILL "$1" 2>/dev/null
    step=$(squeue -s -h -j "$SLURM_JOB_ID" -o '%i %j' | awk '$2 == "train" {print $1}'); [ -z "$step" ] || scancel -s KILL $step
    break
  done; }

train_once() { # on the first TRAIN_NODES of good; counts the tries in which this life has saved nothing new
  local use=("${good[@]:0:TRAIN_NODES}") srun_pid dog earlier before left margin
  export MASTER_ADDR=${use[0]} MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + try) % 10000))
  export WORLD_SIZE=$world LOCAL_WORLD_SIZE=$TASKS MEGATRON_MM_STATUS_DIR=$try_logs/status
  left=$(seconds_left) margin=${MARGIN_SECONDS:-900}
  if [ -n "$left" ]; then
    ((margin <= left / 4)) || margin=$((left / 4))
    export SECONDS_TO_TRAIN=$((left - margin))
  fi
  rm -f "$RUN_DIR/health/hang.txt"
  grep -ls "\"job\": \"$SLURM_JOB_ID\"" "$RUN_DIR"/health/rank_*.json | xargs -r rm -f  # those of another job keep us out
  earlier=$(beats); before=$(saved_step); say "try $try: $world ranks on $TRAIN_NODES nodes, $MASTER_ADDR:$MASTER_PORT, from step $before"
  # One rank that fails ends all; one that ends early, all after 60 s.
  srun $(steps_of "$TRAIN_NODES" "$TASKS") --job-name=train --nodelist="$(joined "${use[@]}")" --kill-on-bad-exit=1 --wait=60 \
    --output="$try_logs/rank_%t.log" "${container[@]}" examples/start_rank.sh "${train[@]}" & srun_pid=$!
  watch_heartbeats $srun_pid "$earlier" & dog=$!
  await $srun_pid; status=$?
  kill $dog 2>/dev/null; wait $dog 2>/dev/null
  after=$(saved_step); say "try $try: srun ended with $status; saved steps $before -> $after"
  if ((after > before)) && [[ $(owner) == "$life."* ]]; then stalls=0
  elif ! storage_is_writable; then say "$RUN_DIR cannot be written: that try says nothing of the run"
  else stalls=$((stalls + 1)); fi; }

read_endings() { # sets final if trying again will not help. srun's status is the largest of all ranks', killed ones included,
  # so each rank leaves a file with its status and what it has to say; one that was killed has left none.
  local file code text; local -A said=() first=(); final=
  for file in "$try_logs"/status/rank_*; do
    [[ $file =~ /rank_[0-9]+$ ]] || continue
    code= text=; { read -r code; IFS= read -r -d '' -n 2000 text; } <"$file"
    [[ $code =~ ^[1-9][0-9]*$ ]] || continue
    text=${text%$'\n'} said["$code: $text"]=$((${said["$code: $text"]:-0} + 1)) first[$code]=${first[$code]:-${text#error: }}
  done
  for text in "${!said[@]}"; do say "${said[$text]} ranks ended with $text"; done
  ! [ -s "$RUN_DIR/health/hang.txt" ] || say "nothing moved:"$'\n'"$(cat "$RUN_DIR/health/hang.txt")"
  for code in 3 2; do [ -z "${first[$code]+1}" ] || final="trying again will not help: ${first[$code]}"; done
  [ -z "${first[4]+1}" ] || final="another job has taken this run over, so this one ends for good: ${first[4]}"; }

check_settings() { # all that a start would check, on this host's CPU, before any rank runs: a mistake ends the job in a minute
  local status
  "${container_of_one[@]}" env CUDA_VISIBLE_DEVICES= timeout "${CHECK_SECONDS:-300}" "$python" "${train[@]:1}" --check --world-size "$world" >"$logs/check.txt" 2>&1 & await $!; status=$?
  case $status in
    0) ;;
    2 | 3 | 4) fail "trying again will not help: $(sed -n '/^error: /,$ {s/^error: //;p}' "$logs/check.txt")" ;;
    *) say "the check before the start ended with $status (see $logs/check.txt); the ranks check again" ;;
  esac
  ! grep -qs '^start .*nothing is left to do' "$logs/check.txt" || { say "done already: give more training.steps to train for longer"; exit 0; }; }

if [ -n "${IMAGE:-}" ]; then
  srun --help 2>&1 | grep -q -- --container-image || fail "IMAGE=$IMAGE is set, but this SLURM has no pyxis: unset IMAGE to run in $PWD/.venv"
else
  [ -x "$python" ] || fail "$python is missing: run make setup, set PYTHON, or name a container in IMAGE"
fi
stalls=0 try=0 waits_since= pause=5 by_user=$RUN_DIR/logs/$SLURM_JOB_ID.submitted.txt
until problem=$(mkdir -p "$logs" 2>&1) && storage_is_writable; do
  case $problem in
    *"Permission denied"* | *"Not a directory"* | *"File exists"* | *"Read-only"*) [ -d "$RUN_DIR/logs" ] || fail "$problem" ;;
  esac  # of a folder that was written before, these pass
  say "$RUN_DIR cannot be written${problem:+: $problem}"; await_recovery
  [ -z "$over" ] || exit 143
done
scontrol show job "$SLURM_JOB_ID" >"$logs/job.txt" 2>&1
[ -e "$by_user" ] || cp "$logs/job.txt" "$by_user"
{ git rev-parse HEAD 2>/dev/null; printf '%s\n' "${environment[@]}" "${train[*]}"; } >"$logs/launch.txt"
check_settings
first_step=$(saved_step) waits_since= pause=5
while [ -z "$time_is_up$over" ]; do
  check_nodes
  [ -z "$time_is_up$over" ] || break
  say "${#good[@]} of $((${#good[@]} + ${#bad[@]})) nodes are fit"
  if ((${#good[@]} < TRAIN_NODES)); then
    if [ -z "$common" ] && leaves_enough ${#bad[@]}; then requeue "$(joined "${bad[@]}")"; fi
    await_recovery; continue
  fi
  if [[ $(owner) =~ ^$SLURM_JOB_ID\.([0-9]+)\. ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})); then
    fail "a later life of this job goes on with the run: this one was given up"
  fi
  try_logs=$logs/try$((try + 1))
  mkdir -p "$try_logs/status" || { await_recovery; continue; }
  try=$((try + 1)) waits_since= pause=5
  train_once
  ! is_done || { say "done"; exit 0; }
  read_endings
  [ -z "$over" ] || break
  [ -z "$final" ] || fail "$final"
  if [ -n "$time_is_up" ] || ((status == 0)); then  # an early stop, for the time limit or its deadline
    ((after > first_step || $(now) - life_began < ${START_SECONDS:-1800})) || fail "a whole life of the job has saved nothing new"
    requeue
  fi
  ((stalls < ${MAX_STALLS:-3})) || fail "$stalls tries in a row have saved nothing new"
done
say "stopped"
[ -z "$over" ] || exit 143
requeue
