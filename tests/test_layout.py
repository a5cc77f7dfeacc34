"""Who may import whom, and that importing has no effects."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from programs import run_elsewhere

ROOT = Path(__file__).parents[1]
PACKAGES = {"irv2", "data"}
STORIES = [ROOT / "train.py", ROOT / "validate.py"]
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROGRAM = [*STORIES, *MODULES, *sorted((ROOT / "scripts").rglob("*.py"))]
# What irv2 and report take of data: nothing about images.
SHARED = {
    *("data.errors", "data.files", "data.names", "data.native", "data.strict_json", "data.urls"),
    *("data.class_lists", "data.optional", "data.user_cache"),
}
# Modules that stand alone: plain arguments in, nothing of the project imported but SHARED.
LEAVES = [
    *("training/optim", "training/schedule", "training/metrics", "training/distributed"),
    *("report/statistics", "run/meta", "strict_yaml"),
]

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
for name in NAMES:
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
    """irv2/training/optim.py -> irv2.training.optim."""
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


def modules_of(path: Path) -> set[str]:
    """The modules of irv2 and data that a file imports."""
    return imports(path) & set(map(dotted, MODULES)) - PACKAGES


def inner_imports(path: Path) -> set[str]:
    """Our modules that a file imports within functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = [node for function in functions for node in ast.walk(function)]
    return {
        name
        for node in inner
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        if name and name.split(".")[0] in PACKAGES
    }


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "irv2").mkdir()
    path = tmp_path / "irv2" / "example.py"
    path.write_text(
        "import data.stream as s\n"
        "def later():\n    from irv2 import build\n"
        "from . import config\nfrom .formats import FORMATS\n",
        encoding="utf-8",
    )
    assert roots(path) == {"irv2", "data"}
    assert inner_imports(path) == {"irv2"}
    assert {"data.stream", "irv2.build", "irv2.config", "irv2.formats"} <= imports(path)


def test_both_packages_are_looked_at():
    seen = set(map(dotted, MODULES))
    assert {"irv2.network.model", "irv2.training.step", "data.stream", "data.loader"} <= seen


def of_package(name: str) -> dict[str, Path]:
    """The modules below a package by name, without those that only say what a package is."""
    modules = {dotted(path): path for path in MODULES if path.stem != "__init__"}
    return {module: path for module, path in modules.items() if module.startswith(f"{name}.")}


def strangers(package: str, *known: str) -> dict[str, set[str]]:
    """Modules of a package -> what they import of ours besides the package and the known."""
    own = {package, *known}
    taken = {
        name: {m for m in modules_of(path) if not any(f"{m}.".startswith(f"{k}.") for k in own)}
        for name, path in of_package(package).items()
    }
    return {name: modules for name, modules in taken.items() if modules}


def test_data_knows_nothing_of_irv2():
    assert strangers("data") == {}


def test_each_room_of_irv2_knows_only_what_stands_before_it():
    assert strangers("irv2.network", *SHARED) == {}
    assert strangers("irv2.training", *SHARED, "irv2.network") == {}
    assert strangers("irv2.report", *SHARED, "irv2.strict_yaml", "irv2.training.metrics") == {}
    assert strangers("irv2.engines", *SHARED, "irv2.network") == {}
    known = (
        *("irv2.config", "irv2.sections", "irv2.data_section", "irv2.keys"),
        *("irv2.strict_yaml", "irv2.network", "irv2.training"),
    )
    assert strangers("irv2.run", "data", *known) == {}


def test_there_is_no_circle():
    graph = {dotted(path): modules_of(path) for path in MODULES if path.stem != "__init__"}
    assert len(graph["data.loader"]) > 3 and len(graph["irv2.evaluation"]) > 10
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_no_import_hides_in_a_function():
    assert {dotted(path): found for path in MODULES if (found := inner_imports(path))} == {}
    assert [dotted(path) for path in MODULES if "TYPE_CHECKING" in path.read_text()] == []


def test_shards_are_read_without_other_sources():
    """data.sources opens them, and not the other way round."""
    known = {"data.base", "data.stream", "data.limits"}
    assert strangers("data.shards", *SHARED, *known) == {}


def test_the_network_imports_nothing_of_what_trains_it():
    allowed = {"irv2"}
    above = {
        (dotted(path), name)
        for path in (ROOT / "irv2" / "network").rglob("*.py")
        for name in imports(path) - allowed
        if name.startswith("irv2") and not name.startswith("irv2.network")
    }
    assert above == set()


def test_one_module_knows_of_the_folder_for_cpus():
    """So that the folder can be deleted: test_accelerate.py does."""
    folder = ROOT / "irv2" / "network" / "cpu"
    knowing = {
        dotted(path)
        for path in [*MODULES, *ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
        if folder not in path.parents and any("network.cpu" in name for name in imports(path))
    }
    assert knowing == {"irv2.network.accelerate"}


def test_a_leaf_imports_nothing_of_the_project():
    leaves = {name: modules_of(ROOT / "irv2" / f"{name}.py") for name in LEAVES}
    assert {name for name, modules in leaves.items() if modules - SHARED} == set()


def test_no_module_imports_a_program():
    programs = {"train", "validate", "scripts", "tests"}
    assert [dotted(path) for path in MODULES if roots(path) & programs] == []


def test_the_root_holds_the_two_programs_and_no_other_module():
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["train.py", "validate.py"]


def test_programs_stay_stories():
    lengths = {path.name: len(path.read_text().splitlines()) for path in STORIES}
    step = ROOT / "irv2" / "training" / "step.py"
    assert lengths["train.py"] <= 200 and lengths["validate.py"] <= 220
    assert len(step.read_text().splitlines()) <= 260


def test_a_script_finds_the_project_before_it_imports_it():
    """Python puts a script's own folder into its path, not the repository."""
    ours = {*PACKAGES, "scripts"}
    for path in (ROOT / "scripts").glob("*.py"):
        body = ast.parse(path.read_text()).body
        starts = any(ast.unparse(part).startswith("if __name__ ==") for part in body)
        modules = [(part.lineno, part.module) for part in body if isinstance(part, ast.ImportFrom)]
        first = min((line for line, name in modules if name.split(".")[0] in ours), default=None)
        if starts and first is not None:
            before = [ast.unparse(part) for part in body if part.lineno < first]
            assert any(text.startswith("sys.path.insert(0, ") for text in before), path.name


def test_no_file_is_longer_than_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PROGRAM}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_no_two_classes_have_one_name():
    homes = defaultdict(list)
    for path in PROGRAM:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert homes.keys() > {"Run", "Evaluation", "Config"}
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_docstring_begins_in_the_middle_of_a_sentence():
    begins = re.compile(r'"""(Of|That|Those|What|Whether)\b')
    files = [*PROGRAM, *(ROOT / "tests").rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if begins.search(path.read_text())] == []


def test_no_module_is_called_utils():
    names = {path.stem for path in PROGRAM}
    assert not names & {"util", "utils", "helpers", "common", "misc"}


def test_a_program_does_nothing_unless_it_is_started():
    for path in STORIES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        tests = [ast.dump(node.test) for node in body if isinstance(node, ast.If)]
        assert any("__main__" in test for test in tests), path.name


@pytest.mark.slow
def test_importing_every_module_has_no_effects(tmp_path):
    modules = [*MODULES, *STORIES]
    names = sorted(map(dotted, modules))
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); NAMES = {names}"
    finished = run_elsewhere(tmp_path, "-c", f"{head}\n{PROBE}")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout) == []
    assert finished.stderr == ""
