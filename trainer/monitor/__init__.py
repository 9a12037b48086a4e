"""What a run tells while it trains: console, curves, pages, pictures."""
