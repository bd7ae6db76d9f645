#!/usr/bin/env bash
# cdl on all hosts of a TPU slice, one process on each. Folders named here have to be seen by all hosts.
#
#   launch/tpu.sh NAME ZONE train --config=configs/gpt2.py:7b-muon --out=/shared/7b     # one run on the whole slice
#   launch/tpu.sh NAME ZONE worker /shared/sweep      # each host takes runs of its own from a sweep, until none is left
#
# CDL_FOLDER: where cdl is checked out on the hosts (default: cdl), with its environment in .venv.
# CDL_CHIPS: the chips of a host as x,y,z, for workers (default: 2,2,1, which is four).
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,8p' "$0"
  exit 2
fi
name=$1 zone=$2 verb=$3
shift 3
words=$(printf '%q ' "$verb" "$@")
settings=""
if [ "$verb" = worker ]; then
  # A host for itself: without these settings libtpu waits for the others.
  chips=${CDL_CHIPS:-2,2,1}
  last=$((${chips//,/*} - 1))
  settings="TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=$chips TPU_VISIBLE_CHIPS=$(seq -s, 0 "$last") CLOUD_TPU_TASK_ID=0"
else
  words+=--distributed
fi
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $(printf '%q' "${CDL_FOLDER:-cdl}") && env $settings .venv/bin/cdl $words"
