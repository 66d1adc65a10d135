"""One update for all LoRA matrices: the values and the state of bitsandbytes' own loop, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from medcot_utils.training.joined_update import JoinedAdamW8bit

# Of LoRA's kind; one too small for 8 bits, one whose blocks another would shift, and one without a gradient.
SHAPES = [(16, 512), (1024, 16), (16, 512), (4, 64), (5000, 1), (16, 512)]


def make(kind, seed=0):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": parameters[:3], "weight_decay": 0.01}, {"params": parameters[3:], "weight_decay": 0.0}]
    return parameters, kind(groups, lr=1e-2)


def take_steps(parameters, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def states(optimizer):
    return [{name: copy.deepcopy(value) for name, value in state.items()} for state in optimizer.state.values()]


def assert_same(one, other):
    for left, right in zip(one, other, strict=True):
        assert set(left) == set(right)
        for name, value in left.items():
            assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name


def test_joined_steps_equal_those_of_bitsandbytes_exactly():
    (alone, theirs), (joined, ours) = make(AdamW8bit), make(JoinedAdamW8bit)
    begun = [parameter.detach().clone() for parameter in joined]
    assert all(map(torch.equal, take_steps(alone, theirs, 5), take_steps(joined, ours, 5)))
    assert_same(states(theirs), states(ours))
    assert [torch.equal(now, then) for now, then in zip(joined, begun, strict=True)] == [False] * 5 + [True]


@pytest.mark.parametrize(("before", "after"), [(AdamW8bit, JoinedAdamW8bit), (JoinedAdamW8bit, AdamW8bit)])
def test_a_checkpoint_of_either_optimizer_resumes_with_the_other(before, after, tmp_path):
    whole, optimizer = make(before)
    take_steps(whole, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, other = make(after, seed=2)
    for new, old in zip(resumed, whole, strict=True):
        new.data.copy_(old.data)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert all(map(torch.equal, take_steps(whole, optimizer, 3, seed=3), take_steps(resumed, other, 3, seed=3)))


def test_parameters_that_began_later_are_updated_by_their_own_step():
    results = []
    for kind in (AdamW8bit, JoinedAdamW8bit):
        parameters, optimizer = make(kind)
        take_steps(parameters[:2], optimizer, 2)
        results.append(take_steps(parameters, optimizer, 2, seed=5))
    assert all(map(torch.equal, *results))
