#!/usr/bin/env bash
# start_rank.sh COMMAND...: become one rank of a step of srun. exec: signals and exit status are the rank's own.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID

# The deadline on this node's own clock: those of two nodes may differ by hours.
[ -z "${SECONDS_TO_TRAIN:-}" ] || export MEGATRON_MM_DEADLINE=$(($(date +%s) + SECONDS_TO_TRAIN))

# What is compiled is loaded again as code, by Triton and by torch.compile, whose own default is a name in /tmp that anybody
# may make beforehand. A folder of the node, since 1,024 ranks that compile into one shared folder stall on its locks.
private_folder() { # NAME: print a folder of the node that no other user can write
  local folder=/tmp/$1-$UID
  mkdir -m 700 "$folder" 2>/dev/null
  if [ -d "$folder" ] && [ ! -L "$folder" ] && [ -O "$folder" ] && [ "$(stat -c %a "$folder")" = 700 ]; then
    echo "$folder"
  else
    echo "$(hostname): $folder is not a private folder of this user's: another one is taken" >&2
    mktemp -d "$folder-XXXXXXXX"
  fi; }
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(private_folder triton)}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(private_folder torchinductor)}
[ -n "$TRITON_CACHE_DIR" ] && [ -n "$TORCHINDUCTOR_CACHE_DIR" ] || { echo "error: $(hostname) has no room for a private folder" >&2; exit 75; }

exec "$@"
