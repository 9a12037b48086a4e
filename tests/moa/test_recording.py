"""Which expert each token went to, as recorded while asked for."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import moa
from moa.layers.layer import moa_layers
from tests.support.moa_fixtures import images, small_config, stir, tiny_vit


def test_recorded_gates_are_those_of_the_cosine_formula_per_token() -> None:
    model = tiny_vit().double()
    moa.inject(model, small_config("moa_lora", blocks="all"))
    stir(model)
    model.eval()
    inputs: dict[str, Tensor] = {}
    for name, layer in moa_layers(model):
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].detach())
        )
    with torch.no_grad(), moa.recorded_routes(model) as routes:
        model(images(3, dtype=torch.float64))
    layers = dict(moa_layers(model))
    assert list(routes) == list(layers)
    experts_seen = set()
    for name, gates in routes.items():
        assert gates.shape == (3, 5, 3)
        router = layers[name].router
        scale = math.exp(min(float(router.temperature.detach()), math.log(100)))
        for image in range(3):
            for token in range(5):
                z = router.proj.weight @ inputs[name][image, token] + router.proj.bias
                cosines = torch.stack(
                    [F.cosine_similarity(z, router.embed[:, e], dim=0) for e in range(3)]
                )
                probabilities = (scale * cosines).softmax(0)
                best = int(probabilities.argmax())
                expected = torch.zeros(3, dtype=torch.float64)
                expected[best] = probabilities[best]
                torch.testing.assert_close(gates[image, token], expected)
                experts_seen.add((name, best))
    assert len(experts_seen) > len(layers), "every layer used one expert only: shows nothing"


def test_nothing_is_kept_after_the_block_or_of_gates_alike_for_all_tokens() -> None:
    model = tiny_vit()
    moa.inject(model, small_config("moa_kron"))
    with moa.recorded_routes(model) as outer:
        with moa.recorded_routes(model) as inner:
            model(images(1))
        assert len(inner) == 2
        assert not outer
        model(images(2))
        assert {gates.shape for gates in outer.values()} == {(2, 5, 3)}
        assert not any(gates.requires_grad for gates in outer.values())
    before = dict(outer)
    model(images(1))
    assert all(outer[name] is gates for name, gates in before.items())
    assert all(layer.record_gates is None for _, layer in moa_layers(model))
    mixture = tiny_vit()
    moa.inject(mixture, small_config("multi_lora"))
    with moa.recorded_routes(mixture) as routes:
        mixture(images(1))
    assert not routes
