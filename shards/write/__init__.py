"""Images to shards: listed, planned, packed, verified."""
