#!/usr/bin/env bash
# A chain of jobs, where Slurm may not start a job again: each goes on where the one before ended.
#
#     slurm/chain.sh 8 --nodes=16 slurm/pretrain.sbatch experiment=deepseekmoe_16b \
#       'data.train=[{path: data/docs}]' run.name=try1
#
# They run one after the other, and those left over when the run is done end at once.

set -euo pipefail

(($# > 1)) || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
CHAIN=chain-$(date +%s)-$$
export CHAIN CHAIN_LEFT
for ((CHAIN_LEFT = $1 - 1; CHAIN_LEFT >= 0; CHAIN_LEFT--)); do
  sbatch --job-name="$CHAIN" --dependency=singleton --no-requeue "${@:2}"
done
echo "all of them: scancel --name=$CHAIN"
