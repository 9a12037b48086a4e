"""`python -m trainer.sweep`: many runs, on this machine or as a SLURM array."""
