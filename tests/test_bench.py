"""The benchmark runs all sections, and its page is written from the stored measurements."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import performance_page


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """The measurements of a toy model, without start-up and memory, which need separate processes."""
    folder = tmp_path_factory.mktemp("bench")
    rows = folder / "rows.csv"
    rows.write_text("id,prompt,response_a,response_b\n" + "".join(
        f"{i},What is {i} and {i}?,{'It is ' * i}{2 * i}.,No idea.\n" for i in range(40)))
    command = [sys.executable, "benchmarks/bench.py", "--tiny", "--runs", "1", "--threads", "1", "--rows", str(rows),
               "--figures", str(folder / "figures.json"), "--only", "rates", "forward", "training", "prediction",
               "profiles"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
def test_both_programs_are_timed_on_the_same_work_and_give_the_same_probabilities(figures):
    for section in ("forward", "training", "prediction"):
        for row in figures[section]:
            assert {bench.US, bench.THEM} <= row["seconds"].keys()
            assert all(len(times) == 1 and times[0] > 0 for times in row["seconds"].values())
    assert figures["prediction"][0]["largest_difference"][bench.US] < 1e-5
    assert figures["prediction"][0]["rows"] == 40


@pytest.mark.slow
def test_the_profile_counts_the_products_of_both(figures):
    by_name = {(row["name"], row["task"], row["precision"]): row for row in figures["profiles"]}
    ours, theirs = (by_name[name, "forward", "fp32"] for name in (bench.US, bench.THEM))
    assert 0 < ours["gflop"] <= theirs["gflop"]
    assert all(sum(row["by_kind"].values()) > 0 for row in by_name.values())


@pytest.mark.slow
def test_the_page_has_the_ratio_of_the_medians_and_says_what_was_not_measured(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(performance_page, "PAGE", tmp_path / "performance.md")
    for name, page in (("README", "README.md"), ("SUMMARY", "benchmarks.md")):
        monkeypatch.setattr(performance_page, name, tmp_path / page)
        (tmp_path / page).write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    seconds = {bench.US: [1.0, 5.0, 2.0], bench.THEM: [9.0, 6.0, 5.0]}
    row = {"batch": 8, "length": 512, "precision": "fp32", "threads": 2, "seconds": seconds}
    performance_page.write_page(figures | {"forward": [row, row | {"precision": "bf16"}], "memory": [
        {"task": "forward", "batch": 8, "length": 512, "precision": "fp32",
         "bytes": {bench.US: 2**30, bench.THEM: 4 * 2**30}}]})
    page = (tmp_path / "performance.md").read_text()
    assert "| 8 x 512 | fp32 | 2 | **3.00** | 2.00 s | 6.00 s |" in page
    assert "| forward | 8 x 512 | fp32 | **0.25** | 1.00 GB | 4.00 GB |" in page
    assert "None of these figures was measured on a GPU" in page
    summary = (tmp_path / "benchmarks.md").read_text()
    assert summary.startswith("before\n<!-- speed -->\nMachine: ") and summary.endswith("<!-- /speed -->\nafter\n")
    assert "| forward, 8 x 512 tokens | fp32 | **3.00** | 2.00 s | 6.00 s | 0.25 |" in summary and "old" not in summary
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- speed -->\n| times as fast") and readme.endswith("<!-- /speed -->\nafter\n")
    assert "| forward, 8 rows of 512 tokens | **3.00** | **3.00** |" in readme and "old" not in readme


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    arguments = {"name": bench.US, "folder": "weights/minipref-tiny", "task": "forward", "precision": "fp32",
                 "batch": 1, "length": 16, "threads": 1, "device": "cpu"}
    command = [sys.executable, "benchmarks/bench.py", "--in-own-process", json.dumps(arguments)]
    found = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert 100 * 2**20 < found < 2 * 2**30


@pytest.mark.slow
def test_the_peers_table_has_the_ratio_of_medians_and_a_row_is_measured_once(tmp_path):
    figures = tmp_path / "peers.json"
    command = [sys.executable, "benchmarks/peers.py", "--small", "--only", "forward", "--figures", str(figures)]

    def printed():
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240).stdout

    assert "forward 2 x 64 fp32: " in printed()
    row, *_ = json.loads(figures.read_text())["rows"]              # and one in bfloat16, where there are units for it
    assert max(row["differences"].values()) < 1e-5
    assert {bench.US, bench.THEM} < row["seconds"].keys()
    again = json.loads(figures.read_text())
    again["rows"][0]["seconds"] = {bench.US: [1.0, 9.0, 2.0], bench.THEM: [5.0, 5.0, 1.0]}
    figures.write_text(json.dumps(again))
    assert printed().startswith("| their time over minipref's |") and "| forward, 2 x 64 | 2.50" in printed()
