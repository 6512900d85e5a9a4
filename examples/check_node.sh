#!/usr/bin/env bash
# check_node.sh GPUS RUN_DIR OK_FOLDER EPOCH: pass if this node can train: writes OK_FOLDER/NODE.ok, or says why it is unfit.
# Runs on every node before a launch; one bad node would stop or slow all of them.
set -uo pipefail
gpus=$1 run_dir=${2:-} ok=${3:-} epoch=${4:-}
unfit() { echo "unfit: $*"; exit 1; }
megabytes() { df --output=avail -m "$1" | tail -1 | tr -d ' '; }

if [ -n "$epoch" ]; then
  skew=$(($(date +%s) - epoch)); ((${skew#-} < 120)) || unfit "its clock is $skew s off"
fi
free=$(megabytes /dev/shm); ((free >= ${MIN_SHM_MB:-64})) || unfit "/dev/shm has $free MB left, ${MIN_SHM_MB:-64} are needed"
free=$(megabytes /tmp); ((free >= ${MIN_TMP_MB:-64})) || unfit "/tmp has $free MB left, ${MIN_TMP_MB:-64} are needed"
if [ -n "$run_dir" ]; then
  probe=$run_dir/logs/.probe.${SLURMD_NODENAME:-$(hostname)}
  echo probe >"$probe" 2>/dev/null && [ "$(cat "$probe")" = probe ] || unfit "$run_dir cannot be written from here"
  rm -f "$probe"
fi
if ((gpus)); then
  command -v nvidia-smi >/dev/null || unfit "there is no nvidia-smi"
  ask() { timeout 60 nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null; }
  found=$(ask index | wc -l); ((found == gpus)) || unfit "$found of $gpus GPUs answer"
  for count in $(ask ecc.errors.uncorrected.volatile.total); do
    [[ $count == *N/A* ]] || ((count == 0)) || unfit "a GPU has $count uncorrected memory errors"
  done
  ! timeout 60 nvidia-smi -q -d ROW_REMAPPER 2>/dev/null | grep -qE 'Remapping Failure Occurred *: *Yes|Pending *: *Yes' || unfit "a GPU has memory rows to remap"
  for heat in $(ask temperature.gpu); do ((heat < ${MAX_CELSIUS:-85})) || unfit "a GPU is at $heat degrees before any work"; done
  busy=$(timeout 60 nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null | wc -l); ((busy == 0)) || unfit "$busy foreign processes are on its GPUs"
  ! timeout 60 nvidia-smi nvlink --status 2>/dev/null | grep -qi inactive || unfit "an NVLink is down"
  for state in /sys/class/infiniband/*/ports/*/state; do
    [ ! -e "$state" ] || grep -q ACTIVE "$state" || unfit "$state is $(cat "$state")"
  done
fi
echo "$(hostname) is fit"
[ -z "$ok" ] || : >"$ok/${SLURMD_NODENAME:-$(hostname)}.ok"
