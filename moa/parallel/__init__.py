"""Expert parallelism: experts over ranks, and the two ways to reach them."""
