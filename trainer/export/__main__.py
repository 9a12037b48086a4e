"""`python -m trainer.export --adapter A`: shares an adapter, as a folder, on a hub, or with PEFT.

The card is made anew from what the adapter knows of itself. It repeats the command that trained the
adapter, with its paths: read it before you publish it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.evaluate.flags import add_weights_flag
from trainer.process.ending import conclude
from trainer.process.world import ALONE

if TYPE_CHECKING:
    from trainer.evaluate.members import Member


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add(
        "--adapter", required=True, metavar="A",
        help="folder of a saved adapter or checkpoint, or hf-hub:organisation/name",
    )  # fmt: skip
    add("--out", type=Path, metavar="FOLDER", help="write the adapter's three files")
    add("--peft", type=Path, metavar="FOLDER", help="write it for stock PEFT (lora, multi_lora)")
    add("--push", metavar="ORGANISATION/NAME", help="upload it to the hub, creating the repository")
    add("--private", action="store_true", help="of a repository that --push creates")
    add_weights_flag(result, "for --peft: ")
    return result


def export(args: argparse.Namespace) -> None:
    """Does what the command line asks for, after everything in it has proved possible.

    Raises:
        ConfigError, MissingAdapterError, MoAConfigError: something given cannot work.
        AdapterError, CheckpointError: the adapter is damaged.
        OutputError: a folder cannot be written.
    """
    from trainer.evaluate.members import check_target, read_members
    from trainer.export.sharing import check_repository, push, write_folder
    from trainer.process.errors import ConfigError

    if not (args.out or args.peft or args.push):
        raise ConfigError("nothing to do: give --out FOLDER, --peft FOLDER or --push ORG/NAME")
    if args.private and not args.push:
        raise ConfigError("--private: only with --push")
    (member,) = read_members([args.adapter])
    for flag, folder in (("--out", args.out), ("--peft", args.peft)):
        if folder is not None:
            check_target(flag, folder)
    if args.push:
        check_repository(args.push)
    if args.peft:
        _write_peft(member, args)
        _say(f"wrote {args.peft} for peft.PeftModel.from_pretrained")
    if args.out:
        write_folder(member, args.out)
        _say(f"wrote {args.out}")
    if args.push:
        _say(f"pushed to {push(member, args.push, args.private)}; load it with")
        _say(f'moa.load_adapter(model, "hf-hub:{args.push}")')


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _write_peft(member: "Member", args: argparse.Namespace) -> None:
    import moa
    from moa.files.saving import attach
    from trainer.evaluate.members import base_of
    from trainer.process.errors import OutputError

    backbone = base_of(member, args.weights)
    attach(backbone.model, member.info, member.tensors, member.source)
    try:
        moa.export_peft(backbone.model, args.peft, backbone.name)
    except OSError as error:
        raise OutputError(
            f"--peft: cannot write {args.peft} ({error.strerror or error})"
        ) from error


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: export(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
