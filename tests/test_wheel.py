"""`pip install .`: what a wheel holds, and that the network works from it alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fork_server import environment
from programs import ROOT, run_elsewhere

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
USE = """
import sys; sys.path.insert(0, sys.argv[1])
import timm
from irv2.network import inception_resnet_v2
from irv2.network.accelerate import accelerate, plain
import irv2.timm

options = {"num_classes": 5, "blocks": (1, 1, 1), "width": 0.25}
ours = timm.create_model("irv2_inception_resnet_v2", **options, aux_logits=True)
other = inception_resnet_v2(**options, aux_logits=True)
other.load_state_dict(plain(accelerate(ours)).state_dict())
assert sys.argv[1] in irv2.timm.__file__ and ours.aux.classif.out_features == 5
assert ours.pretrained_cfg["crop_pct"] == 0.8975
assert not {"data", "scripts", "tests"} & set(sys.modules)
print(timm.list_models("irv2_*", pretrained=True))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without a network from what a build looks at, and beside it the rest."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("irv2", "data", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, env=environment(), check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_a_wheel_holds_the_network_and_no_name_but_ours(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"irv2/__init__.py", "irv2/network/__init__.py", "irv2/timm.py"} < names
    assert {name.partition("/")[0] for name in names} == {"irv2"}
    assert "irv2/cli.py" not in names  # nothing that would want `data`


def test_the_network_of_a_wheel_works_alone_and_timm_finds_it(wheel, tmp_path):
    result = run_elsewhere(tmp_path, "-c", USE, str(wheel))
    assert result.returncode == 0, result.stderr
    tags = ("tf_ens_adv_in1k", "tf_in1k")
    assert result.stdout.strip() == str([f"irv2_inception_resnet_v2.{tag}" for tag in tags])


def test_constraints_pin_every_requirement():
    text = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w.-]+)==", text, re.M))
    for path in ROOT.glob("requirements*.txt"):
        names = set(re.findall(r"^([\w.]+[\w.-]*)", path.read_text(), re.M))
        assert names <= pinned, path.name
