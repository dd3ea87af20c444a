"""How threads wait: chosen from what other programs do, before torch is loaded, and without any effect on a result."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from minipref import threads

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def before_torch(monkeypatch):
    """As if torch were not loaded yet, and nobody had set anything."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")          # so that monkeypatch removes what is set in the test
    monkeypatch.delenv("OMP_WAIT_POLICY")


@pytest.mark.parametrize(("busy", "policy"), [(0.0, None), (0.3, None), (0.6, "PASSIVE"), (2.0, "PASSIVE")])
def test_threads_sleep_while_they_wait_where_other_programs_are_busy(before_torch, monkeypatch, busy, policy):
    monkeypatch.setattr(threads, "busy_cores", lambda: busy)
    note = threads.choose_waiting()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert note == ("" if policy is None else f", waiting passively (other programs keep {busy:.1f} cores busy)")


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_is_kept(before_torch, monkeypatch, name):
    monkeypatch.setattr(threads, "busy_cores", lambda: 2.0)
    monkeypatch.setenv(name, "1")
    assert threads.choose_waiting() == "" and os.environ[name] == "1"
    assert [other for other in VARIABLES if other in os.environ] == [name]


def test_once_torch_is_loaded_nothing_is_set(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "busy_cores", lambda: 2.0)
    assert threads.choose_waiting() == "" and not set(VARIABLES) & os.environ.keys()


def test_a_busy_process_is_seen():
    before = threads.busy_cores(0.3)
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        during = max(threads.busy_cores(0.3) for _ in range(5))
    finally:
        process.kill()
        process.wait()
    assert 0 <= before <= os.cpu_count() and 0.5 < during <= os.cpu_count() + 1e-9


def test_a_system_without_proc_counts_as_idle(monkeypatch):
    def missing(self):
        raise FileNotFoundError
    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert threads.busy_cores(0.0) == 0.0


@pytest.mark.parametrize("program", ["train.py", "predict.py", "minipref/explain/__init__.py",
                                     "minipref/pretrain/__init__.py"])
def test_each_program_chooses_before_it_imports_torch(program):
    imports = [node for node in ast.parse((ROOT / program).read_text()).body
               if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    mine = names.index("minipref.threads")
    assert not [name for name in names[:mine] if name.split(".")[0] in ("torch", "minipref", "numpy")]


def test_importing_minipref_loads_no_torch_and_its_names_are_there():
    code = ("import sys, minipref.threads; assert 'torch' not in sys.modules; import minipref; "
            "assert all(callable(getattr(minipref, name)) for name in minipref.__all__); "
            "assert 'torch' in sys.modules; print(len(minipref.__all__))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "11\n", done.stderr
    import minipref
    with pytest.raises(AttributeError, match="module 'minipref' has no attribute 'nothing'"):
        minipref.nothing  # noqa: B018


@pytest.mark.slow
def test_the_neighbour_benchmark_runs_and_the_waiting_changes_no_bit(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "neighbour.py"), "--rounds", "1", "--steps", "1",
               "--neighbours", "0", "--figures", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "| 0 busy neighbours |" in done.stdout, done.stdout + done.stderr
