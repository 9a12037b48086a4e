"""Parameters as views of one flat tensor."""

import torch
from torch import nn

from trainer.engine.flat import Flat, FlatModel


def test_parameters_and_gradients_are_those_of_one_tensor() -> None:
    layer = nn.Linear(3, 2)
    wanted = {name: p.detach().clone() for name, p in layer.named_parameters()}
    flat = Flat(dict(layer.named_parameters()))
    assert flat.parameter.shape == (8,)
    torch.testing.assert_close(flat.cut(flat.parameter), wanted)
    assert flat.joined(wanted).equal(flat.parameter)
    with torch.no_grad():
        flat.parameter += 1
    assert layer.bias.equal(wanted["bias"] + 1), "the same memory"
    flat.parameter.data = flat.parameter.data.clone()  # as DeepSpeed moves it
    flat.share()
    with torch.no_grad():
        flat.parameter += 1
    torch.testing.assert_close(layer.bias.detach(), wanted["bias"] + 2)

    seen = FlatModel([flat], None)
    layer(torch.ones(3)).sum().backward()
    assert flat.take_gradient().tolist() == [1.0] * 8
    assert layer.weight.grad is None
    for _ in range(2):  # micro-batches, of which nothing reaches the weight
        (2 * layer.bias.sum()).backward()
        seen([flat.take_gradient()]).backward()
    assert flat.parameter.grad is not None
    assert flat.parameter.grad.tolist() == [0.0] * 6 + [4.0] * 2, "not the buffer they came in"
