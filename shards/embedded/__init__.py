"""The embedded digits: drawn, and written as a shard set on first use."""
