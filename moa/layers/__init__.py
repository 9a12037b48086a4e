"""One adapted linear layer: router, experts, gate noise, exact arithmetic."""
