"""The training loop and what belongs to one run, from session to closing."""
