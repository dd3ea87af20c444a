"""The synthetic dataset: labelled preference rows from a seed, so that training works with nothing downloaded.

A row is a prompt and two answers in the Kaggle layout. Answers have hidden flaws, a rule that knows the flaws gives the
label's probabilities, and the probabilities come with the rows. The Bayes-optimal log loss is therefore known, and a
training run can report how much of the gap to it was closed.

    rule.py        flaws to label probabilities
    texts.py       prompts, and answers with given flaws
    generator.py   rows, and the files they are written to
    words.toml     the texts and word lists

    python -m minipref.synthetic [--folder data/synthetic] [--rows N] [--test-rows N] [--seed N] [--test-seed N]
"""

from minipref.synthetic.generator import (
    KINDS,
    TRAIN_ROWS,
    SyntheticRows,
    generate,
    read_truth,
    train_and_test,
    write_dataset,
)
from minipref.synthetic.rule import FLAWS, WEIGHTS, bayes_optimal_log_loss

__all__ = ["FLAWS", "KINDS", "TRAIN_ROWS", "WEIGHTS", "SyntheticRows", "bayes_optimal_log_loss", "generate",
           "read_truth", "train_and_test", "write_dataset"]
