"""Write the synthetic dataset and print its baseline scores: `python -m minipref.synthetic`."""

import sys
from collections.abc import Sequence

import numpy as np

from minipref import metrics
from minipref.runtime import ArgumentParser, run_program
from minipref.synthetic import generator
from minipref.synthetic.generator import SyntheticRows
from minipref.synthetic.rule import bayes_optimal_log_loss


def summary(train: SyntheticRows, test: SyntheticRows) -> str:
    """Counts and class shares, and the log loss of the baselines and of the rule on the test rows."""
    shares = np.bincount(train.labels, minlength=3) / len(train.labels)
    words = train.flaws[["a_words", "b_words"]].to_numpy()
    lines = [
        f"{len(train.labels):,} training rows, {len(test.labels):,} test rows; an answer has {words.mean():.0f} words",
        f"class shares in training: A {shares[0]:.3f}, B {shares[1]:.3f}, tie {shares[2]:.3f}",
        "log loss on the test rows:",
    ]
    scores = metrics.baselines(train.lengths, train.labels, test.lengths, test.labels)
    scores["Bayes-optimal"] = metrics.evaluate(test.probabilities, test.labels)
    lines += [f"  {name:<20} {score['log_loss']:.4f}" for name, score in scores.items()]
    return "\n".join(lines) + f"   (the rule itself; {bayes_optimal_log_loss(test.probabilities):.4f} expected)"


def main(arguments: Sequence[str] | None = None) -> int:
    def body() -> None:
        parser = ArgumentParser(prog="python -m minipref.synthetic", description="Write the synthetic dataset.")
        for option, default, text in (("--folder", "data/synthetic", "folder for the files"),
                                      ("--rows", generator.TRAIN_ROWS, "training rows"),
                                      ("--test-rows", generator.TEST_ROWS, "test rows"),
                                      ("--seed", generator.TRAIN_SEED, "seed of the training rows"),
                                      ("--test-seed", generator.TEST_SEED, "seed of the test rows")):
            parser.add_argument(option, type=type(default), default=default, help=f"{text} (default: %(default)s)")
        options = parser.parse_args(arguments)
        train, test = generator.train_and_test(train_rows=options.rows, test_rows=options.test_rows,
                                               train_seed=options.seed, test_seed=options.test_seed)
        paths = generator.write_files(options.folder, train, test)
        print(summary(train, test))
        for name, path in paths.items():
            print(f"{name:<14} {path}")

    return run_program("synthetic", body)


if __name__ == "__main__":
    sys.exit(main())
