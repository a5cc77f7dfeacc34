"""The network is an ordinary module: what works with timm's works with it.

Every test takes both, of the same weights, with one of each residual block, and expects the same
of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.ao.quantization as quantization
from small_network import randomised, relative
from timm.utils import freeze
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from irv2.network.model import inception_resnet_v2

CLASSES = 5
STACKS = ("repeat", "repeat_1", "repeat_2")


@pytest.fixture(scope="module")
def both() -> dict[str, nn.Module]:
    """timm's network with one of each repeated block, and ours with its weights."""
    theirs = timm.create_model("inception_resnet_v2", num_classes=CLASSES, drop_rate=0.0)
    for name in STACKS:
        setattr(theirs, name, getattr(theirs, name)[:1])
    randomised(theirs)
    ours = inception_resnet_v2(CLASSES, drop_rate=0.0, blocks=(1, 1, 1))
    ours.load_state_dict(theirs.state_dict())
    return {"ours": ours.eval(), "timm's": theirs}


@pytest.fixture(params=["ours", "timm's"])
def model(request, both) -> nn.Module:
    """Each of the two in turn, in evaluation, for a test to change."""
    return copy.deepcopy(both[request.param])


@pytest.fixture
def pair(both) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, for a test to change."""
    return tuple(copy.deepcopy(network) for network in both.values())


def images(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 75, 75, generator=generator, dtype=dtype)


def replaced(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> int:
    """Put another layer in the place of each batch norm; returns how many there were."""
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child))
                count += 1
    return count


def assert_trains(model: nn.Module) -> None:
    """Every parameter that wants one gets a gradient, and one of them is not 0."""
    model.train()(images()).square().sum().backward()
    wanting = [p for p in model.parameters() if p.requires_grad]
    assert wanting and all(p.grad is not None and p.grad.isfinite().all() for p in wanting)
    assert any(p.grad.any() for p in wanting)


# ---------------------------------------------------------------------------------------- hooks


def test_forward_hooks_of_every_module_are_called_in_training(model):
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(partial(note, called, name))
    model.train()(images())
    assert sorted(called) == sorted(name for name, _ in model.named_modules())


def test_backward_hooks_of_every_module_are_called(pair):
    """timm's in-place ReLUs allow none next to them; its convolutions' are called."""
    for model, observed in zip(pair, (nn.Module, nn.Conv2d)):
        named = {n: m for n, m in model.named_modules() if isinstance(m, observed)}
        called: list[str] = []
        for name, module in named.items():
            module.register_full_backward_hook(partial(note, called, name))
        model.train()(images().requires_grad_()).sum().backward()
        assert sorted(called) == sorted(named)


def note(called: list[str], name: str, *_given: object) -> None:
    """A hook that notes the name of its module."""
    called.append(name)


def test_a_hook_may_replace_an_inner_layers_output(model):
    before = model(images())
    model.repeat[0].branch1[0].register_forward_hook(
        lambda _m, _i, output: torch.zeros_like(output)
    )
    assert not torch.allclose(model(images()), before, rtol=1e-3)


# ------------------------------------------------------------------- functions of the parameters


def test_functional_call_uses_the_weights_it_is_given(model):
    given = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    called = functional_call(model, given, images())
    assert not torch.allclose(called, model(images()), rtol=1e-3)
    model.load_state_dict(model.state_dict() | given)
    torch.testing.assert_close(called, model(images()))


@pytest.mark.slow
def test_second_derivatives_are_timms(pair):
    """A Hessian's product with the gradient, of a training pass in float64."""
    found = []
    for model in pair:
        parameters = list(model.double().train().parameters())
        loss = model(images(dtype=torch.float64)).square().sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        length = sum(g.square().sum() for g in gradients)
        found.append(torch.autograd.grad(length, parameters, allow_unused=True))
    assert all((a is None) == (b is None) for a, b in zip(*found))
    ours, theirs = (torch.cat([g.flatten() for g in each if g is not None]) for each in found)
    assert theirs.norm() > 0 and relative(ours, theirs) < 1e-9


def test_forward_mode_derivatives_are_timms(pair):
    found = []
    for model in pair:
        weights = {n: p.detach().double() for n, p in model.double().named_parameters()}
        changes = {name: torch.ones_like(value) for name, value in weights.items()}

        def outputs(weights: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return functional_call(model, weights, images(dtype=torch.float64))

        found.append(torch.func.jvp(outputs, (weights,), (changes,))[1])
    assert found[1].norm() > 0 and relative(*found) < 1e-9


# ------------------------------------------------------------------------------ graphs and scripts


@torch.no_grad()
def test_a_symbolic_trace_computes_the_same(model):
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images()), model(images()))


def test_a_trace_still_refuses_small_images(both):
    traced = torch.fx.symbolic_trace(both["ours"])
    with pytest.raises(ValueError, match="at least 75 px"):
        traced(torch.zeros(1, 3, 74, 75))


@torch.no_grad()
def test_a_feature_extractor_returns_inner_outputs(model):
    seen = {}
    names = ("repeat.0.branch1.0.conv", "conv2d_7b")
    extracted = create_feature_extractor(model, list(names))(images())
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.clone()})
        )
    model(images())
    assert extracted.keys() == seen.keys()
    assert all(torch.equal(extracted[name], seen[name]) for name in names)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_a_script_computes_the_same(model, training):
    model.train(training)
    scripted = torch.jit.script(copy.deepcopy(model))
    assert torch.equal(scripted(images()), model(images()))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_its_auxiliary_head_and_checkpointing_it_can_be_scripted_too():
    model = inception_resnet_v2(
        CLASSES, drop_rate=0.0, aux_logits=True, grad_checkpointing=True, blocks=(1, 1, 1)
    )
    scripted = torch.jit.script(copy.deepcopy(model.train()))
    x = torch.randn(2, 3, 299, 299)
    for ours, expected in zip(scripted(x), model(x)):
        assert torch.equal(ours, expected)


