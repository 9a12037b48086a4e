#!/usr/bin/env bash
# Image folders to a verified shard set, on one node; arguments are those of shards.writer.
#   sbatch slurm/make_shards.sh --dataset domainnet --root /data/domain_net \
#     --out /shards/domainnet --exclude_list domain_net_duplicates.txt
#SBATCH --job-name=make_shards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60

: "${SLURM_JOB_ID:?start this script with sbatch}"
source slurm/common.sh ||
  { echo "submit from the root of the repository, not $PWD, or give it as --chdir" >&2; exit 2; }

# What is written stays: a job that reaches its time limit is requeued and goes on.
run_folder=$(setting out '' "$@")
requeues=${run_folder%/}.requeues # the writer wants its folder to itself
is_finished() { rm -f "$requeues"; }
newest() { find "$run_folder" -name '*.tar' 2>/dev/null | wc -l; }
identify
writer=("${python[@]}" -m shards.writer --jobs "$SLURM_CPUS_PER_TASK")
attend "${writer[@]}" "$@" && attend "${writer[@]}" --out "$run_folder" --verify
conclude $?
