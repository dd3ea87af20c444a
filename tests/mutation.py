"""Run tests on a minipref with a deliberate mistake in it, in memory.

`with mutated(file, source):` makes every import inside the block use the mutated source; the file itself is unchanged.
`failures(tests)` runs tests with pytest in this process and returns those that failed. Together they check that the
tests detect the mistake.
"""

import contextlib
import importlib.abc
import importlib.machinery
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a given source text, without a compiled copy."""

    def __init__(self, fullname: str, path: str, source: str):
        super().__init__(fullname, path)
        self.source = source

    def get_data(self, path: str) -> bytes:
        return self.source.encode()

    def path_stats(self, path: str):
        raise OSError("a mutant is never cached")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, fullname: str, path: Path, source: str):
        self.fullname, self.path, self.source = fullname, path, source

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.fullname:
            return None
        loader = _Loader(fullname, str(self.path), self.source)
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def source_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def replaced(file: str, old: str, new: str) -> str:
    """The file's source with `old` replaced by `new`. Fails if `old` does not occur exactly once."""
    source = source_of(file)
    assert source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
    return source.replace(old, new)


@contextlib.contextmanager
def mutated(file: str, source: str) -> Iterator[None]:
    """Inside the block, `file` (relative to the repository) is imported from the text `source`.

    All modules that could refer to the real one (minipref, programs, tests) are imported again inside the block and
    restored after it.
    """
    fullname = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    finder = _Finder(fullname, ROOT / file, source)
    kept = {name: module for name, module in sys.modules.items() if _is_ours(module, name)}
    for name in kept:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if _is_ours(module, name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def _is_ours(module, name: str) -> bool:
    path = getattr(module, "__file__", None)
    return bool(path) and name not in ("__main__", "conftest", __name__) and not name.startswith("_pytest") and (
        name.split(".")[0] == "minipref" or Path(path).parent in (ROOT, TESTS))


class _Reports:
    """A pytest plugin that records passed, failed and skipped tests, with the last line of the reason."""

    def __init__(self):
        self.failed: dict[str, str] = {}
        self.passed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext.strip().splitlines()[-1]
        elif report.skipped:
            self.skipped.append(str(report.longrepr[-1]))
        elif report.when == "call":
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if not report.passed:
            self.pytest_runtest_logreport(report)


def failures(tests: list[str], stop_at_first: bool = True) -> dict[str, str]:
    """Run tests, given as `tests/test_x.py::test_y` or files, in this process. Returns the failed ones with the reason.

    Hypothesis stops at the first counterexample without shrinking it. Slow tests are not run. If all tests are skipped,
    because a package is missing, the calling test is skipped too.
    """
    reports = _Reports()
    profile = hypothesis.settings.get_current_profile_name()
    options = ["--assert=plain", "-o", "addopts=", "-m", "not slow", "--hypothesis-profile=hasty", f"--rootdir={ROOT}",
               "-c", str(ROOT / "pyproject.toml")]
    for plugin in ("terminal", "cacheprovider", "faulthandler", "logging", "unraisableexception"):
        options += ["-p", f"no:{plugin}"]
    if stop_at_first:
        options.append("-x")
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
            options.append(f"--basetemp={scratch}/pytest")
            code = pytest.main([*options, *(str(ROOT / test) for test in tests)], plugins=[reports])
    finally:
        hypothesis.settings.load_profile(profile)
    if reports.skipped and not (reports.failed or reports.passed):
        pytest.skip(reports.skipped[0])
    assert code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED), \
        f"pytest ended with {code!r} on {tests}"
    assert reports.failed or reports.passed, f"nothing ran of {tests}"
    return reports.failed
