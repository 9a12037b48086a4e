"""A micro-batch's forward, losses and backward as one CUDA graph, over inputs in static buffers.

On a CPU the same path runs without a graph, operation by operation.
"""

import gc
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import moa
from moa.model.static_routing import StaticRouting
from trainer.engine.engine import Engine
from trainer.prepare.capturing import is_captured, obstacle
from trainer.prepare.parts import Parts
from trainer.process.errors import ConfigError

log = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before a capture, in which libraries and compilers set up what they make at first use."""
OFF = 0.03
"""Share of their norm by which a replay's numbers may be others: sums in bf16, in any order."""
Launch = Callable[[], object]


def captured(work: Launch, device: torch.device) -> Launch:
    """On a GPU one launch that does again what `work` did, with the same tensors; else `work`.

    Before, `work` is run some times, and once more for the capture, which computes nothing.

    Raises `RuntimeError`: it does what a graph cannot repeat; or memory is short.
    """
    if device.type != "cuda":
        return work
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # also after a capture that failed
        for _ in range(WARM_UPS):
            work()
        # What is left of an earlier backward would tie the capture to the stream of that one.
        gc.collect()
        # Other threads, such as a loader's, may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    current.wait_stream(stream)
    return graph.replay


class Graphed:
    """Runs `compute` over copies of its inputs that stay where they are, on a GPU as one launch.

    Args:
        model: with adapters or without, where it computes.
        compute: from tensors on the model's device, of which the first counts its images, to one
            without graph; looks at no number of a tensor, and depends on no number in Python that
            changes. What else it leaves lies in tensors that stay.
        gradients: those of these tensors by which, with the result, a first replay is held against
            the step as written; None where a step changes what the next one starts from.
        falls_back: whether it may run without a graph if it turns out that it cannot be captured,
            or that a replay does not do what it should.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Callable[..., Tensor],
        gradients: Sequence[Tensor] | None = None,
        falls_back: bool = False,
    ) -> None:
        self.model, self.compute, self.gradients = model, compute, gradients
        self.falls_back = falls_back
        self.routing = StaticRouting(model)
        self._inputs: list[Tensor] = []
        self._result: Tensor
        self._launch: Launch | None = None

    def __call__(self, inputs: Sequence[Tensor], position: moa.RoutingPosition) -> Tensor:
        """What `compute` gives for a micro-batch that stands at `position`.

        Raises `ConfigError`: it cannot be captured; or torch's own error, where memory is short.
        """
        anew = _layout(inputs) != _layout(self._inputs)
        if anew:
            self._inputs = [torch.empty_like(given) for given in inputs]
        with torch.no_grad():
            for place, given in zip(self._inputs, inputs, strict=True):
                place.copy_(given)
        self.routing.place(position)
        if anew or self._launch is None:
            self._launch = self._captured()
        self._launch()
        self.routing.leave()
        return self._result.clone()  # the next launch writes there

    def _run(self) -> None:
        self.routing.begin(len(self._inputs[0]))
        self._result = self.compute(*self._inputs)
        self.routing.end()

    def _captured(self) -> Launch:
        device = self._inputs[0].device
        launch: Launch = self._run
        failure: RuntimeError | None = None
        with self.routing.not_counting():
            written = self._outcome(self._run)
            try:
                launch = captured(self._run, device)
            except RuntimeError as error:
                failure = error
                torch.get_device_module(device).synchronize()
                self.model.zero_grad()
            # Also after a failure: ranks that had none wait for this one's sums.
            replayed = self._outcome(launch)
        failure = failure or _difference(replayed, written)
        if failure is None:
            return launch
        reason = str(failure).partition("\n")[0]
        if self.falls_back:
            log.warning("no CUDA graph, since the step cannot be captured (%s)", reason)
            return self._run
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        raise ConfigError(
            f"train.graph: on, but this step cannot be captured ({reason}); use --train.graph auto "
            "or off"
        ) from failure

    def _outcome(self, launch: Launch) -> list[Tensor]:
        """What it leaves, for comparison."""
        if self.gradients is None:
            return []
        launch()
        return [tensor.clone() for tensor in (self._result, *self.gradients)]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> RuntimeError | None:
    """What is wrong if a replay gave other numbers than the step as written, where finite."""
    for given, wanted in zip(found, expected, strict=True):
        off, norm = (float(t.double().norm()) for t in (given - wanted, wanted))
        if math.isfinite(norm) and not off <= OFF * norm:
            return RuntimeError(f"a replay is off by {off:.2g}, from numbers of norm {norm:.2g}")
    return None


def _layout(tensors: Sequence[Tensor]) -> list[object]:
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def graphed_as_set(parts: Parts, engine: Engine, compute: Callable[..., Tensor]) -> Graphed | None:
    """What `train.graph` makes of a step, said in the log; None runs it as written."""
    config, on_gpu = parts.config, engine.device.type == "cuda"
    sharded = not engine.flats
    if is_captured(config, sharded, on_gpu):
        where = "one CUDA graph" if on_gpu else "in static buffers, without a graph on a CPU,"
        first = "; the first step, which checks gradients, not yet"
        log.info("train.graph: forward and backward are %s%s", where, first)
        gradients = [flat.gradient for flat in engine.flats]
        return Graphed(engine.module, compute, gradients, falls_back=config.train.graph == "auto")
    found = obstacle(config, sharded)
    if found and on_gpu and config.train.graph == "auto":
        log.info("train.graph: no CUDA graph, since there is %s", found[0])
    return None
