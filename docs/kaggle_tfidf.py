"""Blend a run of `train.py --folds` with TF-IDF, out of fold, and write the blended submission.

    python docs/kaggle_tfidf.py runs/folds data/train.csv data/test.csv submission.csv

`submission.csv` is predict.py's of the same run; it is replaced. Needs scikit-learn. The TF-IDF model is a logistic
regression on the words of A minus those of B, one for each fold, so each row is predicted by a model that never saw it.
The two numbers of the blend are fitted on these out-of-fold predictions; its score is cross-fitted.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minipref.data import LABEL_COLUMNS, read_pairs
from minipref.metrics import cross_fit, evaluate, fit_blend, swap_averaged

run, train_csv, test_csv, submission = map(Path, sys.argv[1:])
oof = pd.read_csv(run / "oof.csv", dtype={"id": str})
by_id, test = {pair.id: pair for pair in read_pairs(train_csv)}, read_pairs(test_csv, "if present")
train = [by_id[row] for row in oof["id"]]
labels, folds = np.array([pair.label for pair in train]), oof["fold"].to_numpy()


def texts(pairs, name):
    return [" ".join(turn or "" for turn in getattr(pair, name)) for pair in pairs]


words = TfidfVectorizer(min_df=3, sublinear_tf=True, ngram_range=(1, 2), max_features=200_000)
words.fit(texts(train, "response_a") + texts(train, "response_b"))
x, x_test = (words.transform(texts(pairs, "response_a")) - words.transform(texts(pairs, "response_b"))
             for pairs in (train, test))
logits, test_logits = np.zeros((len(train), 3)), np.zeros((len(test), 3))
for fold in np.unique(folds):
    model = LogisticRegression(C=1.0, max_iter=300).fit(x[folds != fold], labels[folds != fold])
    logits[folds == fold] = model.predict_log_proba(x[folds == fold])
    test_logits += model.predict_log_proba(x_test) / len(np.unique(folds))

ours = np.log(oof[["p_a", "p_b", "p_tie"]].to_numpy())[:, None]                     # (N, 1, 3), as one order
temperature, weight = fit_blend(ours, logits, labels)
scored = {"the run": np.exp(ours[:, 0]), "TF-IDF": np.exp(logits), "blend": cross_fit(ours, logits, labels, 0)}
for name, p in scored.items():
    print(f"{name:<8} {evaluate(p / p.sum(1, keepdims=True), labels)['log_loss']:.4f}")
print(f"temperature {temperature:.3f}, weight of TF-IDF {weight:.3f}")

frame = pd.read_csv(submission, dtype={"id": str})
assert frame["id"].tolist() == [pair.id for pair in test], "the submission is of other rows"
predicted = np.log(frame[list(LABEL_COLUMNS)].to_numpy().clip(1e-9))[:, None]
frame[list(LABEL_COLUMNS)] = swap_averaged(predicted, temperature, weight * test_logits)
frame.to_csv(submission, index=False)
