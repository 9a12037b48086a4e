#!/usr/bin/env bash
# Held-out domains x seeds x methods on any dataset, one array index a run; see docs/slurm.md. Flags
# of trainer.sweep.slurm_array, such as --hparams_seeds 0-19, may stand among the settings.
#   python -m trainer.sweep.slurm_array --recipe pacs --seeds 0,1,2     # prints the line to submit
#   sbatch --array=0-11 slurm/leave_one_out.sh --recipe pacs --seeds 0,1,2
# With one GPU a run, many runs at once; `python -m trainer.plan --recipe pacs --table` compares:
#   sbatch --array=0-11 --ntasks-per-node=1 --gpus-per-node=1 slurm/leave_one_out.sh --recipe pacs --seeds 0,1,2
#SBATCH --job-name=leave_one_out
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

: "${SLURM_JOB_ID:?start this script with sbatch}"
source slurm/common.sh ||
  { echo "submit from the root of the repository, not $PWD, or give it as --chdir" >&2; exit 2; }

complete domainnet_vitb_paper "$@"
# With which options it was submitted, for the line that fills the gaps.
record="$(patiently job_record) $(scontrol show job "${SLURM_ARRAY_JOB_ID:?give --array}" |
  grep -o -m 1 'ArrayTaskThrottle=[0-9]*')"
# One word a line: the settings of this index's run.
cell=$("${python[@]}" -m trainer.sweep.slurm_array --job "$SLURM_ARRAY_JOB_ID" \
  --record "$record" --index "$SLURM_ARRAY_TASK_ID" "${settings[@]}") || die $? "no such run; not requeued"
mapfile -t settings <<<"$cell"
train
