"""The optimizer against TensorFlow's recorded steps and timm's port; the parameter groups."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from irv2.model import inception_resnet_v2
from irv2.optim import RMSpropTF, parameter_groups

RECORDED = Path(__file__).parent / "data" / "tensorflow.json"
TRAJECTORIES = {t["name"]: t for t in json.loads(RECORDED.read_text(encoding="utf-8"))["rmsprop"]}
PAPER = {"lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9}


def tensors(values: list) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """|ours - theirs| / |theirs| over all tensors together."""
    ours, theirs = (torch.cat([t.detach().flatten().double() for t in ts]) for ts in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def settings(recorded: dict) -> dict:
    return {
        "lr": recorded["lr"][0],
        "alpha": recorded["decay"],
        "eps": recorded["epsilon"],
        "momentum": recorded["momentum"],
    }


def replay(kind: type, recorded: dict) -> tuple[torch.optim.Optimizer, list[list[Tensor]]]:
    """Run an optimizer on the recorded gradients; returns it and the parameters of each step."""
    params = [nn.Parameter(value) for value in tensors(recorded["initial"])]
    optimizer = kind(params, **settings(recorded))
    steps = []
    for lr, gradients in zip(recorded["lr"], recorded["gradients"]):
        optimizer.param_groups[0]["lr"] = lr
        for p, gradient in zip(params, tensors(gradients)):
            p.grad = gradient
        optimizer.step()
        steps.append([p.detach().clone() for p in params])
    return optimizer, steps


def movements(steps: list[list[Tensor]], recorded: dict) -> list[Tensor]:
    """How far every parameter is from its start, so that the start's size hides nothing."""
    return [p - start for step in steps for p, start in zip(step, tensors(recorded["initial"]))]


def test_recorded_trajectories_cover_the_papers_values_and_a_change_of_learning_rate():
    assert settings(TRAJECTORIES["slim"]) == PAPER
    assert len(set(TRAJECTORIES["lr_change"]["lr"])) == 2
    assert len(TRAJECTORIES) == 3


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_step_equals_tensorflows(name: str):
    recorded = TRAJECTORIES[name]
    _, steps = replay(RMSpropTF, recorded)
    theirs = [tensors(values) for values in recorded["values"]]
    assert distance(movements(steps, recorded), movements(theirs, recorded)) < 1e-6
    for ours, expected in zip(steps, theirs):
        assert distance(ours, expected) < 1e-6


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_slots_equal_tensorflows(name: str):
    recorded = TRAJECTORIES[name]
    optimizer, _ = replay(RMSpropTF, recorded)
    states = list(optimizer.state.values())
    mean_squares = [state["square_avg"] for state in states]
    momenta = [state["momentum_buffer"] for state in states]
    assert distance(mean_squares, tensors(recorded["final_mean_square"])) < 1e-6
    assert distance(momenta, tensors(recorded["final_momentum"])) < 1e-6


@pytest.mark.parametrize("name", ["slim", "lr_change"])
def test_the_comparison_would_notice_torchs_rmsprop(name: str):
    recorded = TRAJECTORIES[name]
    _, steps = replay(torch.optim.RMSprop, recorded)
    theirs = [tensors(values) for values in recorded["values"]]
    assert distance(movements(steps, recorded), movements(theirs, recorded)) > 0.1


def two_groups() -> tuple[list[nn.Parameter], list[dict]]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4, 3, 3), (6,), (9, 6), (5,))]
    groups = [
        {"params": params[:2], "weight_decay": 0.05},
        {"params": params[2:], "weight_decay": 0.0},
    ]
    return params, groups


def random_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
def test_weight_decay_equals_timms_over_twenty_steps(eps: float, momentum: float):
    hyper = {"lr": 0.03, "alpha": 0.9, "eps": eps, "momentum": momentum}
    (ours, our_groups), (theirs, their_groups) = two_groups(), two_groups()
    start = copy.deepcopy(ours)
    optimizers = RMSpropTF(our_groups, **hyper), timm.optim.RMSpropTF(their_groups, **hyper)
    for step in range(20):
        for params, optimizer in zip((ours, theirs), optimizers):
            random_gradients(params, step)
            optimizer.step()
    moved = [[p - s for p, s in zip(params, start)] for params in (ours, theirs)]
    assert distance(*moved) < 1e-6


