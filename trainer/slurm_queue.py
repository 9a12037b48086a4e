"""What SLURM's queue holds of array jobs, where there is a SLURM."""

import subprocess
from collections.abc import Iterable


def queued_indices(jobs: Iterable[str]) -> set[int]:
    """Array indices that run or wait to; empty without SLURM, and for jobs it has forgotten.

    Args:
        jobs: numbers of array jobs.
    """
    found: set[int] = set()
    for job in jobs:
        command = ["squeue", "--noheader", "--array", f"--job={job}", "--format=%K"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return set()
        found |= {int(word) for word in shown.stdout.split() if word.isdecimal()}
    return found
