"""The errors of this package; each message names the setting, its value and the remedy."""


class MoAConfigError(ValueError):
    """A setting of `MoAConfig` is out of range or does not fit the model."""


class NoMatchingModuleError(MoAConfigError):
    """`targets` and `blocks` together match no linear layer of the model."""


class AdapterError(RuntimeError):
    """An adapter folder is damaged, incomplete, or belongs to another base model."""


class MissingAdapterError(AdapterError):
    """There is no adapter at the place named."""


def one_line(error: Exception) -> str:
    """What an error says of something that a stranger wrote, whose text may be long."""
    return " ".join(str(error).split())[:500]
