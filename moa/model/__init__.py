"""A model of adapted layers: injected, placed in its run, merged."""
