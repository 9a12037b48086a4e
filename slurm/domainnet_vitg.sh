#!/usr/bin/env bash
# DomainNet, ViT-g/14 with Mixture-of-Adapters, one domain held out; see docs/slurm.md.
#   sbatch slurm/domainnet_vitg.sh [--data.held_out sketch] [--section.field value ...]
#SBATCH --job-name=domainnet_vitg
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

: "${SLURM_JOB_ID:?start this script with sbatch}"
source slurm/common.sh ||
  { echo "submit from the root of the repository, not $PWD, or give it as --chdir" >&2; exit 2; }

complete domainnet_vitg "$@"
train
