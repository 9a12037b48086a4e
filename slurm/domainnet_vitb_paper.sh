#!/usr/bin/env bash
# DomainNet, the paper's settings (ViT-B/16, fp32), one domain held out; see docs/slurm.md.
#   sbatch slurm/domainnet_vitb_paper.sh [--data.held_out sketch] [--section.field value ...]
#SBATCH --job-name=domainnet_vitb_paper
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

: "${SLURM_JOB_ID:?start this script with sbatch}"
source slurm/common.sh ||
  { echo "submit from the root of the repository, not $PWD, or give it as --chdir" >&2; exit 2; }

complete domainnet_vitb_paper "$@"
train
