"""How a command of several processes ends; DeepSpeed is imported only where it was needed."""

from collections.abc import Callable

from trainer.process.ending import conclude
from trainer.process.world import World, world_from_environment


def leave_group() -> None:
    """Leaves the processes' group, when nothing of what they did together is left."""
    from trainer.engine import collectives

    collectives.stop()


def conclude_together(action: Callable[[World], object]) -> int:
    """The exit code of `action` in the world of the launcher, whose group is left afterwards."""
    world = world_from_environment()
    afterwards = leave_group if world.size > 1 else lambda: None
    return conclude(lambda: action(world), world, afterwards=afterwards)
