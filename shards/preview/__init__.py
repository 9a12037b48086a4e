"""A set on one page, to be looked at before training: `python -m shards.preview`."""
