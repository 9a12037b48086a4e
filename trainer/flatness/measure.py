"""The figures of an adapter's flatness over fixed samples, and their picture."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from shards.stream.evaluation import split_places
from trainer.evaluate.combine import models_on
from trainer.evaluate.data import open_data
from trainer.evaluate.drawing import literally
from trainer.evaluate.fixed_images import FixedImages, fixed_images
from trainer.evaluate.members import Member, base_of, read_members
from trainer.flatness.surface import (
    Surface,
    adaptive_sharpness,
    random_direction,
    slice_along,
    top_eigenvalues,
)
from trainer.process.device import use_device
from trainer.process.errors import ConfigError
from trainer.process.world import ALONE


def members_and_samples(args: argparse.Namespace) -> tuple[list[Member], FixedImages]:
    """The adapters and the samples they are measured on, drawn by the seed."""
    members = read_members(args.adapter)
    data = open_data(args, members)
    for warning in data.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    places = []
    for env in data.envs:
        ranks = np.sort(
            split_places(
                data.index, env, args.split, trial_seed=data.trial_seed,
                holdout_fraction=data.config.holdout_fraction,
            )
        )  # fmt: skip
        chosen = np.random.default_rng((args.seed, env)).permutation(len(ranks))[: args.samples]
        places += [(env, int(ranks[place])) for place in sorted(chosen.tolist())]
    if not places:
        raise ConfigError(f"--split: {args.split} has no sample in the domains asked for")
    return members, fixed_images(data.index, places, members[0].info.data_config, data.decoder)


def measure(member: Member, samples: FixedImages, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one adapter."""
    surface = _surface_of(member, samples, args)
    eigenvalues, products = (
        top_eigenvalues(surface, args.eigenvalues, args.seed) if args.eigenvalues else ([], 0)
    )
    places = np.linspace(-args.reach, args.reach, args.points).tolist()
    return {
        "weights": len(surface.weights),
        "samples": surface.number,
        "loss": surface.loss(surface.weights),
        "eigenvalues": eigenvalues,
        "hessian_products": products,
        "sharpness": adaptive_sharpness(surface, args.rho, args.steps),
        "places": places,
        "slices": [
            slice_along(surface, random_direction(surface, args.seed + number), places)
            for number in range(args.directions)
        ],
    }


def _surface_of(member: Member, samples: FixedImages, args: argparse.Namespace) -> Surface:
    """The loss around an adapter, in fp32, over the samples."""
    backbone = base_of(member, args.weights)
    (model,) = models_on(backbone.model, [member])
    device = use_device(ALONE)
    images, labels = samples.images.to(device), torch.tensor(samples.labels, device=device)
    batches = zip(torch.split(images, args.batch), torch.split(labels, args.batch), strict=True)
    return Surface(model.to(device), list(batches))


@literally
def slices_figure(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The losses along the random directions, one colour for each adapter."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(results.items()):
        for line, losses in enumerate(found["slices"]):
            label = name if line == 0 else None
            axes.plot(found["places"], losses, color=f"C{number}", alpha=0.8, label=label)
    axes.set_xlabel("step along a direction with the weights' filter norms")
    axes.set_ylabel("mean cross-entropy")
    axes.legend(fontsize="small")
    return figure
