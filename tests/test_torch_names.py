"""PyTorch's private and internal names that the program uses: each is in the oldest version, or has
a tested other way.

They may go with any release. `bash scripts/test.sh --torch VERSION` runs this module there, too.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("irv2", "data", "scripts")]
FILES = [ROOT / "train.py", ROOT / "validate.py"]
FILES += sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
LIBRARIES = ("torch", "torchvision", "timm")

OLDEST = "in 2.10"
NAMES = {
    # Beginning with the library, or with a dot for an attribute of something of it.
    **dict.fromkeys(
        (
            "torch._C._functorch.peek_interpreter_stack",
            "torch._C._len_torch_dispatch_stack",
            "torch._dynamo.config.recompile_limit",
            "torch._dynamo.lookup_backend",
            "torch._functorch.config",
            "torch._functorch.config.patch",
            "torch._foreach_add",
            "torch._foreach_add_",
            "torch._foreach_addcdiv_",
            "torch._foreach_addcmul_",
            "torch._foreach_copy_",
            "torch._foreach_mul_",
            "torch._foreach_sqrt_",
            "torch._foreach_sub",
            "torch._foreach_sub_",
            "torch.nn.modules.batchnorm._BatchNorm",
            "torch.nn.modules.module._has_any_global_hook",
            "torch.ops.mkldnn._convolution_pointwise",
            "torch.ops.mkldnn._convolution_pointwise_.binary",
            "torch.ops.mkldnn._is_mkldnn_bf16_supported",
            "torch.ops.mkldnn._reorder_convolution_weight",
            "._version",  # of a tensor
            "._backward_hooks",  # and what follows, of a module
            "._backward_pre_hooks",
            "._compiled_call_impl",
            "._forward_hooks",
            "._forward_pre_hooks",
            "._load_from_state_dict",
            "._modules",
            "._parameters",
            "._metadata",  # of a state dict
        ),
        OLDEST,
    ),
    # 2.12 and newer alone can do it for maps of one position: guarded by the map's size.
    "torch.ops.mkldnn._convolution_pointwise.binary": (
        "test_a_map_of_one_position_is_added_to_whatever_the_version"
    ),
}
OTHERS = {  # private names that are not PyTorch's
    *("_asdict", "_fields", "_replace"),  # of named tuples, whose documentation has them
    "_exit",  # os._exit, likewise
    *("_call_s3", "_info"),  # of s3fs, and of all of fsspec's asynchronous file systems
}


def aliases(tree: ast.Module) -> dict[str, str]:
    """Names that a file gives to modules and what is in them, and to parts of these."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for name, value in assigned(node):
                if full := dotted(value, known):
                    known[name] = full
    return known


def assigned(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    """Names and what they are assigned, of `a = x` and of `a, b = x, y`."""
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = zip(target.elts, node.value.elts)
            yield from ((to.id, value) for to, value in pairs if isinstance(to, ast.Name))


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """Full name of an attribute of one of the libraries; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not (parts and isinstance(node, ast.Name)):
        return ""
    full = ".".join([known.get(node.id, ""), *reversed(parts)])
    return full if full.split(".")[0] in LIBRARIES else ""


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def used(text: str) -> set[str]:
    """Private names of PyTorch in a Python file, and those of which nobody knows whose they are."""
    tree = ast.parse(text)
    known, found = aliases(tree), set()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] in LIBRARIES}
        elif isinstance(node, ast.Attribute) and (full := dotted(node, known)):
            found |= {full} if id(node) not in inner else set()
        elif isinstance(node, ast.Attribute) and not is_ours(node):
            found.add(f".{node.attr}")
        elif isinstance(node, ast.ClassDef):  # which may override some
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            found |= {f".{name}" for name in methods if hasattr(nn.Module, name)}
        elif isinstance(node, ast.Constant) and is_attribute_of_modules(node.value):
            found.add(f".{node.value}")
    return {name for name in found if is_private(name) and name[1:] not in OTHERS}


def is_ours(node: ast.Attribute) -> bool:
    """True for an attribute of self or cls that no module of PyTorch has."""
    is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    return is_self and not hasattr(nn.Module(), node.attr)


def is_attribute_of_modules(value: object) -> bool:
    """True for a text that names a private attribute, as for getattr or vars."""
    return isinstance(value, str) and value.isidentifier() and hasattr(nn.Module(), value)


def defined(text: str) -> set[str]:
    """Names that a file gives to functions, and to attributes of its own objects."""
    nodes = list(ast.walk(ast.parse(text)))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return {name for name in functions | own if not hasattr(nn.Module(), name)}


def test_names_are_found_in_every_form():
    text = """
import torch
import torch.distributed as dist
from torch import nn
from torch._inductor import config
from torch.nn.modules.batchnorm import _BatchNorm
ops = torch.ops.mkldnn
a, b = 1, torch._C
torch._foreach_new(x)
dist._thing.other
ops._conv.binary
b._jit
weight._version
getattr(module, "_forward_hooks")
_names = self._ours
class Layer(nn.Module):
    def _load_from_state_dict(self): self._modules
"""
    assert used(text) == {
        "torch._inductor.config",
        "torch.nn.modules.batchnorm._BatchNorm",
        "torch._C",
        "torch._foreach_new",
        "torch.distributed._thing.other",
        "torch.ops.mkldnn._conv.binary",
        "torch._C._jit",
        "._version",
        "._forward_hooks",
        "._load_from_state_dict",
        "._modules",
    }


@pytest.mark.slow
def test_every_private_name_in_use_is_in_the_table_and_the_other_way_round():
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    ours = {f".{name}" for text in texts for name in defined(text)}
    found = set().union(*map(used, texts))
    assert found - ours - NAMES.keys() == set(), "say in the table since when, or what guards them"
    assert NAMES.keys() - found == set(), "no longer used"


def owner_of(name: str) -> Any:
    """Objects that an attribute without a library belongs to."""
    layer = nn.Linear(1, 1)
    owners = (torch.zeros(1), layer, layer.state_dict())
    return next((owner for owner in owners if hasattr(owner, name)), None)


@pytest.mark.parametrize("name", [name for name, since in NAMES.items() if since == OLDEST])
def test_every_name_is_there_in_this_version(name):
    if name.startswith("."):
        assert owner_of(name[1:]) is not None
        return
    importlib.import_module("torch._dynamo.config")
    thing: Any = torch
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)  # raises AttributeError


@pytest.mark.parametrize("test", [since for since in NAMES.values() if since != OLDEST])
def test_every_guarded_name_has_a_test_of_the_other_way(test):
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")]
    assert sum(f"\ndef {test}(" in text for text in texts) == 1
