"""The same training whatever the world: a matrix of arrangements against one plain process.

The reference is plain torch (`parity_worker.reference`): AdamW, clipping, gate noise and
augmentation on. In fp32 a relative error of 1e-6 is allowed in losses, gradient norms and every
parameter. In bf16 two runs round differently, so each may be off by what bf16 does to the
reference.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import warm
from tests.support.trainer_fixtures import ROOT, environment

WORKER = str(ROOT / "tests" / "support" / "parity_worker.py")
TOLERANCE = 1e-6
Case = dict[str, Any]


def case(name: str, stage: int | str, method: str = "moa_kron", **config: Any) -> Case:
    """One arrangement; `stage` is a number or the name of a file in ds_configs/."""
    file = f"zero{stage}" if isinstance(stage, int) else stage
    return {
        "name": f"{name}, {file}, {method}",
        "config": {"method": method, **config},
        "ds_config": f"ds_configs/{file}.json",
    }


SPREAD = "nothing kept whole"


def spread(world: int, method: str, **config: Any) -> Case:
    """ZeRO-3 without its allowance for keeping small parameters whole, as all of these are."""
    zero = {"stage3_param_persistence_threshold": 0}
    return case(f"{SPREAD}, world {world} {config}", 3, method, **config) | {"zero": zero}


def matrix(world: int) -> list[Case]:
    """World x stage x ep_size x transport x kind of expert, where legal.

    Two processes try everything with everything; four, which cost twice as much, each kind with one
    transport, and every pair of stage, ep_size and kind.
    """
    cases = []
    for stage, method in product((1, 2, 3), ("moa_lora", "moa_kron")):
        odd = (stage == 2) == (method == "moa_kron")
        if world < 4 or stage == 3 or odd:
            cases.append(case(f"world {world}", stage, method))
        for ep_size, transport in product((2, 4), ("gather", "all_to_all")):
            fits = (transport == "gather") == (method == "moa_kron")
            tried = world < 4 or (fits and (ep_size == 2) == odd)
            if stage < 3 and world % ep_size == 0 and tried:
                name = f"world {world}, ep {ep_size} {transport}"
                cases.append(case(name, stage, method, ep_size=ep_size, transport=transport))
    return cases


# What else the step has, once with each transport where it can be.
ROUTING = {"top_k": 2, "shared_rank": 2, "balance": "bias", "balance_rate": 0.01}
SOFT = {"router": "soft", "shared_rank": 3}
FEW = {"ranks": [1, 2], "blocks": [0]}  # fewer experts than ranks
COMPILED = {"compile": "blocks", "checkpointing": True}
GATHER, EXCHANGE = {"transport": "gather"}, {"transport": "all_to_all"}


def minimising(name: str, stage: int, sam: float = 0.0, **config: Any) -> Case:
    """A case with an objective; without a balance loss, so that pieces make no difference."""
    weight = {"vrex": 1.5, "irm": 3.0}.get(name)
    own = {f"{name}_anneal": 2, f"{name}_lambda": weight} if weight else {}
    objective = {"name": name, "sam": sam, **own}
    settings = {"aux_weight": 0.0, "objective": objective, **config}
    return case(f"{name}, sam {sam} {config}", stage, **settings)


PIECES = {"accumulation": 2}
MORE = {
    1: [minimising("mmd", 1, **PIECES)],
    2: [
        case("offload", "zero2_offload"),
        case("offload", "zero3_offload"),
        case("accumulation", 2, accumulation=2),
        case("accumulation", 3, accumulation=2),
        case("graph accumulation", 2, accumulation=2, graph="on", diversity=0.5, dropout=0.5),
        case("accumulation or not", 2, accumulation=5, aux_weight=0.0),
        case("ep accumulation", 1, ep_size=2, accumulation=2, **EXCHANGE),
        case("ep checkpointing", 2, ep_size=2, checkpointing=True, **GATHER),
        case("ep checkpointing", 2, "moa_lora", ep_size=2, checkpointing=True, **EXCHANGE),
        case("checkpointing", 3, checkpointing=True),
        case("routing", 2, "moa_lora", ep_size=2, expert_dropout=0.2, **ROUTING, **GATHER),
        case("routing", 2, "moa_kron", ep_size=2, **ROUTING, **EXCHANGE),
        case("soft", 1, "moa_lora", ep_size=2, **SOFT, **EXCHANGE),
        case("uniform", 1, "multi_lora", ep_size=2, **GATHER),
        case("linear router", 3, "moa_lora", router="linear", expert_dropout=0.2),
        case("one adapter", 3, "kadaptation", head="cosine", dropout=0.5),
        case("compiled", 2, "moa_lora", expert_dropout=0.2, **PIECES, **ROUTING, **COMPILED),
        case("full", 3, "full"),
        *(spread(2, method) for method in ("moa_lora", "moa_kron", "full")),
        spread(2, "moa_kron", checkpointing=True),
        minimising("groupdro", 3, **PIECES),
        minimising("irm", 2, ep_size=2, **GATHER),
        minimising("coral", 2, sam=0.05, ep_size=2, dropout=0.1, **EXCHANGE, **PIECES),
        minimising("mmd", 3),
        minimising("erm", 1, sam=0.05, **PIECES),
        minimising("vrex", 1, precision="bf16", **PIECES),
        # Whose partners are on the other process: four domains, six images each.
        minimising("mixup", 2, held_out="rotated+inverted", batch_per_domain=3, **PIECES),
    ],
    4: [
        minimising("vrex", 1),
        minimising("coral", 3),
        spread(4, "moa_kron"),
        case("idle ranks", 2, "moa_lora", ep_size=4, **FEW, **GATHER),
        case("idle ranks", 2, "moa_kron", ep_size=4, **FEW, **EXCHANGE),
    ],
}


def rounded(world: int) -> list[Case]:
    """The same in bf16: every stage, and expert parallelism with either transport.

    Four processes, which cost twice as much, try the latter.
    """
    stages = (1, 2, 3) if world < 4 else ()
    cases = [case(f"bf16, world {world}", stage, precision="bf16") for stage in stages]
    if world > 1:
        more = {"ep_size": world, "precision": "bf16"}
        cases.append(case(f"bf16, world {world}, ep {world} gather", 2, **more, **GATHER))
        cases.append(case(f"bf16, world {world}, ep {world} all_to_all", 1, **more, **EXCHANGE))
    if world == 2:
        cases.append(case("bf16 accumulation", 2, precision="bf16", accumulation=2))
    return cases


FAULTS: list[Case] = [
    case(f"faults, {precision} {config}", file, precision=precision, **config) | {"faults": True}
    for precision in ("fp32", "bf16")
    for file, config in [
        *((file, {}) for file in (1, 2, 3, "zero2_offload", "zero3_offload")),
        (2, {"ep_size": 2, **GATHER}),
        (1, {"ep_size": 2, **EXCHANGE}),
        (2, {"objective": {"name": "groupdro", "sam": 0.05}}),
    ]
    # There DeepSpeed keeps what overflowed; the next step is not finite either, and ends the run.
    if (precision, file) != ("bf16", "zero2_offload")
]
"""Steps that are not finite, under every file and both precisions."""


def all_cases(world: int) -> list[Case]:
    return [*matrix(world), *MORE[world], *rounded(world)]


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that say what is computed, not where.

    Only the balance loss, which is not linear, depends on how a batch is cut for accumulation.
    """
    where = ["ep_size", "transport", "checkpointing", "compile", "graph"]
    if config.get("aux_weight") == 0:
        where.append("accumulation")
    return {key: value for key, value in config.items() if key not in where}