# ----------------------------------------------------------------------------- layers exchanged


def test_batch_norm_can_be_synchronised(model):
    expected, names = model(images()), list(model.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    is_timms = isinstance(model.conv2d_1a.bn, timm.layers.BatchNormAct2d)  # with its ReLU in it
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    changed = timm.layers.convert_sync_batchnorm(model) if is_timms else convert(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in changed.modules()) == norms > 40
    assert list(changed.state_dict()) == names
    torch.testing.assert_close(changed(images()), expected)


def test_timm_freezes_parts_of_it(model):
    parts = ["conv2d_1a", "repeat", "mixed_6a"]
    freeze(model, parts)
    assert not any(p.requires_grad for part in parts for p in getattr(model, part).parameters())
    before = copy.deepcopy(model.repeat.state_dict())
    assert_trains(model)
    assert all(torch.equal(v, before[name]) for name, v in model.repeat.state_dict().items())


def test_batch_norm_can_become_group_norm(model):
    expected = model(images())
    assert replaced(model, lambda norm: nn.GroupNorm(1, norm.num_features)) > 40
    assert not torch.allclose(model(images()), expected)
    assert_trains(model)


def test_batch_norm_can_become_torchvisions_frozen_one(both):
    """timm's batch norm has its ReLU in it, and would lose that."""
    model = copy.deepcopy(both["ours"])
    expected = model(images())

    def frozen(norm: nn.BatchNorm2d) -> nn.Module:
        made = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
        made.load_state_dict(norm.state_dict())
        return made

    assert replaced(model, frozen) > 40
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    assert_trains(model)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.slow
def test_weights_can_be_pruned(model):
    names = list(model.state_dict())
    for conv in convolutions(model):
        prune.l1_unstructured(conv, "weight", amount=0.5)
    assert_trains(model)
    for conv in convolutions(model):
        prune.remove(conv, "weight")
    assert sorted(model.state_dict()) == sorted(names)
    for conv in convolutions(model):
        assert (conv.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_convolutions_can_be_spectrally_normalised(model):
    for conv in convolutions(model):
        spectral_norm(conv, n_power_iterations=20)
    assert_trains(model)
    weight = model.repeat[0].branch0.conv.weight.detach()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_it_trains_quantised(model):
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(model.train())
    assert hasattr(prepared.repeat[0].branch0.conv, "weight_fake_quant")
    assert_trains(prepared)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_its_quantised_graph_answers_about_the_same(model):
    with torch.no_grad():
        expected = model(images())
        mapping = quantization.get_default_qconfig_mapping("x86")
        prepared = prepare_fx(copy.deepcopy(model), mapping, (images(),))
        for seed in range(3):  # for the ranges of activations
            prepared(images(seed))
        assert relative(convert_fx(prepared)(images()), expected) < 0.4  # 8 bits, random weights


# ------------------------------------------------------------------------------------------ files


def test_the_distributed_checkpoint_has_its_state_dict(model):
    state = get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    halved = {n: v / 2 if v.is_floating_point() else v for n, v in state.items()}
    set_model_state_dict(model, halved)
    assert torch.equal(model.classif.weight, halved["classif.weight"])


def test_safetensors_write_and_read_it(model, tmp_path: Path):
    other = copy.deepcopy(model)
    nn.init.zeros_(other.repeat[0].branch0.conv.weight)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    read = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(images()), model(images()))


# -------------------------------------------------------------------------------- timm's methods


@torch.no_grad()
def test_features_and_head_are_timms(pair):
    ours, theirs = pair
    features = ours.forward_features(images())
    assert relative(features, theirs.forward_features(images())) < 1e-5
    for pre_logits in (False, True):
        found = ours.forward_head(features, pre_logits=pre_logits)
        assert relative(found, theirs.forward_head(features, pre_logits=pre_logits)) < 1e-5
    assert torch.equal(ours.forward_head(features), ours(images()))


@torch.no_grad()
def test_without_classes_it_gives_timms_embedding(pair):
    embeddings = []
    for model in pair:
        logits = model(images())
        model.reset_classifier(0)
        embeddings.append(model(images()))
        assert not torch.equal(embeddings[-1], logits)
        assert isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0
        assert embeddings[-1].shape == (2, model.num_features) == (2, 1536)
    assert relative(*embeddings) < 1e-5
    built = inception_resnet_v2(0, blocks=(1, 1, 1)).eval()
    built.load_state_dict(pair[1].state_dict())
    assert torch.equal(built(images()), embeddings[0])


def test_a_new_classifier_is_for_as_many_classes_where_the_old_one_was(model):
    model.double().reset_classifier(7)
    classifier = model.get_classifier()
    assert classifier is model.classif and model.num_classes == classifier.out_features == 7
    assert not classifier.training
    assert model(images(dtype=torch.float64)).shape == (2, 7)


def test_a_new_classifier_is_the_auxiliary_heads_too():
    with torch.device("meta"):
        model = inception_resnet_v2(CLASSES, aux_logits=True, blocks=(1, 1, 1)).train()
        model.reset_classifier(7)
        logits, aux_logits = model(torch.empty(2, 3, 299, 299))
        assert logits.shape == aux_logits.shape == (2, 7)
        model.reset_classifier(0)
        embeddings = model(torch.empty(2, 3, 299, 299))
        assert [e.shape for e in embeddings] == [(2, 1536), (2, 768)]
