"""`python -m trainer.predict`, and `predict` for Python: what adapters say to unlabelled images."""

import lazy_loader

# As in `moa`: torch is imported at the first use of a name.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
