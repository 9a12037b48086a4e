"""Mixture-of-Adapters for frozen vision transformers (arXiv 2310.11031): the public names."""

import lazy_loader

# `__init__.pyi` lists the names; each is imported at its first use, so that `--help` and reading a
# configuration do not wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
