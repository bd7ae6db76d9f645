#!/usr/bin/env bash
# One run on several nodes of a Slurm cluster, one process on each; submit it from where cdl is checked out.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=1-0 launch/slurm.sh train --config=configs/gpt2.py:7b-muon --out=/shared/7b
#
# When its time is up the run is saved; submit it again to go on. Sweeps need no script: cdl sweep --backend=slurm.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail
# Not `exec`: srun passes the signal on to the processes, which save.
srun "${CDL_FOLDER:-.}/.venv/bin/cdl" "$@" --distributed