def run(world: int, cases: list[Case], target: Path) -> dict[str, Any]:
    """Results by name; with `world` 0 in one plain process."""
    env = environment(PARITY_CASES=json.dumps(cases))
    result = warm.run(WORKER, str(target), env=env, processes=world, timeout=580)
    assert result.returncode == 0, result.stderr[-4000:]
    results: dict[str, Any] = torch.load(target)
    return results


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Plain runs by the JSON of their settings."""
    wanted = {}
    for settings in (without_place(c["config"]) for world in MORE for c in all_cases(world)):
        wanted[json.dumps(settings)] = settings
        exact = {key: value for key, value in settings.items() if key != "precision"}
        wanted[json.dumps(exact)] = exact
    cases = [{"name": name, "config": c, "reference": True} for name, c in wanted.items()]
    return run(0, cases, tmp_path_factory.mktemp("reference") / "results.pt")


def relative(given: float, wanted: float) -> float:
    return abs(given - wanted) / abs(wanted)


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest relative error of losses, gradient norms, parameters and their averages."""
    errors = [
        relative(a[key], b[key])
        for a, b in zip(found["rows"], wanted["rows"], strict=True)
        for key in ("loss", "grad_norm")
    ]
    assert found["final"].keys() == wanted["final"].keys()
    parts = [(found["final"], wanted["final"])]
    parts += [(found["averages"][kind], wanted["averages"][kind]) for kind in wanted["averages"]]
    for given, expected in parts:
        for name, tensor in expected.items():
            difference = (given[name].double() - tensor.double()).norm().item()
            norm = tensor.double().norm().item()
            errors.append(difference / norm if norm else difference)
    return max(errors)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_matrix(world: int, references: dict[str, Any], tmp_path: Path) -> None:
    cases, faults = all_cases(world), FAULTS if world == 2 else []
    found = run(world, [*cases, *faults], tmp_path / "results.pt")
    assert len(found) == len(cases) + len(faults)
    errors = {}
    for c in cases:
        settings = without_place(c["config"])
        wanted = references[json.dumps(settings)]
        errors[c["name"]] = worst(found[c["name"]], wanted), TOLERANCE
        if settings.pop("precision", "fp32") == "bf16":
            noise = worst(wanted, references[json.dumps(settings)])
            errors[c["name"]] = errors[c["name"]][0], 2 * noise
    (tmp_path / "errors.json").write_text(json.dumps(errors, indent=1))
    assert not {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    for name in (c["name"] for c in cases):
        assert (found[name]["resident"] == 0) == name.startswith(SPREAD), name
        assert found[name]["restored"], name
        assert found[name]["held_elsewhere"] == 0, "one process reads the weights"
        if not {"zero3", "zero2_offload", "zero3_offload"} & set(name.split(", ")):
            assert not found[name]["reads"], "a step that waits for the device"
        assert found[name]["deadlines"] > 3, "the watchdog speaks before NCCL"
        assert found[name]["buffer"] == pytest.approx(1.001, abs=1e-6), "not rounded to bf16"
        reduced = found[name]["reductions"]
        assert {dtype for _, dtype, numbers in reduced if numbers > 1} <= {"float32"}, name
        if name.startswith("world 2, zero"):
            # The balance loss both ways, the gradients, their norm; and one vector of ours: two
            # losses, one of each rank, votes, and six domains' counts of three kinds of bad images.
            # ZeRO-3 takes the norm of each parameter group by itself: of head and rest, with and
            # without weight decay.
            assert len(reduced) == (8 if "zero3" in name else 5), name
            assert reduced[-1] == ("all_reduce", "float32", 2 + 2 + 4 + 6 * 3)
    for name in (c["name"] for c in faults):
        expected = {"same": [True, True, False], "skipped": [0, 2, 4, 4], "finite": True}
        assert found[name] == expected, name


def test_references_move(references: dict[str, Any]) -> None:
    """What is compared has trained: the losses differ from step to step, clipping was active."""
    for results in references.values():
        losses = [row["loss"] for row in results["rows"]]
        assert len(set(losses)) == len(losses)
        assert max(row["grad_norm"] for row in results["rows"]) > 0.05
