"""One run per folder: a lock that the kernel drops with its process, and a note of who holds it."""

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trainer.checkpoint.atomic_file import replace_text
from trainer.process.errors import OutputError

log = logging.getLogger(__name__)

LEFT_BEHIND = 15.0
"""Seconds that a dead run's loader processes, which inherited its lock, may take to notice."""

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}
"""What a file system answers that knows no locks."""


class FolderLock:
    """Holds a folder, which must exist, for this process.

    The lock itself is the kernel's (flock). File systems exist where it holds nobody off; there the
    note decides, as far as it can: it names a process, and on the same machine that process is
    alive or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, folder / "owner.json"
        self._lock = FileLock(folder / ".lock")
        self._written: dict[str, Any] = {}
        self._seen: tuple[int, ...] = ()

    def acquire(self) -> None:
        """Takes the folder.

        Raises:
            OutputError: another run holds it.
            OSError: the folder cannot be written.
        """
        held = False
        try:
            self._lock.acquire(timeout=LEFT_BEHIND if is_alive(self.owner()) is False else 0)
        except Timeout:
            held = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s is on a file system without locks (%s): nothing keeps a run on another host "
                "from writing there, too", self.folder, error.strerror,
            )  # fmt: skip
        owner = self.owner()
        if held or is_alive(owner):
            self._lock.release()
            raise OutputError(
                f"output_dir: {self.folder} is in use by "
                f"{describe(owner) if owner else 'another run'}; give another --output_dir or end "
                "that run"
            )
        if owner and owner.get("host") != socket.gethostname():
            log.warning("%s was held by %s, which left no lock", self.folder, describe(owner))
        self._written = identity()
        replace_text(self.note, _text(self._written))

    def check(self) -> None:
        """Makes sure that the folder is still this run's, before something is written there.

        Who removes the folder of a run and starts another under its name does not always end the
        first one, whose rows and checkpoints would go among the other's. As long as the note is the
        file it was, which costs one look at the folder, nobody reads it.

        Raises `OutputError`: the folder, or the note in it, was removed or is another run's.
        """
        if not self._written:
            return
        try:
            found = self.note.stat()
            seen = (found.st_dev, found.st_ino, found.st_mtime_ns)
            if seen == self._seen:
                return
            if self.note.read_text(encoding="utf-8") == _text(self._written):
                self._seen = seen
                return
            how = f"taken over by {describe(self.owner())}"
        except FileNotFoundError:
            how = "removed"
        except OSError:
            return  # a file system that fails now and then; the next check tells
        raise OutputError(
            f"output_dir: {self.folder} (or {self.note.name} in it) was {how} while this run went "
            "on, which ends here"
        )

    def release(self) -> None:
        """Lets others take the folder."""
        if self.owner() == self._written:
            self.note.unlink(missing_ok=True)
        self._lock.release()
        self._written = {}

    def owner(self) -> dict[str, Any]:
        """What the note says; empty without a readable one."""
        try:
            found = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def identity() -> dict[str, Any]:
    """This process, told from all others that ever ran."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        **_machine(),
        "started": _start_of(pid),
    }


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether a noted process still runs; None where that cannot be told from here.

    It can be told on the same host in the same container; after a reboot nothing runs any more.
    """
    here = _machine()
    if owner.get("host") != socket.gethostname() or None in (*here.values(), owner.get("boot")):
        return None
    if owner["boot"] != here["boot"]:
        return False
    if owner.get("namespace") != here["namespace"]:
        return None
    started = _start_of(int(owner.get("pid", 0)))
    return started is not None and started == owner.get("started")


def describe(owner: dict[str, Any]) -> str:
    """Host, pid and time, for messages."""
    return f"{owner.get('host')} pid {owner.get('pid')} since {owner.get('since')}"


def _text(owner: dict[str, Any]) -> str:
    return json.dumps(owner) + "\n"


def _machine() -> dict[str, str | None]:
    """This boot of this machine and the container's process numbers; None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"boot": boot, "namespace": os.readlink("/proc/self/ns/pid")}
    except OSError:
        return {"boot": None, "namespace": None}


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to a process's start, as numbers are reused; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in ("Z", "X") else int(rest[18])
