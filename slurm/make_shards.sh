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

cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}" || exit 2
source slurm/common.sh || { echo "submit from the root of the repository, not $PWD" >&2; exit 2; }

writer=("${python[@]}" -m shards.writer --jobs "$SLURM_CPUS_PER_TASK")
"${writer[@]}" "$@" && "${writer[@]}" --out "$(setting out '' "$@")" --verify
