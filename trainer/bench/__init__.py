"""`python -m trainer.bench`: speed and memory as ratios, measured in one run."""
