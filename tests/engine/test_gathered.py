"""harness.sharding.gathered: weights are whole while sampling, and the model is afterwards what it was before."""

import argparse

import common
from harness.flags import of_the_world
from harness.sharding import gathered

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class Interrupted(Exception):
    """What goes wrong while sampling."""


@pytest.fixture
def sharded(folder):
    """A model in shards, of a process group that holds this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    args = of_the_world(train_vision=True, gradient_checkpointing=False)
    run = argparse.Namespace(args=args, sharded=True, device=torch.device("cpu"))
    try:
        yield common.load_policy(folder, run, train=True)[0]
    finally:
        dist.destroy_process_group()


def is_in_shards(model):
    kinds = {isinstance(weight, DTensor) for weight in model.parameters()}
    assert len(kinds) == 1
    return kinds == {True}


@pytest.mark.parametrize("training", [False, True])
def test_an_exception_leaves_the_mode_as_it_was(policy, training):
    policy.train(training)
    try:
        with pytest.raises(Interrupted), gathered(policy):
            assert not policy.training
            raise Interrupted
        assert all(module.training == training for module in policy.modules())
    finally:
        policy.eval()


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_whole_inside_and_in_shards_again_behind_it(sharded, fails):
    """Whether what is done inside succeeds or not; and the weights are the same numbers in the same order."""
    before = [weight.full_tensor().clone() for weight in sharded.parameters()]
    assert is_in_shards(sharded)
    try:
        with gathered(sharded):
            assert not is_in_shards(sharded)
            if fails:
                raise Interrupted
    except Interrupted:
        assert fails
    assert is_in_shards(sharded)
    after = [weight.full_tensor() for weight in sharded.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_failed_sample_does_not_spoil_the_next_reading(sharded, loaded, processor, problems):
    """A picture that cannot be read, then a good one: log-probs and gradients are those of a model never gathered."""
    whole, _ = loaded
    rollout = common.forced(sharded, processor, problems[:2], ["a b", "c"])
    with pytest.raises(Interrupted), gathered(sharded):
        raise Interrupted
    ours_BT = common.read(common.token_logps, rollout, sharded)
    theirs_BT = common.read(common.token_logps, rollout, whole.requires_grad_(True))
    assert torch.allclose(ours_BT, theirs_BT, atol=1e-6)
    whole.zero_grad()
    ours_BT.sum().backward()
    theirs_BT.sum().backward()
    for one, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(one.grad, DTensor)
        assert torch.allclose(one.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)
