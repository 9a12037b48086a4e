"""Settings: command line, recipes, the DeepSpeed JSON, what may change on resume."""
