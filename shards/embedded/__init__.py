"""The embedded digits: shipped as image files, written as a shard set on first use."""
