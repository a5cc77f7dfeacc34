"""RMSProp against TensorFlow's recorded steps and timm's port, also in one pass; the groups."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm.optim
import torch
from small_network import relative
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from irv2.network.accelerate import loops as native
from irv2.network.model import inception_resnet_v2
from irv2.training import update
from irv2.training.optim import RMSpropTF, parameter_groups
from irv2.training.state import TrainState, running_average

RECORDED = Path(__file__).parent / "data" / "tensorflow.json"
TRAJECTORIES = {t["name"]: t for t in json.loads(RECORDED.read_text(encoding="utf-8"))["rmsprop"]}
PAPER = {"lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9}


def tensors(values: list) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float32) for value in values]


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """|ours - theirs| / |theirs| over all tensors together."""
    return relative(
        *(torch.cat([t.detach().flatten().double() for t in ts]) for ts in (ours, theirs))
    )


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


def distance_moved(steps: list[list[Tensor]], recorded: dict) -> float:
    """Distance of all movements from the start to TensorFlow's: the start's size hides nothing."""
    start = tensors(recorded["initial"])
    theirs = [tensors(values) for values in recorded["values"]]
    return distance(
        *([p - s for step in run for p, s in zip(step, start)] for run in (steps, theirs))
    )


def test_recorded_trajectories_cover_the_papers_values_and_a_change_of_learning_rate():
    assert settings(TRAJECTORIES["slim"]) == PAPER
    assert len(set(TRAJECTORIES["lr_change"]["lr"])) == 2
    assert len(TRAJECTORIES) == 3


@pytest.mark.parametrize("recorded", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_every_step_equals_tensorflows(recorded):
    _, steps = replay(RMSpropTF, recorded)
    assert distance_moved(steps, recorded) < 1e-6
    for ours, expected in zip(steps, recorded["values"]):
        assert distance(ours, tensors(expected)) < 1e-6


@pytest.mark.parametrize("recorded", TRAJECTORIES.values(), ids=TRAJECTORIES)
def test_slots_equal_tensorflows(recorded):
    optimizer, _ = replay(RMSpropTF, recorded)
    for slot, theirs in (
        ("square_avg", "final_mean_square"),
        ("momentum_buffer", "final_momentum"),
    ):
        ours = [state[slot] for state in optimizer.state.values()]
        assert distance(ours, tensors(recorded[theirs])) < 1e-6


def test_the_comparison_would_notice_torchs_rmsprop():
    for name in ("slim", "lr_change"):
        _, steps = replay(torch.optim.RMSprop, TRAJECTORIES[name])
        assert distance_moved(steps, TRAJECTORIES[name]) > 0.1, name


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
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
def test_weight_decay_equals_timms_over_twenty_steps(eps, momentum):
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


def test_a_restored_optimizer_continues_bit_by_bit(tmp_path):
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


def test_a_hyper_parameter_out_of_range_is_refused_by_name():
    for name, value in (
        ("lr", -0.1),
        ("lr", float("nan")),
        ("alpha", -0.1),
        ("alpha", 1.0),
        ("eps", -1e-3),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
    ):
        with pytest.raises(ValueError, match=rf"{name}={value}"):
            RMSpropTF([nn.Parameter(torch.zeros(1))], **{**PAPER, name: value})


# ---------------------------------------------------------------------------------- groups


@pytest.fixture(scope="module", params=[True, False], ids=["bn_scale", "no_bn_scale"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    with torch.device("meta"):  # names and shapes of the whole network, no memory
        return inception_resnet_v2(aux_logits=True, bn_scale=request.param)


def test_every_trainable_parameter_of_the_network_is_in_exactly_one_group(network):
    grouped = [id(p) for group in parameter_groups(network, 4e-5) for p in group["params"]]
    trainable = [id(p) for p in network.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert sorted(grouped) == sorted(trainable)


def test_only_batch_norm_is_free_of_weight_decay(network):
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


def test_a_layer_without_a_rule_is_refused_by_name():
    for layer in (nn.PReLU(), nn.LayerNorm(4), nn.Conv1d(1, 1, 1)):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer))
        with pytest.raises(ValueError, match=rf"1\.0.*{type(layer).__name__}"):
            parameter_groups(model, 0.1)


# ---------------------------------------------------------------------------------- one pass

needs_loops = pytest.mark.skipif(
    native is None or not native.omp.available(), reason="no compiled loops here"
)


def layers() -> nn.Sequential:
    """Layers of sizes that do and do not fill vectors, one in channels-last memory, one frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Linear(64, 65), nn.Linear(3, 1)
    )
    model[0].to(memory_format=torch.channels_last)
    model[3].requires_grad_(False)
    return model


