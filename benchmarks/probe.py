"""What an encoder knows of the sample's flaws before it is fine-tuned, or after: tables for docs/experiments.md.

    python benchmarks/probe.py                                    weights/minipref-tiny, 1,500 rows
    python benchmarks/probe.py --encoder runs/pretrain/model --rows 500
    python benchmarks/probe.py --model runs/NAME/model            a fine-tuned model instead: what its verdicts turn on

For each flaw and layer: a logistic regression on the mean vector of answer A, none of the encoder's weights trained,
says how likely A has the flaw; the figure is the area under the ROC curve on the last third of the rows (0.5: nothing).
A flaw is asked for among the kinds of prompt whose answers can have it. scikit-learn is a development package.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402 - these need the path
import pandas as pd  # noqa: E402
from frozen import answer_means  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from minipref import load_encoder, load_judge, load_tokenizer, sample  # noqa: E402
from minipref.data import Pair  # noqa: E402
from minipref.judge import Judge  # noqa: E402


def pairs_of(rows: sample.SampleRows) -> list[Pair]:
    texts = rows.frame[["prompt", "response_a", "response_b"]].map(json.loads)
    return [Pair("", *turns) for turns in texts.itertuples(index=False)]


def area(vectors: np.ndarray, flawed: np.ndarray) -> float:
    """Area under the ROC curve on the last third, of a regression on the others. Shapes: (rows, D), (rows,) -> one."""
    fitted = 2 * len(flawed) // 3
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    model.fit(vectors[:fitted], flawed[:fitted])
    return roc_auc_score(flawed[fitted:], model.decision_function(vectors[fitted:]))


def table(means: np.ndarray, flaws: pd.DataFrame) -> str:
    """A line a flaw. `flaws` is `SampleRows.flaws`."""
    lines = ["| flaw of A | words alone | " + " | ".join(f"layer {n}" for n in range(1, means.shape[1])) + " |",
             "|---|" + "---:|" * means.shape[1]]
    for flaw in sample.FLAWS:
        possible = flaws["kind"].isin([name for name, kind in sample.KINDS.items() if flaw in kind.flaws]).to_numpy()
        flawed = flaws[f"a_{flaw}"][possible].to_numpy()
        areas = [area(means[possible, layer], flawed) for layer in range(means.shape[1])]
        lines.append(f"| {flaw} | " + " | ".join(f"{x:.2f}" for x in areas) + " |")
    return "\n".join(lines)


def learnt(judge: Judge, rows: sample.SampleRows) -> str:
    """A line a kind of prompt: what each flaw of an answer takes from its log odds against the other, by least squares.

    The rule's own are `sample.WEIGHTS`; a model that knows some flaws only says less of those as well, since the
    others are noise to it. So a figure says 'seen' or 'not seen' and no more.
    """
    p = judge.compare_many(pairs_of(rows))                                                          # (rows, 3)
    log_odds = np.log(p[:, 0]) - np.log(p[:, 1])
    cells = [(kind, flaw) for kind, of in sample.KINDS.items() for flaw in of.flaws]
    more_in_b = np.column_stack([(rows.flaws["kind"] == kind) * (rows.flaws[f"b_{flaw}"] - rows.flaws[f"a_{flaw}"])
                                 for kind, flaw in cells])
    weights = dict(zip(cells, np.linalg.lstsq(more_in_b.astype(float), log_odds, rcond=None)[0]))
    lines = [f"| kind of prompt | {' | '.join(sample.FLAWS)} |", "|---|" + "---:|" * len(sample.FLAWS)]
    for kind in sample.KINDS:
        found = [f"{weights[kind, flaw]:.1f}" if (kind, flaw) in weights else "" for flaw in sample.FLAWS]
        lines.append(f"| {kind} | {' | '.join(found)} |")
    return "\n".join([*lines, f"| the rule | {' | '.join(f'{weight:.1f}' for weight in sample.WEIGHTS.values())} |"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--encoder", default=str(ROOT / "weights" / "minipref-tiny"), metavar="DIR")
    parser.add_argument("--model", metavar="DIR", help="a fine-tuned model: what it holds against an answer")
    parser.add_argument("--rows", type=int, default=1500, metavar="N")
    parser.add_argument("--seed", type=int, default=99, help="of the rows")
    options = parser.parse_args(arguments)
    rows = sample.generate(options.rows, options.seed)
    if options.model:
        print(learnt(load_judge(options.model), rows))
        return 0
    encoder, tokenizer = load_encoder(options.encoder).eval(), load_tokenizer(options.encoder)
    of_a = answer_means(encoder, tokenizer, pairs_of(rows), 512)[:, :, 0]
    print(table(of_a, rows.flaws))
    return 0


if __name__ == "__main__":
    sys.exit(main())
