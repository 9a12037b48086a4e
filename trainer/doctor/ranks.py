"""Checks of the processes together: whether they meet, their clocks, how fast they add up."""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace

from trainer.doctor.lines import Check, Level, Line, Subject, failed
from trainer.process.errors import PEER_LOST, ConfigError

Told = dict[int, tuple[str, list[Line]]]
"""Rank -> its host, its lines."""
MEETING = 60.0
"""Seconds in which the main process must be reached."""
SKEW = (2.0, 60.0)
"""Seconds of difference that are a warning, a failure."""
SIZES = {"cpu": 2**24, "cuda": 2**28}
"""Bytes that are added up over all processes."""
SLOWEST = 0.1
"""Share of the rate that the plan assumes, below which something is wrong with a network."""


def meet(subject: Subject) -> Iterator[Line]:
    """Whether this process reaches the main one."""
    from trainer.engine.rendezvous import Board

    started = time.monotonic()
    try:
        subject.board = Board(subject.world, MEETING)
    except ConfigError as error:
        line = failed("rendezvous", error)
        remedy = "a node up, a port open and an address that all nodes reach: the main rank's; "
        yield line if subject.world.is_main else replace(line, remedy=remedy + line.remedy)
        return
    seconds = time.monotonic() - started
    found = f"{subject.world.size} processes, the main one reached in {seconds:.1f} s"
    yield Line(check="rendezvous", found=found, worse=seconds)


def gather(
    subject: Subject, lines: Sequence[Line], seconds: float, clock: Callable[[], float] = time.time
) -> Told:
    """Brings the lines of all ranks to the main one, and those on what they can only do together.

    Args:
        subject: this process, whose board is there.
        lines: its own.
        seconds: in which every rank must have made its lines.
        clock: this process's time.

    Returns:
        On the main rank those of all; of ranks that left none, a line among its own.
    """
    world, board = subject.world, subject.board
    assert board is not None
    host, ranks, late = socket.gethostname(), range(world.size), 2 * REDUCING.seconds
    own = [*lines]
    board.tell("lines", [host, [asdict(line) for line in own]])
    if not world.is_main:
        go = board.hear("go", [0], 2 * seconds)
        together = list(_clock(go[0][0] - clock())) if go else []
        together += REDUCING.lines(subject) if go and go[0][1] else []
        board.tell("together", [host, [asdict(line) for line in together]])
        return {world.rank: (host, own + together)}
    told = _read(board.hear("lines", ranks, seconds))
    missing = [str(rank) for rank in ranks if rank not in told]
    board.tell("go", [clock(), not missing])
    if missing:
        found = f"no word from rank {', '.join(missing)} within {seconds:.0f} s"
        remedy = "the log of that rank tells why; a closed port, an address that its node cannot "
        remedy += "reach (MASTER_ADDR, NCCL_SOCKET_IFNAME), a node that hangs"
        line = Line(check="processes", found=found, level="failure", remedy=remedy, code=PEER_LOST)
        told[0][1].append(line)
    else:
        hosts = len({told[rank][0] for rank in ranks})
        found = f"{world.size} on {hosts} host{'s' if hosts > 1 else ''}, all heard"
        told[0][1].append(Line(check="processes", found=found))
        told[0][1].extend(REDUCING.lines(subject))
    for rank, (_, more) in _read(board.hear("together", sorted({*told} - {0}), late)).items():
        told[rank][1].extend(more)
    return told


def _read(notes: dict[int, tuple[str, list[dict[str, object]]]]) -> Told:
    return {
        rank: (host, [Line(**line) for line in lines])  # type: ignore[arg-type]
        for rank, (host, lines) in notes.items()
    }


def _clock(ahead: float) -> Iterator[Line]:
    """`ahead` is the main rank's time less this one's, as soon as its word is here."""
    warning, failure = SKEW
    off = abs(ahead)
    level: Level = "failure" if off >= failure else "warning" if off >= warning else "ok"
    where = f"{off:.1f} s {'behind' if ahead > 0 else 'ahead of'} rank 0's"
    remedy = "chronyc or timedatectl of that node; certificates, munge and the order of files by "
    remedy += "time depend on it"
    yield Line(
        check="clock", found=where if off >= 0.1 else "as rank 0's", worse=off,
        level=level, remedy=remedy,
    )  # fmt: skip


def reduce(subject: Subject) -> Iterable[Line]:
    """How fast all processes add up what each has."""
    from trainer.plan.scaling import Rates
    from trainer.process.device import use_device

    world, device = subject.world, use_device(subject.world)
    assert subject.board is not None
    what = "gloo" if device.type == "cpu" else "NCCL"
    try:
        rate = subject.board.reduce(device, SIZES[device.type], REDUCING.seconds / 2)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1][:300]
        remedy = "GLOO_SOCKET_IFNAME names the interface between the nodes"
        if what == "NCCL":
            remedy = "NCCL_DEBUG=INFO tells more; NCCL_SOCKET_IFNAME and NCCL_IB_HCA name the "
            remedy += "interfaces; each process needs a GPU of its own"
        yield Line(
            check="all-reduce", found=f"{what}: {reason}", level="failure", remedy=remedy,
            code=PEER_LOST,
        )  # fmt: skip
        return
    found = f"{what}: {rate / 1e9:.3g} GB/s a process"
    assumed = Rates().node if world.size <= max(world.local_size, 1) else Rates().network
    slow = what == "NCCL" and rate < SLOWEST * assumed
    if what == "NCCL":
        found += f", the plan assumes {assumed / 1e9:.3g}"
    remedy = "NCCL_DEBUG=INFO: NET/Socket in the log means no InfiniBand (NCCL_IB_HCA)"
    yield Line(
        check="all-reduce", found=found, level="warning" if slow else "ok", worse=-rate,
        remedy=remedy,
    )  # fmt: skip


REDUCING = Check("all-reduce", reduce, 60.0)
