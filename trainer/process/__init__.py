"""This process: rank and world, signals, watchdog, exit codes, tables shown."""
