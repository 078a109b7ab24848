#!/usr/bin/env bash
# Run mgpu_ddp on this machine, one process per GPU; everything after the name goes to it:
#
#   launch/local.sh data=folder data.root=photos
#
# Settings, from the environment:
PROCESSES=${PROCESSES:-auto}      # processes to start: a number, or auto (one per GPU, one where there is none)
MAX_RESTARTS=${MAX_RESTARTS:-0}   # how often a crashed job starts again by itself, in the same run folder
SCRIPT=${SCRIPT:-}                # a script of yours that calls mgpu_ddp.main; default: mgpu_ddp itself
PYTHON=${PYTHON:-}                # the interpreter mgpu_ddp is installed for; default: python3, then REPO/.venv

set -euo pipefail

home=$(dirname "$0")/..
candidates=(python3 "$home/.venv/bin/python")
[ -z "$PYTHON" ] || candidates=("$PYTHON")
for python in "${candidates[@]}"; do
    command -v "$python" >/dev/null && "$python" -c 'import importlib.util as u; exit(not u.find_spec("mgpu_ddp"))' && break
    python=
done
[ -n "$python" ] || {
    echo "mgpu_ddp is not installed for ${candidates[*]}. Set PYTHON to an interpreter that has it." >&2
    exit 2
}

if [ "$PROCESSES" = auto ]; then
    PROCESSES=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

program=(-m mgpu_ddp.infer)
[ -z "$SCRIPT" ] || program=("$SCRIPT")

# The store and the rendezvous stay on loopback: anyone who reaches them can steer the job.
exec "$python" -m torch.distributed.run \
    --standalone --local-addr=127.0.0.1 --nproc_per_node="$PROCESSES" --max-restarts="$MAX_RESTARTS" \
    "${program[@]}" "$@"
