"""The competition's 57,477 rows, read, tokenised and batched: how long it takes, how much memory, beside pandas.

    python benchmarks/reading.py                          makes a file of that shape in a temporary folder, measures it
    python benchmarks/reading.py data/train.csv           measures this file
    python benchmarks/reading.py --tokenizer weights/deberta-v3-small

Nobody may ship the real file, so one of its shape is made: 57,477 rows and 184 MB, half of the rows longer than 512
tokens, a seventh with several turns, cells as JSON lists with escapes. Its words are the bundled tokenizer's, the
frequent ones frequent. The measurement is a process of its own, so that its peak of memory is its own. Prints JSON.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - these need the path

from minipref.data import encode_pairs, epoch_batches, make_batch, read_pairs  # noqa: E402
from minipref.tokenizer import load_tokenizer  # noqa: E402

BUNDLED = ROOT / "weights" / "minipref-tiny"
ROWS = 57_477
COLUMNS = "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
CHARACTERS = (270, 980, 980)          # the median prompt's, A's and B's, of all turns together
SPREAD = (1.2, 0.75, 0.75)           # of their logarithms


def write_full_size(path: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """Write a labelled file of the competition's shape; with all rows it is within 5% of its 184 MB."""
    draw = np.random.default_rng(seed)
    paragraphs = _paragraphs(draw)
    sizes = np.exp(draw.normal(np.log(CHARACTERS), SPREAD, (rows, 3))).clip(8, 60_000)
    turns = np.where(draw.random(rows) < 0.14, draw.integers(2, 7, rows), 1)
    labels = draw.integers(0, 3, rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(COLUMNS)
        for row in range(rows):
            cells = [_cell(paragraphs, draw, int(size), int(turns[row])) for size in sizes[row]]
            one_hot = ",".join(str(int(labels[row] == c)) for c in range(3))
            file.write(f"{row * 74_755 + 30_192},model-a,model-b,{','.join(cells)},{one_hot}\n")
    return path


def _paragraphs(draw: np.random.Generator) -> list[str]:
    """2,000 paragraphs of 15 to 120 words; the n-th word of the vocabulary comes with frequency 1 / n."""
    pieces = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [piece[1:] for piece, _ in pieces if piece.startswith("▁") and piece[1:].isalpha()]
    frequency = 1 / np.arange(1, len(words) + 1)
    chosen = draw.choice(len(words), 140_000, p=frequency / frequency.sum())
    ends = np.cumsum(draw.integers(15, 120, 2000)) % (len(chosen) - 120)
    return [" ".join(words[w] for w in chosen[end:end + 15 + end % 105]) + "." for end in ends]


def _cell(paragraphs: list[str], draw: np.random.Generator, characters: int, turns: int) -> str:
    """A CSV cell with a JSON list of turns, together about so many characters."""
    texts = []
    for _ in range(turns):
        text, wanted = "", characters // turns
        while len(text) < wanted:
            text += paragraphs[int(draw.integers(len(paragraphs)))] + "\n\n"
        texts.append(text[:wanted])
    return '"' + json.dumps(texts).replace("/", "\\/").replace('"', '""') + '"'


def measure(path: Path, tokenizer_folder: Path, max_length: int) -> dict:
    """Read, tokenise and batch one epoch of a file, in this process."""
    before = peak_bytes()
    started = time.monotonic()
    pairs = list(read_pairs(path))
    read = time.monotonic()
    tokenizer = load_tokenizer(tokenizer_folder)
    examples = encode_pairs(pairs, tokenizer, max_length)
    tokenised = time.monotonic()
    tokens = padded = 0
    for batch in epoch_batches(examples.lengths, 8, seed=0, epoch=0):
        ids, is_token, _ = make_batch(examples, batch, np.zeros(len(batch), dtype=bool), tokenizer)
        tokens += int(is_token.sum())
        padded += ids.numel()
    batched = time.monotonic()
    return {"rows": len(pairs), "file_mb": round(path.stat().st_size / 1e6, 1), "max_length": max_length,
            "longer_than_the_budget": round(float((examples.cut > 0).mean()), 3),
            "mean_tokens": round(tokens / len(pairs), 1), "padding_share": round(1 - tokens / padded, 4),
            "read_seconds": round(read - started, 2), "tokenise_seconds": round(tokenised - read, 2),
            "batch_seconds": round(batched - tokenised, 2), "threads": len(os.sched_getaffinity(0)),
            "imports_mb": round(before / 1e6), "peak_mb": round(peak_bytes() / 1e6)}


def measure_pandas(path: Path) -> dict:
    """What `pandas.read_csv` alone takes, in this process."""
    import pandas
    started = time.monotonic()
    frame = pandas.read_csv(path)
    return {"rows": len(frame), "pandas_seconds": round(time.monotonic() - started, 2)}


def peak_bytes() -> int:
    """The most memory that this process has had resident.

    Linux hands the parent's figure on to a child in `ru_maxrss`; what /proc says is this program's own.
    """
    if Path("/proc/self/status").is_file():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_a_process_of_its_own(what: str, path: Path, tokenizer: Path, max_length: int = 512) -> dict:
    command = [sys.executable, __file__, str(path), "--tokenizer", str(tokenizer), "--max-length", str(max_length)]
    done = subprocess.run([*command, "--here", what], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path, nargs="?", metavar="CSV")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED, metavar="DIR")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--here", choices=("minipref", "pandas"), help="measure this one alone, in this process")
    options = parser.parse_args()
    if options.here == "pandas":
        print(json.dumps(measure_pandas(options.csv)))
    elif options.here == "minipref":
        print(json.dumps(measure(options.csv, options.tokenizer, options.max_length)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = options.csv or write_full_size(Path(folder) / "train.csv")
            found = in_a_process_of_its_own("minipref", path, options.tokenizer, options.max_length)
            found |= in_a_process_of_its_own("pandas", path, options.tokenizer)
        print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
