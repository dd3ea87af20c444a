"""The synthetic dataset: labelled preference rows generated from a seed, so that training needs no download.

A row is a prompt and two answers in Kaggle's layout. Answers have hidden flaws. A rule computes the probabilities of
the label from the flaws, and truth.csv stores them. The Bayes-optimal log loss is therefore known, and a training run
can report how much of the gap to it was closed.

    rule.py        label probabilities from flaws
    texts.py       prompts, and answers with given flaws
    generator.py   rows and files
    words.toml     texts and word lists

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
