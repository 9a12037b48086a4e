"""DeepSpeed and the processes' group: collectives, ZeRO state, weight averages."""
