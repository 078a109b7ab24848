#!/usr/bin/env bash
# Find out which batch size to use on this machine; everything after the name goes to mgpu_ddp:
#
#   launch/sweep.sh data=folder data.root=photos limit=100000
#
# It runs conf/sweep/batch_size.yaml; the command line may override any of it: batch_size=64,128 sweep.repeats=5.
# The settings are those of launch/local.sh.

set -euo pipefail

exec "$(dirname "$0")/local.sh" +sweep=batch_size "$@"
