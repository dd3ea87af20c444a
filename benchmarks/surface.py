"""Cross-validated log loss of the surface features for several penalties.

    python benchmarks/surface.py --train autoj.csv --test llmeval2.csv

Five folds by prompt, two splits. The rows of --test are predicted by a regression fitted on all of --train.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from minipref import surface
from minipref.data import character_counts, read_pairs, split_by_prompt
from minipref.metrics import baselines, evaluate, softmax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", nargs="+", required=True, metavar="CSV")
    parser.add_argument("--test", nargs="*", default=[], metavar="CSV")
    options = parser.parse_args()
    train = rows(options.train)
    tests = {Path(path).name: rows([path]) for path in options.test}
    pairs, features, labels = train
    for name, (others, _, theirs) in tests.items():
        found = baselines(character_counts(pairs), labels, character_counts(others), theirs)
        print(name, {kind: round(result["log_loss"], 4) for kind, result in found.items()})
    is_weak = surface.PENALTIES == surface.WEAK
    for strong in (1, 30, 100, 300, 1000):
        surface.PENALTIES = np.where(is_weak, surface.WEAK, strong)
        losses = []
        for seed in (0, 1):
            part = split_by_prompt([pair.prompt for pair in pairs], labels, (0.2,) * 5, seed)
            for fold in range(5):
                rest, held = part != fold, part == fold
                losses.append(loss(surface.fit_surface(features[rest], labels[rest]), features[held], labels[held]))
        fitted = surface.fit_surface(features, labels)
        others = {name: round(loss(fitted, x, y), 4) for name, (_, x, y) in tests.items()}
        print(f"penalty {strong:>4}: cross-validated {np.mean(losses):.4f}", others or "")


def rows(paths: list[str]) -> tuple[list, np.ndarray, np.ndarray]:
    pairs = [pair for path in paths for pair in read_pairs(path)]
    return pairs, surface.surface_features(pairs), np.array([pair.label for pair in pairs])


def loss(fitted: surface.LogisticRegression, features: np.ndarray, labels: np.ndarray) -> float:
    return evaluate(softmax(fitted.logits(features)), labels)["log_loss"]


if __name__ == "__main__":
    main()
