"""`python -m trainer.doctor`: what a run will meet here, before it is started.

Takes the flags of `trainer/run.py`, none of its own. Alone it looks at this machine; under `srun`,
`torchrun` or `deepspeed` at those of all processes, and names the worst rank. Each line is ok, a
warning (a run starts, slowly or not for long) or a failure. The exit code is that of the first
failure; all lines have their remedy.
"""

import argparse
import socket
import sys
import time
from collections.abc import Sequence

from trainer.config.command_line import build_parser, parse_without_data
from trainer.config.run_config import RunConfig
from trainer.doctor.lines import Check, Line, Subject, failed
from trainer.doctor.machine import cores, gpus, limits, operators, slurm, software
from trainer.doctor.ranks import MEETING, Told, gather, meet
from trainer.process.ending import conclude, leave
from trainer.process.errors import FINISHED
from trainer.process.world import World, world_from_environment

SOFTWARE = Check("software", software, 180.0)
MEET = Check("rendezvous", meet, MEETING + 20)


def checks(main: bool) -> list[Check]:
    """What a rank looks at by itself; some needs what an earlier one has found."""
    from trainer.doctor import data, room  # with torch, which must have been imported by then

    found = [
        Check("SLURM", slurm, 10.0),
        Check("GPU", gpus, 30.0),
        Check("operators", operators, 20.0),
        Check("limits", limits, 10.0),
        Check("shards", data.shards, 60.0),
        Check("plan", data.plan, 30.0),
        Check("cores", cores, 10.0),
        Check("reading", data.reading, 60.0),
        Check("weights", data.weights, 20.0, by_main=True),
        Check("shared memory", room.shared_memory, 20.0),
        Check("room", room.folders, 30.0),
    ]
    return [check for check in found if main or not check.by_main]


def examine(config: RunConfig, world: World) -> int:
    """Looks at everything; shows it on the main rank and returns the exit code."""
    subject, host = Subject(config, world), socket.gethostname()
    lines = SOFTWARE.lines(subject)
    if any(line.level == "failure" for line in lines):  # nothing else can be asked
        return conclusion({world.rank: (host, lines)}, world, 0.0)
    lines += MEET.lines(subject) if world.size > 1 else ()
    for check in checks(world.is_main):
        lines += check.lines(subject)
    seconds = sum(check.seconds for check in checks(main=True))
    if world.size == 1:
        lines.append(Line(check="processes", found="1; srun or torchrun tries the network, too"))
    if subject.board is not None:
        try:
            told = gather(subject, lines, seconds)
            return conclusion(told, world, 0.0) if world.is_main else FINISHED
        except RuntimeError as error:  # the main process is gone
            lines.append(failed("processes", error))
    return conclusion({world.rank: (host, lines)}, world, seconds)


def conclusion(told: Told, world: World, seconds: float) -> int:
    """Shows the table, or what is wrong with a rank that cannot tell the main one.

    Such a rank leaves so many seconds later: a launcher would end the others with it.
    """
    from trainer.doctor.table import code, rows, table, verdict
    from trainer.process.tables import output_console

    found = rows(told)
    if world.is_main:
        console = output_console()
        table(found, world.size).show(console)
        console.out(verdict(found))
    else:
        place = f"rank {world.rank} ({told[world.rank][0]})"
        for line in (row.line for row in found if row.line.level != "ok"):
            text = f"{place}: {line.check}: {line.level}: {line.found}; {line.remedy}\n"
            sys.stderr.write(text)
        sys.stderr.write(f"{place}: leaves in {seconds:.0f} s, after the main rank's table\n")
        sys.stderr.flush()
        time.sleep(seconds)
    return code(found)


def parser() -> argparse.ArgumentParser:
    """The command line, for its help."""
    result: argparse.ArgumentParser = build_parser()
    result.prog, result.description = "python -m trainer.doctor", __doc__
    return result


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        parser().print_help()
        return FINISHED
    world, codes = world_from_environment(), [FINISHED]
    ended = conclude(lambda: codes.append(examine(parse_without_data(argv), world)), world)
    return ended or codes[-1]


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
