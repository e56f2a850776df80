"""harness.sharding: weights are whole while sampling, and the model is afterwards what it was before; the mesh."""

import argparse

import common
from harness import sharding
from harness.flags import UserError, of_the_world
from harness.sharding import gathered

import pytest
import torch
import torch.distributed as dist
from references import draw
from torch.distributed.fsdp import FSDPModule
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


# --- the hooks of layers ----------------------------------------------------------------------------------------------


def hooks(model):
    """(before, after) the forward pass of every unit but the root."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]
    assert len(units) > 4
    return [(len(unit._forward_pre_hooks), len(unit._forward_hooks)) for unit in units]


@pytest.mark.parametrize("fails", [False, True])
def test_layers_have_no_hooks_while_weights_are_gathered(sharded, processor, problems, fails):
    """They cost a quarter of a decoded token's time. Afterwards there is one of each, whatever happened inside."""
    called = []
    layer = sharded.model.language_model.layers[0]
    own = layer.register_forward_pre_hook(lambda *given: called.append(isinstance(layer.mlp.up_proj.weight, DTensor)))
    before = hooks(sharded)
    assert set(before) == {(1, 1), (2, 1)}
    for _ in range(2):
        try:
            with gathered(sharded):
                assert set(hooks(sharded)) == {(0, 0), (1, 0)}
                if fails:
                    raise Interrupted
        except Interrupted:
            assert fails
        assert hooks(sharded) == before
    common.read(common.token_logps, common.forced(sharded, processor, problems[:1], ["a"]), sharded).sum().backward()
    own.remove()
    assert called[0] is False  # FSDP's own hook comes first: it has gathered the layer's weights by then


def test_sampling_without_hooks_gives_the_answers_of_a_whole_model(sharded, loaded, processor, problems):
    whole, _ = loaded
    ours = draw(sharded, processor, problems)
    theirs = draw(whole, processor, problems)
    assert ours.texts == theirs.texts
    assert torch.allclose(ours.logp_BT, theirs.logp_BT, atol=1e-6)


# --- the mesh ---------------------------------------------------------------------------------------------------------


def test_layers_take_their_inputs_as_they_come(sharded):
    """Cast to bf16, the vision tower's rotary angles would lose what they know of places far away."""
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            assert not module._get_fsdp_state()._mp_policy.cast_forward_inputs


def test_one_node_has_a_mesh_in_one_dimension(sharded):
    weight = next(sharded.parameters())
    assert weight.device_mesh.ndim == 1


def test_nodes_with_unequal_shares_are_refused(monkeypatch):
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="6 processes cannot be nodes of 4"):
        sharding.mesh_of_processes(torch.device("cpu"))
