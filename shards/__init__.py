"""Domains as WebDataset shards: written, indexed, split, and streamed in an exact order."""

import lazy_loader

# `__init__.pyi` lists the names; each is imported at its first use, so that `--help` and reading a
# configuration do not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
