"""Distributed training of Mixture-of-Adapters: configuration, engine, loop, evaluation, reports."""

__version__ = "0.1.0"
