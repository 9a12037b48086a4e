"""Shards to bytes: index, checked reads, remote storage, the node's cache."""
