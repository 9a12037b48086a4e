"""Where an adapter's files are: a folder, or `hf-hub:organisation/name[@revision]`."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from moa.errors import MissingAdapterError

HUB_PREFIX = "hf-hub:"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_FILES = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
_NAME = re.compile(r"([^@]+)(?:@(.+))?")


def adapter_folder(source: str | Path) -> Path:
    """The local folder of an adapter; fetched from the hub into its cache where needed.

    `source` is a folder, or `hf-hub:organisation/name`, with `@revision` for another than `main`.

    Raises `MissingAdapterError`: no such folder or repository, or the hub cannot be reached.
    """
    text = str(source)
    if text.startswith(HUB_PREFIX):
        return _fetched(text)
    folder = Path(source)
    if (folder / CONFIG_FILE).exists():
        return folder
    if folder.is_dir():
        best, remedy = folder / "adapter", "give the folder of a saved adapter"
        if (best / CONFIG_FILE).exists():
            remedy = f"its best adapter is {best}"
        raise MissingAdapterError(f"{text}: no {CONFIG_FILE}; {remedy}")
    what = "a file" if folder.exists() else "no such folder"
    raise MissingAdapterError(
        f"{text}: {what}; give the folder of a saved adapter, or hf-hub:organisation/name"
    )


def _fetched(source: str) -> Path:
    match = _NAME.fullmatch(source.removeprefix(HUB_PREFIX))
    name, revision = (match[1], match[2]) if match else ("", None)
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES)
    except errors.HFValidationError as error:
        reason = f"not a name of the form organisation/name ({' '.join(str(error).split())})"
    except errors.GatedRepoError:
        reason = "a gated repository: accept its terms on the hub, then log in with HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or a private one: check the name, or log in with HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        reason = (
            "the hub cannot be reached and the adapter is not in its cache; fetch it where there "
            "is a network and copy the folder, or copy the cache and set HF_HOME"
        )
    except (errors.HfHubHTTPError, OSError) as error:
        if error.filename is not None:  # not the hub's: a file of its cache
            raise MissingAdapterError(
                f"{source}: the hub's cache cannot be written ({error}); set HF_HOME to a folder "
                "that can"
            ) from error
        reason = f"the hub answers with an error: {' '.join(str(error).split())[:300]}"
    else:
        return Path(found)
    raise MissingAdapterError(f"{source}: {reason}")
