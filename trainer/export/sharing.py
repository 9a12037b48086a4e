"""Adapters on their way to others: into a folder of three files, or onto a hub."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from moa.files.atomic_folder import replaced_folder
from moa.files.saving import write_adapter
from trainer.evaluate.members import Member
from trainer.process.errors import ConfigError, OutputError, cannot_write


def check_repository(name: str) -> None:
    """Raises `ConfigError` unless `name` can be a repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {name!r}: not of the form organisation/name ({' '.join(str(error).split())})"
        ) from error


def write_folder(member: Member, folder: Path) -> None:
    """Writes configuration, tensors and a fresh card; nothing else of a checkpoint comes along.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with replaced_folder(folder) as temporary:
            write_adapter(temporary, member.tensors, member.info)
    except OSError as error:
        raise cannot_write("--out", folder, error) from error


def push(member: Member, name: str, private: bool) -> str:
    """Uploads an adapter in one commit; returns the repository's address.

    Raises:
        OutputError: the hub refuses, or cannot be reached; nothing of the adapter is there.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        write_folder(member, folder)
        try:
            address = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload adapter")
        except LocalTokenNotFoundError as error:
            raise OutputError(
                f"--push {name}: no login; set HF_TOKEN, or `hf auth login`"
            ) from error
        except HfHubHTTPError as error:
            raise OutputError(f"--push {name}: {_reason(error)}") from error
        except (OSError, RuntimeError) as error:
            text = " ".join(str(error).split())[:300]
            raise OutputError(f"--push {name}: the hub cannot be reached ({text})") from error
    return str(address)


def _reason(error: HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return (
            f"the hub says {status}: this login may not write there; set HF_TOKEN to one that may"
        )
    return f"the hub answers with an error: {' '.join(str(error).split())[:300]}"
