"""accelerate(): the same network in another form, and back; what it leaves alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from programs import run_elsewhere
from small_network import copied, randomised, relative
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from irv2.network.accelerate import accelerate, fold_batch_norm, plain
from irv2.network.blocks import BLOCK17, BLOCK35, Block, ConvNormAct, NormOptions
from irv2.network.merged import MergedBlock
from irv2.network.model import InceptionResnetV2, inception_resnet_v2

ROOT = Path(__file__).parents[1]
NORM = NormOptions(momentum=0.1, eps=1e-3, scale=True)


def small(**options) -> InceptionResnetV2:
    torch.manual_seed(0)
    return randomised(
        inception_resnet_v2(5, blocks=(1, 1, 1), width=0.25, drop_rate=0.0, **options)
    )


def images(*shape: int) -> Tensor:
    x = torch.randn(shape or (2, 3, 75, 75), generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """True for the same names in the same order, and values that are equal to the bit."""
    return list(ours) == list(theirs) and all(torch.equal(v, theirs[n]) for n, v in ours.items())


# ------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("aux_logits", [False, True])
def test_weights_stay_equal_to_the_bit_there_and_back(aux_logits):
    model = small(aux_logits=aux_logits, bn_scale=False)
    before = copied(model.state_dict())
    structure = [(name, type(m)) for name, m in model.named_modules()]
    trained = [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert accelerate(model) is model
    assert equal(model.state_dict(), before)
    assert all(isinstance(block, MergedBlock) for block in model.residual_blocks())
    assert plain(model) is model
    assert equal(model.state_dict(), before)
    assert [(name, type(m)) for name, m in model.named_modules()] == structure
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == trained
    assert not any(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))


@torch.no_grad()
def test_outputs_there_and_back_are_equal_to_the_bit():
    model, x = small().eval(), images()
    before = model(x)
    assert relative(accelerate(model)(x), before) < 1e-5
    assert torch.equal(plain(model)(x), before)


def test_what_was_trained_in_one_form_goes_on_in_the_other():
    """Statistics and counters as well as weights."""
    model = accelerate(small()).train()
    model(images())
    trained = copied(model.state_dict())
    assert equal(plain(model).state_dict(), trained)
    assert model.repeat[0].branch1[0].bn.num_batches_tracked == 1
    other = accelerate(small())
    other.load_state_dict(trained)
    assert equal(other.state_dict(), trained)


def test_a_second_time_changes_nothing():
    model = accelerate(small())
    before = dict(model.named_parameters())
    after = dict(accelerate(model).named_parameters())
    assert list(after) == list(before) and all(after[n] is p for n, p in before.items())
    twice = plain(plain(model))
    assert list(twice.state_dict()) == list(small().state_dict())


def test_state_dicts_say_the_versions_of_the_plain_networks_layers():
    """Without them batch norm takes a file for one from before it had counters."""
    model = small()
    before = dict(model.state_dict()._metadata)
    after = dict(accelerate(model).state_dict()._metadata)
    assert {name: after.get(name) for name in before} == before


def test_memory_layout_frozen_parts_and_checkpointing_come_along():
    model = small(grad_checkpointing=True).to(memory_format=torch.channels_last)
    model.repeat.requires_grad_(False)
    accelerate(model)
    assert not any(p.requires_grad for p in model.repeat.parameters())
    assert all(p.requires_grad for p in model.repeat_1.parameters())
    assert model.repeat.grad_checkpointing
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_copies_and_averages_have_the_same_form():
    model = accelerate(small()).train()
    average = ModelEmaV3(model, 0.5)
    assert [type(m) for m in average.module.modules()] == [type(m) for m in model.modules()]
    before = average.module.repeat[0].heads.conv.weight.clone()
    with torch.no_grad():
        model.repeat[0].heads.conv.weight.add_(1)
    average.update(model)
    assert torch.allclose(average.module.repeat[0].heads.conv.weight, before + 0.5)


@torch.no_grad()
def test_folding_comes_before_or_after_it():
    model, x = small().eval(), images()
    expected = model(x)
    folded_first = accelerate(fold_batch_norm(model))
    folded_last = fold_batch_norm(accelerate(copy.deepcopy(model)))
    assert torch.equal(folded_first(x), folded_last(x))
    assert relative(folded_last(x), expected) < 1e-5
    assert equal(folded_first.state_dict(), folded_last.state_dict())
    assert equal(plain(folded_last).state_dict(), fold_batch_norm(model).state_dict())
    assert relative(folded_last(x), expected) < 1e-5


# --------------------------------------------------------------------------- what it leaves alone


def group_norm(block: Block) -> None:
    for module in block.modules():
        if isinstance(module, ConvNormAct):
            module.bn = nn.GroupNorm(4, module.bn.num_features)


def one_group_norm(block: Block) -> None:
    block.branch0.bn = nn.GroupNorm(4, block.branch0.bn.num_features)


def pruned(block: Block) -> None:
    prune.l1_unstructured(block.branch0.conv, "weight", amount=0.9)


def normalised(block: Block) -> None:
    spectral_norm(block.branch0.conv)


def hooked(block: Block) -> None:
    block.branch0.conv.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def hooked_branch(block: Block) -> None:
    block.branch1.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def half_frozen(block: Block) -> None:
    block.branch0.requires_grad_(False)


def other_momentum(block: Block) -> None:
    block.branch0.bn.momentum = 0.5


CHANGES = [
    group_norm,
    one_group_norm,
    pruned,
    normalised,
    hooked,
    hooked_branch,
    half_frozen,
    other_momentum,
]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_heads_that_differ_are_not_merged(change):
    block = randomised(Block(BLOCK35, NORM))
    change(block)
    expected, names = block(images(2, 320, 5, 5)), list(block.state_dict())
    accelerate(block)
    assert not isinstance(block, MergedBlock)
    assert list(block.state_dict()) == names
    torch.testing.assert_close(block(images(2, 320, 5, 5)), expected)


@pytest.mark.parametrize("spec", [BLOCK35, BLOCK17], ids=["35", "17"])
def test_other_norms_behind_merged_heads_are_used(spec):
    """Norms that fused operations do not know, exchanged before or after."""
    x, outputs = images(2, spec.in_channels, 5, 5), []
    for order in (0, 1):
        block = randomised(Block(spec, NORM)).train()
        if order == 1:
            accelerate(block)
        last = block.branch1[-1]
        last.bn = nn.GroupNorm(4, last.bn.num_features)
        outputs.append(accelerate(block)(x))
        assert isinstance(block, MergedBlock)
        outputs[-1].sum().backward()
    reference = plain(block)(x)
    for output in outputs:
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)


def test_hooks_inside_are_called_in_training_and_when_folded():
    """Every module: what is observed runs as plain operations."""
    model = accelerate(small()).train()
    folded = fold_batch_norm(model)
    for network, grad in ((model, True), (folded, False)):
        called: set[str] = set()
        for name, module in network.named_modules():
            module.register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        with torch.set_grad_enabled(grad):
            network(images())
        # Empty branches stand for parts of `heads`.
        assert called == {name for name, _ in network.named_modules()}


# ------------------------------------------------------------------- without the folder for CPUs

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "datasets", "__pycache__")
PROBE = "from irv2.network import accelerate as a; assert not a.FUSED and a.loops is None"
TESTED = [
    "test_accelerate.py",
    "test_optim.py",
    "test_model.py::test_gradient_checkpointing_changes_nothing",
    "test_step.py::test_a_bad_step_changes_no_weight_statistic_average_or_slot",
]


@pytest.mark.slow
def test_without_the_folder_for_cpus_networks_and_optimizer_do_the_same(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=LEFT_OUT)
    shutil.rmtree(checkout / "irv2" / "network" / "cpu")
    assert run_elsewhere(checkout, "-c", PROBE).returncode == 0
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tmp'}"]
    chosen = ["-m", "not slow and not soak", *(f"tests/{name}" for name in TESTED)]
    result = run_elsewhere(checkout, "-m", "pytest", *options, *chosen)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
