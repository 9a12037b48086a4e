"""Expert parallelism: experts over processes, and the two ways to reach them."""
