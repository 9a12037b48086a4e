"""Pictures of routing for TensorBoard and for folders."""
