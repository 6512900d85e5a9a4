#!/usr/bin/env bash
# probe_storage.sh RUN_DIR NAME: pass if this host can write a file there and read it back; NAME is this host's own.
probe=$1/.probe.$2
timeout -k 5 "${PROBE_SECONDS:-60}" bash -c '
  head -c 65536 /dev/zero >"$1" && [ "$(wc -c <"$1")" = 65536 ]; status=$?
  rm -f "$1"; exit $status' probe "$probe" 2>/dev/null
