"""Bytes to tensors: decoding, transforms, DomainBed's colours."""
