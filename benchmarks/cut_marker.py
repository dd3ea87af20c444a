"""train.py with a word in place of a field's cut middle that says how much was cut.

    python benchmarks/cut_marker.py [train.py's options]

A field over its budget keeps its head and its tail, and its length, the strongest single signal of the real rows, no
longer shows. Here ` [... 1234 tokens ...] ` stands between the two, within the same budget. An experiment: the model
that it saves is fed without the marker by predict.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402 - it needs the path
from minipref import data  # noqa: E402
from minipref.tokenizer import Tokenizer  # noqa: E402

plain, encode_pairs = data.head_and_tail, data.encode_pairs


def marked(ids: list[int], budget: int, tokenizer: Tokenizer) -> list[int]:
    """`head_and_tail`, with the marker between the two; without it where the budget would hold little else."""
    marker = tokenizer.encode(f"[... {len(ids) - budget} tokens ...]")
    if len(ids) <= budget or budget < 4 * len(marker):
        return plain(ids, budget)
    kept = plain(ids, budget - len(marker))
    head = (len(kept) + 1) // 2
    return kept[:head] + marker + kept[head:]


def encode_with_marker(pairs, tokenizer: Tokenizer, *rest) -> data.Examples:
    data.head_and_tail = lambda ids, budget: marked(ids, budget, tokenizer)
    return encode_pairs(pairs, tokenizer, *rest)


if __name__ == "__main__":
    data.encode_pairs = encode_with_marker
    sys.exit(train.main(sys.argv[1:]))
