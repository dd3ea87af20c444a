"""The structure of the package: allowed imports, and the maximum length of train.py and model.py.

Imports are read from the sources with ast, including those inside functions; for cycles only imports at the top of a
file count.
"""

import ast
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = tuple(f"minipref.{name}" for name in (
    "model", "config", "checkpoint", "tokenizer", "sentencepiece_model", "layouts", "data", "recipes", "optim",
    "metrics", "surface", "predictor", "auxiliary", "runtime", "threads", "run", "fast"))
SIDE_ROOMS = tuple(f"minipref.{name}" for name in ("pretrain", "explain", "synthetic", "sample", "hub"))
MAY_IMPORT_FAST = ("train", "predict", "minipref.fast", "minipref.pretrain", "minipref.predictor",
                   "minipref.run.report", "benchmarks", "tests")


def module_name(path: Path) -> str:
    """The module name of a file: minipref/run/state.py is minipref.run.state."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for pattern in ("*.py", "minipref/**/*.py", "benchmarks/*.py", "tests/*.py")
         for path in ROOT.glob(pattern)}
PACKAGE = sorted(module for module in FILES if module.startswith("minipref."))


def is_in(module: str, places: tuple[str, ...]) -> bool:
    """Whether a module is one of the places or inside one that is a package."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


@cache
def imports(module: str, top_only: bool = False) -> frozenset[str]:
    """The modules that a file imports. `from minipref.run import state` imports minipref.run.state."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import, which this test does not follow"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in FILES else node.module for part in parts}
    return frozenset(found)


def test_the_files_are_found_and_their_imports_read():
    assert {"train", "minipref", "minipref.model", "minipref.run.state", "tests.conftest"} <= FILES.keys()
    assert {"minipref.run.folder", "minipref.fast", "torch.nn.functional", "argparse"} <= imports("train")
    places = {place for place in CORE if any(is_in(module, (place,)) for module in PACKAGE)}
    assert len(places) >= 13, "a core file that is no longer there is checked by nothing"


def test_the_model_imports_torch_and_its_configuration_and_nothing_else():
    known = {"torch", *sys.stdlib_module_names}
    assert {name for name in imports("minipref.model") if name.split(".")[0] not in known} == {"minipref.config"}


def test_speed_comes_from_outside():
    """fast/ is imported only by programs and the predictor; minipref/__init__.py hands accelerate on, by its name."""
    importing = {module for module in FILES if any(is_in(name, ("minipref.fast",)) for name in imports(module))}
    assert {"train", "minipref.predictor"} <= importing and "minipref" not in importing
    assert not {module for module in importing if not is_in(module, MAY_IMPORT_FAST)}


@pytest.mark.parametrize("module", ["minipref", *PACKAGE])
def test_the_package_does_not_know_the_programs(module):
    assert not {name for name in imports(module) if is_in(name, ("train", "predict", "tests", "benchmarks"))}


@pytest.mark.parametrize("module", [module for module in PACKAGE if is_in(module, CORE)])
def test_no_core_file_knows_a_side_room(module):
    assert not {name for name in imports(module) if is_in(name, SIDE_ROOMS)}


def test_every_file_of_the_package_is_core_or_a_side_room():
    assert [module for module in PACKAGE if not is_in(module, CORE + SIDE_ROOMS)] == []


def test_no_imports_go_in_a_circle():
    """minipref/__init__.py is excluded: it imports its public names when they are used."""
    graph = {module: {name for name in imports(module, top_only=True) if name in PACKAGE} for module in PACKAGE}
    list(TopologicalSorter(graph).static_order())         # CycleError names the circle


def test_train_is_one_page_of_reading_and_the_backward_pass_is_in_sight():
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 380
    assert next(number for number, line in enumerate(lines, 1) if "backward()" in line) < 230


def test_the_model_is_a_file_of_three_hundred_lines_at_most():
    assert len((ROOT / "minipref" / "model.py").read_text(encoding="utf-8").splitlines()) <= 300
