"""What is on disk: checkpoints, the run folder, its lock, the queue of saves."""