def distances(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    reference = theirs.state_dict()
    return {
        name: relative(value.double(), reference[name].double())
        for name, value in ours.state_dict().items()
        if value.is_floating_point()
    }


@pytest.mark.parametrize("clip_norm", [None, 2.0, 1e6])
@pytest.mark.parametrize("one_pass", [pytest.param(True, marks=needs_loops), False])
def test_five_steps_equal_timms(monkeypatch, clip_norm, one_pass):
    """Clipping, RMSProp and the running average in one pass, against timm's three."""
    if not one_pass:
        monkeypatch.setattr(update, "loops", None)
    ours, theirs = layers(), layers()
    state = TrainState(
        ours,
        running_average(ours, 0.999),
        RMSpropTF(parameter_groups(ours, 0.01), lr=0.045),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    groups = parameter_groups(theirs, 0.01)
    for group in groups:
        group.pop("lr_scale")
    peer = timm.optim.RMSpropTF(groups, **PAPER)
    average = ModelEmaV3(theirs, 0.999, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
    for step in range(5):
        for model in (ours, theirs):
            random_gradients([p for p in model.parameters() if p.requires_grad], step)
            model[1].running_mean += step
        norm = update.gradient_norm(ours.parameters())
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        update.apply(state, torch.tensor(True), norm, clip_norm, [], [])
        peer.step()
        average.update(theirs, step=step + 2)
        state.step += 1
    for found in (distances(ours, theirs), distances(state.ema.module, average.module)):
        assert max(found.values()) < 1e-6, found
    assert distances(ours, layers())["2.weight"] > 1e-3


def slots(*layouts: Tensor) -> list[native.Slots]:
    return [native.Slots(*layouts)]


@needs_loops
def test_pytorch_learns_of_the_changes():
    """Else a graph that was recorded before would compute with other numbers than it was given."""
    p, weight = torch.ones(5), torch.ones(5, requires_grad=True)
    loss = (weight * p).sum()
    native.rmsprop(slots(p, *torch.ones(4, 5)), native.Rates(1, 0, 0.9, 1, 0.9, 0.1, 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_loops
def test_the_norm_tells_of_one_number_that_is_not_finite():
    tensors = [torch.ones(5), torch.ones(10_000)]
    assert native.norm(tensors).item() == pytest.approx(10_005**0.5, rel=1e-7)
    for value in (float("nan"), float("inf")):
        tensors[1][7_777] = value
        assert not native.norm(tensors).isfinite()


@needs_loops
def test_what_does_not_lie_alike_in_memory_is_left_to_pytorchs_operations():
    plain = torch.zeros(4, 3, 2, 2)
    turned = plain.contiguous(memory_format=torch.channels_last)
    assert native.fits(slots(*[plain] * 5)) and native.fits(slots(*[turned] * 5))
    assert not native.fits(slots(plain, turned, plain, plain, plain))
    assert not native.fits(slots(*[plain.double()] * 5))
    assert not native.fits(slots(*[plain[:, :2]] * 5))
    assert native.fits(slots(plain[:, :, :1, :1].contiguous(), *[torch.zeros(4, 3, 1, 1)] * 4))
