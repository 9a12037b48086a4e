"""`python -m trainer.export --adapter A`: shares an adapter, as a folder, on a hub, or with PEFT.

The card is made anew from what the adapter knows of itself. It repeats the command that trained the
adapter, with its paths but without what gives access to data: read it before you publish it.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.command_line import command_parser
from trainer.evaluate.flags import add_alpha_flags, add_weights_flag
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError, OutputError, cannot_write
from trainer.process.world import ALONE

if TYPE_CHECKING:
    from trainer.evaluate.members import Member


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = command_parser("trainer.export", __doc__, allow_abbrev=False)
    add = result.add_argument
    add(
        "--adapter", required=True, metavar="A",
        help="folder of a saved adapter or checkpoint, or hf-hub:organisation/name",
    )  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="write the adapter's three files")
    add("--peft", type=Path, metavar="FOLDER", help="write it for stock PEFT (lora, multi_lora)")
    add("--push", metavar="ORGANISATION/NAME", help="upload it to the hub, creating the repository")
    add("--private", action="store_true", help="of a repository that --push creates")
    purpose = "share, 0 to 1, of the way from the start of the adapter's training to its end"
    add_alpha_flags(result, "A", purpose)
    add_weights_flag(result, "for --peft and --alpha: ")
    return result


def export(args: argparse.Namespace) -> None:
    """Does what the command line asks for, after everything in it has proved possible.

    Raises:
        ConfigError, MissingAdapterError, MoAConfigError: something given cannot work.
        AdapterError, CheckpointError: the adapter is damaged.
        OutputError: a folder or repository cannot be written.
    """
    from trainer.evaluate.members import check_target, read_members, write_member

    if not (args.out or args.peft or args.push):
        raise ConfigError("nothing to do: give --out FOLDER, --peft FOLDER or --push ORG/NAME")
    if args.private and not args.push:
        raise ConfigError("--private: only with --push")
    (member,) = read_members([args.adapter])
    if args.text_model is not None and args.alpha is None:
        raise ConfigError("--model.text_model: only with --alpha; leave it out")
    for flag, folder in (("--out", args.out), ("--peft", args.peft)):
        if folder is not None:
            check_target(flag, folder)
    if args.push:
        _check_repository(args.push)
        _check_command(member, args.push)
    if args.alpha is not None:
        member = _between(member, args)
    if args.peft:
        _write_peft(member, args.peft, args.weights)
        _say(f"wrote {args.peft} for peft.PeftModel.from_pretrained")
    if args.out:
        write_member("--out", member, args.out)
        _say(f"wrote {args.out}")
    if args.push:
        _say(f"pushed to {_push(member, args.push, args.private)}; load it with")
        _say(f'moa.load_adapter(model, "hf-hub:{args.push}")')


def _between(member: "Member", args: argparse.Namespace) -> "Member":
    from trainer.evaluate.interpolation import interpolated, read_alphas, start_of

    alphas = read_alphas(args.alpha)
    if len(alphas) > 1:
        raise ConfigError(
            f"--alpha {args.alpha}: one adapter lies at one alpha; trainer.evaluate --alpha "
            f"{args.alpha} chooses one of several"
        )
    return interpolated(member, start_of(member, args.weights, args.text_model).model, *alphas)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _write_peft(member: "Member", folder: Path, weights: str | None) -> None:
    import moa
    from moa.files.saving import attach
    from trainer.evaluate.members import base_of

    backbone = base_of(member, weights)
    attach(backbone.model, member.info, member.tensors, member.source)
    try:
        moa.export_peft(backbone.model, folder, backbone.name)
    except OSError as error:
        raise cannot_write("--peft", folder, error) from error


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"--push {name!r}: not of the form organisation/name ({_short(error)})"
        ) from error


def _check_command(member: "Member", name: str) -> None:
    """Refuses to publish a command of which something was left out: there may be more to it."""
    from shards.addresses import lacks_secrets
    from trainer.prepare.provenance import shareable

    if (origin := member.info.origin) and lacks_secrets(command := shareable(origin).command):
        raise ConfigError(
            f"--push: the command that trained {member.source} may hold more that gives access "
            f"than was left out ({command}); give --out FOLDER, read its README.md and "
            f"adapter_config.json, and publish it with: hf upload {name} FOLDER"
        )


def _push(member: "Member", name: str, private: bool) -> str:
    """Uploads an adapter in one commit, whole or not at all; returns the repository's address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from trainer.evaluate.members import write_member

    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        write_member("--push", member, folder)
        try:
            address = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload adapter")
            return str(address)
        except LocalTokenNotFoundError as error:
            raise OutputError(
                f"--push {name}: no login; set HF_TOKEN, or `hf auth login`"
            ) from error
        except HfHubHTTPError as error:
            reason = f"the hub answers with an error: {_short(error)}"
            if (status := getattr(error.response, "status_code", None)) in (401, 403):
                remedy = "this login may not write there; set HF_TOKEN to one that may"
                reason = f"the hub says {status}: {remedy}"
            raise OutputError(f"--push {name}: {reason}") from error
        except (OSError, RuntimeError) as error:
            reason = f"the hub cannot be reached ({_short(error)})"
            raise OutputError(f"--push {name}: {reason}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: export(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
