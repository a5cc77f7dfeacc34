"""Who may import whom, and that importing has no effects."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"irv2", "data"}
REPORT = sorted((ROOT / "report").glob("*.py"))
STORIES = [ROOT / "train.py", ROOT / "validate.py"]
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Modules that stand alone: plain arguments in, nothing of the project imported.
LEAVES = ["optim", "schedule", "metrics", "statistics", "checkpoint", "distributed", "strict_yaml"]

# Imports everything, then tells what has changed in the process.
PROBE = """
import json, logging, os, signal, sys
import torch
logging_before = list(logging.getLogger().handlers)
handlers = lambda: [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
signals = handlers()
state = torch.get_rng_state()
files = sorted(os.listdir("."))
settings = lambda: [
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_num_threads(),
    torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
]
before = settings()
sys.argv = ["probe", "--no-such-argument"]
import importlib
for name in json.loads(sys.stdin.read()):
    importlib.import_module(name)
effects = {
    "CUDA initialised": torch.cuda.is_initialized(),
    "process group started": torch.distributed.is_initialized(),
    "logging configured": list(logging.getLogger().handlers) != logging_before,
    "signal handlers set": signals != handlers(),
    "random state moved": not torch.equal(state, torch.get_rng_state()),
    "torch settings changed": before != settings(),
    "files written": files != sorted(os.listdir(".")),
    "arguments changed": sys.argv != ["probe", "--no-such-argument"],
}
print(json.dumps([effect for effect, happened in effects.items() if happened]))
"""


def dotted(path: Path) -> str:
    """irv2/optim.py -> irv2.optim."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file; relative ones made absolute."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    """The packages and programs a file imports from."""
    return {name.split(".")[0] for name in imports(path)}


def packages_of(path: Path) -> set[str]:
    """Which of irv2 and data a file imports."""
    return roots(path) & PACKAGES


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "irv2").mkdir()
    path = tmp_path / "irv2" / "example.py"
    path.write_text(
        "import data.stream as s\n"
        "def later():\n    from irv2 import model\n"
        "from . import optim\nfrom .engine import Loss\n",
        encoding="utf-8",
    )
    assert packages_of(path) == {"irv2", "data"}
    assert {"data.stream", "irv2.model", "irv2.optim", "irv2.engine"} <= imports(path)


def test_both_packages_are_looked_at():
    assert {"irv2.model", "irv2.engine", "data.stream", "data.loader"} <= set(map(dotted, MODULES))


def test_neither_package_imports_the_other():
    others = {
        dotted(path): packages_of(path) - {path.relative_to(ROOT).parts[0]} for path in MODULES
    }
    assert {name: packages for name, packages in others.items() if packages} == {}


def test_report_knows_of_the_rest_only_how_to_count():
    strangers = {
        (dotted(path), name)
        for path in REPORT
        for name in imports(path)
        if name.split(".")[0] in PACKAGES | {"torch"}
        and name.split(".")[:2] != ["irv2", "statistics"]
    }
    assert strangers == set()


def test_a_leaf_imports_nothing_of_the_project():
    assert [name for name in LEAVES if packages_of(ROOT / "irv2" / f"{name}.py")] == []


def test_no_module_imports_a_program():
    programs = {"train", "validate", "feed", "exam", "recipe", "scripts", "tests"}
    modules = [*MODULES, *REPORT]
    assert [dotted(path) for path in modules if roots(path) & programs] == []


def test_a_script_finds_the_project_before_it_imports_it():
    """Python puts a script's own folder into its path, not the repository."""
    ours = {*PACKAGES, "report", "scripts", "feed", "exam", "recipe"}
    for path in (ROOT / "scripts").glob("*.py"):
        body = ast.parse(path.read_text()).body
        starts = any(ast.unparse(part).startswith("if __name__ ==") for part in body)
        modules = [(part.lineno, part.module) for part in body if isinstance(part, ast.ImportFrom)]
        first = min((line for line, name in modules if name.split(".")[0] in ours), default=None)
        if starts and first is not None:
            before = [ast.unparse(part) for part in body if part.lineno < first]
            assert any(text.startswith("sys.path.insert(0, ") for text in before), path.name


def test_only_the_programs_import_both_packages():
    folders = [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and path.name not in {"tests", "datasets", "runs"}
    ]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    both = {path.relative_to(ROOT) for path in files if packages_of(path) == PACKAGES}
    programs = {"train.py", "validate.py", "feed.py", "exam.py", "recipe.py", "scripts"}
    assert both == {path for path in both if path.parts[0] in programs}
    assert Path("train.py") in both


def test_no_module_is_called_utils():
    names = {path.stem for path in [*MODULES, *REPORT, *STORIES, *(ROOT / "scripts").rglob("*.py")]}
    assert not names & {"util", "utils", "helpers", "common", "misc"}


def test_a_program_does_nothing_unless_it_is_started():
    for path in STORIES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        tests = [ast.dump(node.test) for node in body if isinstance(node, ast.If)]
        assert any("__main__" in test for test in tests), path.name


@pytest.mark.slow
def test_importing_every_module_has_no_effects(tmp_path):
    modules = [*MODULES, *REPORT, *STORIES]
    names = sorted([*map(dotted, modules), "feed", "exam", "recipe"])
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROBE}"],
        input=json.dumps(names),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == []
    assert finished.stderr == ""
