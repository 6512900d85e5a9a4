#!/usr/bin/env bash
# check_node.sh GPUS RUN_DIR: say whether this node can train, on stdout, which srun carries without any shared folder:
#   NODE clock SECONDS         its clock as it begins, which the batch host compares with its own before and after
#   NODE fit                   or: NODE unfit CHECK REASON, where CHECK is one word
# Runs on every node before a launch; one bad node would stop or slow all of them.
set -uo pipefail
gpus=$1 run_dir=${2:-} node=${SLURMD_NODENAME:-$(hostname)}
echo "$node clock $(date +%s)"
unfit() { echo "$node unfit $*"; exit 0; }
megabytes() { df --output=avail -m "$1" | tail -1 | tr -d ' '; }

free=$(megabytes /dev/shm); ((free >= ${MIN_SHM_MB:-64})) || unfit shm "/dev/shm has $free MB left, ${MIN_SHM_MB:-64} are needed"
free=$(megabytes /tmp); ((free >= ${MIN_TMP_MB:-64})) || unfit tmp "/tmp has $free MB left, ${MIN_TMP_MB:-64} are needed"
if [ -n "$run_dir" ]; then
  examples/probe_storage.sh "$run_dir" "$node" || unfit storage "$run_dir cannot be written from here"
fi
if ((gpus)); then
  command -v nvidia-smi >/dev/null || unfit driver "there is no nvidia-smi"
  ask() { timeout 60 nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null; }
  found=$(ask index | wc -l); ((found == gpus)) || unfit gpus "$found of $gpus GPUs answer"
  for count in $(ask ecc.errors.uncorrected.volatile.total); do
    [[ $count == *N/A* ]] || ((count == 0)) || unfit memory "a GPU has $count uncorrected memory errors"
  done
  ! timeout 60 nvidia-smi -q -d ROW_REMAPPER 2>/dev/null | grep -qE 'Remapping Failure Occurred *: *Yes|Pending *: *Yes' || unfit rows "a GPU has memory rows to remap"
  for heat in $(ask temperature.gpu); do ((heat < ${MAX_CELSIUS:-85})) || unfit heat "a GPU is at $heat degrees before any work"; done
  busy=$(timeout 60 nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null | wc -l); ((busy == 0)) || unfit busy "$busy foreign processes are on its GPUs"
  ! timeout 60 nvidia-smi nvlink --status 2>/dev/null | grep -qi inactive || unfit nvlink "an NVLink is down"
  for state in /sys/class/infiniband/*/ports/*/state; do
    [ ! -e "$state" ] || grep -q ACTIVE "$state" || unfit infiniband "$state is $(cat "$state")"
  done
fi
echo "$node fit"