def test_weight_decay_is_seen_by_the_comparison_and_kept_out_of_the_other_group():
    (decayed, groups), (plain, plain_groups) = two_groups(), two_groups()
    plain_groups[0]["weight_decay"] = 0.0
    optimizers = RMSpropTF(groups, **PAPER), RMSpropTF(plain_groups, **PAPER)
    for params, optimizer in zip((decayed, plain), optimizers):
        random_gradients(params, 0)
        optimizer.step()
    assert distance(decayed[:2], plain[:2]) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(decayed[2:], plain[2:]))


def test_gradients_are_left_as_they_were():
    params, groups = two_groups()
    random_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    RMSpropTF(groups, **PAPER).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before))


def test_a_parameter_without_gradient_stays_and_gets_no_slots():
    params, groups = two_groups()
    before = params[0].detach().clone()
    optimizer = RMSpropTF(groups, **PAPER)
    random_gradients(params[1:], 0)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


def test_the_closure_is_run_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = RMSpropTF([p], **PAPER)

    def closure() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    # One step by hand: ms = 1 + (16 - 1) * 0.1, mom = lr * 4 / sqrt(ms + 1)
    assert p.item() == pytest.approx(2.0 - 0.045 * 4 / (2.5 + 1) ** 0.5, rel=1e-6)


def test_a_restored_optimizer_continues_bit_by_bit(tmp_path: Path):
    (params, groups), (copied, copied_groups) = two_groups(), two_groups()
    optimizer = RMSpropTF(groups, **PAPER)
    for step in range(5):
        random_gradients(params, step)
        optimizer.step()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(copied, saved["params"]):
            p.copy_(value)
    restored = RMSpropTF(copied_groups, lr=1.0, alpha=0.1, eps=0.1, momentum=0.1)
    restored.load_state_dict(saved["optimizer"])
    for step in range(5, 10):
        for ps, opt in ((params, optimizer), (copied, restored)):
            random_gradients(ps, step)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copied))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("alpha", -0.1),
        ("alpha", 1.0),
        ("eps", -1e-3),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused_by_name(name: str, value: float):
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        RMSpropTF([nn.Parameter(torch.zeros(1))], **{**PAPER, name: value})


# ---------------------------------------------------------------------------------- groups


@pytest.fixture(scope="module", params=[True, False], ids=["bn_scale", "no_bn_scale"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    with torch.device("meta"):  # names and shapes of the whole network, no memory
        return inception_resnet_v2(aux_logits=True, bn_scale=request.param)


def test_every_trainable_parameter_of_the_network_is_in_exactly_one_group(
    network: nn.Module,
):
    grouped = [id(p) for group in parameter_groups(network, 4e-5) for p in group["params"]]
    trainable = [id(p) for p in network.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert sorted(grouped) == sorted(trainable)


def test_only_batch_norm_is_free_of_weight_decay(network: nn.Module):
    decayed, free = parameter_groups(network, 4e-5)
    assert (decayed["weight_decay"], free["weight_decay"]) == (4e-5, 0.0)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {
        name
        for name, p in network.named_parameters()
        if name.split(".")[-2] == "bn" and p.requires_grad
    }
    # TF-slim regularises biases of convolutions and linear layers as well as weights.
    kinds = {names[id(p)].rsplit(".", 1)[1] for p in decayed["params"]}
    assert kinds == {"weight", "bias"}
    assert any(names[id(p)] == "classif.bias" for p in decayed["params"])
    assert any(names[id(p)] == "repeat.0.conv2d.bias" for p in decayed["params"])


def test_a_frozen_parameter_is_in_no_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    decayed, free = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].bias)]
    assert [id(p) for p in free["params"]] == [id(model[1].bias)]


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.LayerNorm(4), nn.Conv1d(1, 1, 1)])
def test_a_layer_without_a_rule_is_refused_by_name(layer: nn.Module):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer))
    with pytest.raises(ValueError, match=rf"1\.0.*{type(layer).__name__}"):
        parameter_groups(model, 0.1)
