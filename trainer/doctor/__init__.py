"""`python -m trainer.doctor`: what a run will meet on this machine, and what to do about it."""
