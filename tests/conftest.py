"""Configuration of all tests: the checkout on the path, no network, a fixed number of threads, visible skips.

`MINIPREF_REQUIRE` lists packages that must be installed (`transformers,sentencepiece,sklearn` in `make test` and CI): a
test that is skipped because one is missing fails instead. `MINIPREF_REFERENCE_DIR` is a folder of real files (a
published `spm.model`, rows of the competition); the summary at the end lists the tests skipped without it.
"""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # before anything imports huggingface_hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")        # waiting threads release their core

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                              # minipref, train and predict, installed or not

REQUIRED = [name.strip() for name in os.environ.get("MINIPREF_REQUIRE", "").split(",") if name.strip()]
REFERENCE = "MINIPREF_REFERENCE_DIR"

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # with several test processes a second thread only waits
os.environ["OMP_NUM_THREADS"] = str(THREADS)               # for programs started by tests
torch.set_num_threads(THREADS)

# The same examples every time, so that failures are reproducible. `--hypothesis-profile explore` draws new ones;
# `hasty` stops at the first failure without shrinking it, for mutation tests.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.register_profile("hasty", deadline=None, derandomize=True, database=None,
                                     phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of real files that are not in the repository; skips the test if there is none."""
    folder = os.environ.get(REFERENCE)
    if not folder:
        pytest.skip(f"{REFERENCE} is not set: the real files were not tested")
    if not Path(folder).is_dir():
        pytest.fail(f"{REFERENCE} is {folder}, which is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder with a very small encoder for train.py. Tests must not change it."""
    from small import write_encoder
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of a given size, such as "128k", until the end of the test."""
    folder = tmp_path / "disk"

    def mounted(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a real full disk: a tmpfs cannot be mounted here")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(params=["plain", "fast", "batched"])
def form(request, monkeypatch):
    """Runs a test for every form of the model: plain, accelerated, accelerated as on a GPU.

    The value is a function that returns a copy of a plain model in that form.
    """
    if request.param == "batched":
        monkeypatch.setattr("minipref.fast.attention.select_backend", lambda device: "batched")

    def formed(model):
        from minipref.fast import accelerate
        model = copy.deepcopy(model)
        return model if request.param == "plain" else accelerate(model)

    return formed


def _fail_if_required(report) -> None:
    """Turn a skip for a missing package in `MINIPREF_REQUIRE` into a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    missing = [name for name in REQUIRED if name in reason]
    if missing:
        report.outcome = "failed"
        report.longrepr = f"MINIPREF_REQUIRE names {', '.join(missing)}, and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_if_required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_if_required(report)
    return report


def pytest_terminal_summary(terminalreporter):
    """List the tests that were skipped for lack of real files."""
    unproven = [report.nodeid for report in terminalreporter.stats.get("skipped", [])
                if REFERENCE in (report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr))]
    if unproven:
        terminalreporter.section(f"not proven on real files, for {REFERENCE} is not set")
        terminalreporter.write_line("\n".join(unproven))
