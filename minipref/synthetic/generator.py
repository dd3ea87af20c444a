"""Rows and files of the synthetic dataset. Equal arguments give equal bytes on every machine."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd

from minipref.runtime import InputError, write_text
from minipref.synthetic.rule import FLAWS, TIE, outcome_probabilities, utility
from minipref.synthetic.texts import WORDS, choice_task, passage_task, pick, some, topic_task, word_task

TRAIN_ROWS, TEST_ROWS, TRAIN_SEED, TEST_SEED = 45_000, 1500, 1, 2

CHANCES = {"off": 0.30, "cut": 0.25, "form": 0.25, "amount": 0.25, "wrong": 0.30}   # of each flaw, if it can occur
REUSE = 0.10         # share of rows that repeat an earlier row's prompt, as in real data
MULTI_TURN = 0.07    # share of prompts that begin with a turn of small talk

WINNERS = ["winner_model_a", "winner_model_b", "winner_tie"]
COLUMNS = ["id", "model_a", "model_b", "prompt", "response_a", "response_b", *WINNERS]
TEXTS = ["prompt", "response_a", "response_b"]
TRUTH_HEADER = b"id,p_a,p_b,p_tie\n"


@dataclass(frozen=True)
class Kind:
    """A kind of prompt: its share, the possible flaws of its answers, and its task (`texts.py`)."""

    share: float
    flaws: tuple[str, ...]
    task: Callable


KINDS = {
    "list": Kind(0.16, ("off", "cut", "form"), partial(topic_task, kind="list")),
    "prose": Kind(0.16, ("off", "cut", "form"), partial(topic_task, kind="prose")),
    "brief": Kind(0.16, ("off", "cut", "amount"), partial(topic_task, kind="brief")),
    "detail": Kind(0.16, ("off", "cut", "amount"), partial(topic_task, kind="detail")),
    "passage": Kind(0.16, ("off", "cut", "wrong"), passage_task),
    "choice": Kind(0.10, ("off", "cut", "wrong"), choice_task),
    "word": Kind(0.10, ("cut", "wrong"), word_task),
}


@dataclass(frozen=True)
class SyntheticRows:
    """Rows with their hidden flaws and probabilities.

    frame: the nine Kaggle columns, all text but the three 0/1 winners; `null` turns do not occur.
    probabilities: (rows, 3) float64, the rule's P(A), P(B), P(tie), six decimals, each row summing to 1.
    flaws: `kind`, then 0/1 columns `a_off`, `b_off`, ... for each of `FLAWS`, then `a_words`, `b_words`.
    """

    frame: pd.DataFrame
    probabilities: np.ndarray
    flaws: pd.DataFrame

    @property
    def labels(self) -> np.ndarray:
        """(rows,) int64: 0 where A won, 1 where B won, 2 for a tie."""
        return self.frame[WINNERS].to_numpy().argmax(axis=1)

    @property
    def lengths(self) -> np.ndarray:
        """(rows, 3): characters of prompt, A and B, over all turns, for `metrics.baselines`."""
        return self.frame[TEXTS].map(lambda cell: sum(map(len, json.loads(cell)))).to_numpy()


def generate(rows: int, seed: int, *, apart_from: SyntheticRows | None = None) -> SyntheticRows:
    """`rows` rows from `seed`.

    apart_from: other rows, such as a training set; their prompts and ids are not used again.
    Errors: InputError for fewer than one row or a negative seed.
    """
    if rows < 1:
        raise InputError(found=f"{rows} rows asked for", expected="at least 1")
    if seed < 0:
        raise InputError(found=f"seed {seed}", expected="0 or more")   # Random uses the absolute value
    rng = Random(seed)
    avoid, used_ids = (set(apart_from.frame[column]) if apart_from else set() for column in ("prompt", "id"))
    asked, made = [], []
    for _ in range(rows):
        if asked and rng.random() < REUSE:
            prompt = pick(rng, asked)
        else:
            prompt = new_prompt(rng, avoid)
            asked.append(prompt)
        record, *truth = make_row(rng, *prompt)
        while record["id"] in used_ids:
            record["id"] = new_id(rng)
        used_ids.add(record["id"])
        made.append((record, *truth))
    records, probabilities, notes = zip(*made)
    return SyntheticRows(pd.DataFrame(records), np.array(probabilities), pd.DataFrame(notes))


def new_prompt(rng: Random, avoid: set[str]) -> tuple[str, list[str], Callable]:
    """(kind, turns, answer function) of a prompt whose JSON is not in `avoid`."""
    while True:
        left = rng.random() * sum(kind.share for kind in KINDS.values())
        for name in KINDS:                    # the last one if rounding leaves a remainder
            left -= KINDS[name].share
            if left < 0:
                break
        prompt, answer = KINDS[name].task(rng)
        turns = [pick(rng, list(WORDS["small_talk"])), prompt] if rng.random() < MULTI_TURN else [prompt]
        if json.dumps(turns) not in avoid:
            return name, turns, answer


def make_row(rng: Random, kind: str, turns: list[str], answer: Callable) -> tuple[dict, tuple, dict]:
    """(record, probabilities, note): two answers to the prompt, and a label drawn by the rule."""
    flaws = [draw_flaws(rng, kind) for _ in "AB"]
    replies = [answer(rng, flaw) for flaw in flaws]
    words = [len(reply.split()) for reply in replies]
    p = outcome_probabilities(utility(flaws[0], words[0]) - utility(flaws[1], words[1]))
    drawn = rng.random()
    label = 0 if drawn < p[0] else 1 if drawn < p[0] + p[1] else 2
    cells = [json.dumps([*(pick(rng, WORDS["small_talk"][turn]) for turn in turns[:-1]), reply]) for reply in replies]
    record = dict(zip(COLUMNS, [new_id(rng), *some(rng, WORDS["models"], 2), json.dumps(turns), *cells,
                                *(int(label == k) for k in range(3))]))
    marks = {f"{side}_{flaw}": int(flaw in of) for flaw in FLAWS for side, of in zip("ab", flaws)}
    return record, p, {"kind": kind, **marks, "a_words": words[0], "b_words": words[1]}


def draw_flaws(rng: Random, kind: str) -> list[str]:
    """The flaws of an answer, drawn independently, except that an answer that is off the topic is not also wrong."""
    flaws = [flaw for flaw in KINDS[kind].flaws if rng.random() < CHANCES[flaw]]
    return [flaw for flaw in flaws if not (flaw == "wrong" and "off" in flaws)]


def new_id(rng: Random) -> str:
    """Up to ten digits; as with the real ids, half of them exceed int32."""
    return str(int(rng.random() * 2**32))


def train_and_test(*, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS,
                   train_seed: int = TRAIN_SEED, test_seed: int = TEST_SEED) -> tuple[SyntheticRows, SyntheticRows]:
    """Training and test rows from two seeds, without common prompts or ids.

    Errors: InputError for equal seeds, a negative seed, fewer than one row.
    """
    if train_seed == test_seed:
        raise InputError(found=f"seed {train_seed} for both training and test rows", expected="two different seeds")
    train = generate(train_rows, train_seed)
    return train, generate(test_rows, test_seed, apart_from=train)


def write_dataset(folder: str | Path, **arguments: int) -> dict[str, Path]:
    """Write `train_and_test(**arguments)` into `folder`, each file atomically.

    Returns the paths: "train" is `train.csv`, labelled; "test" is `test.csv` with id, prompt, response_a, response_b
    as Kaggle gives them; "test_labelled" is the same rows with models and labels; "truth" is `truth.csv`, the rule's
    probabilities for the ids of both (id, p_a, p_b, p_tie).
    Errors: InputError as `train_and_test`, and for a folder that cannot be written.
    """
    return write_files(folder, *train_and_test(**arguments))


def write_files(folder: str | Path, train: SyntheticRows, test: SyntheticRows) -> dict[str, Path]:
    """Write the four files of `write_dataset`; returns their paths.

    Errors: InputError for an existing file with other content.
    """
    truth = pd.DataFrame(np.concatenate([train.probabilities, test.probabilities]), columns=["p_a", "p_b", "p_tie"])
    truth.insert(0, "id", [*train.frame["id"], *test.frame["id"]])
    frames = {"train": train.frame, "test": test.frame[["id", *TEXTS]], "test_labelled": test.frame, "truth": truth}
    paths = {name: Path(folder) / f"{name}.csv" for name in frames}
    texts = {name: frame.to_csv(index=False, lineterminator="\n", float_format="%.6f")
             for name, frame in frames.items()}
    for name, path in paths.items():                      # check all before writing the first
        if path.is_file() and path.read_bytes() != texts[name].encode():
            raise InputError(file=path, found="a file with other rows",
                             expected="another folder, or this file moved away")
    for name, path in reversed(paths.items()):            # train.csv last: if it exists, the others do
        try:
            write_text(path, texts[name])
        except OSError as error:
            raise InputError(file=path, found=error.strerror or str(error), expected="a writable file") from None
    return paths


def read_truth(train_files: Iterable[str | Path]) -> dict[str, np.ndarray]:
    """The probabilities (3,) from which the labels were drawn, by id, for files of a synthetic dataset.

    They are in `truth.csv` in the same folder. A file of that name from another source is ignored: in the rule's own
    file every row has P(A) P(B) = (P(tie) / TIE)^2 and P(tie) > 0, up to the six decimals.
    """
    truth = {}
    for path in filter(Path.is_file, {Path(file).with_name("truth.csv") for file in train_files}):
        try:
            with open(path, "rb") as file:
                if file.readline(100) != TRUTH_HEADER:
                    continue
                frame = pd.read_csv(file, names=["id", "a", "b", "tie"], dtype={"id": str}, keep_default_na=False)
            a, b, tie = p = frame[["a", "b", "tie"]].to_numpy(dtype=np.float64).T
        except (OSError, ValueError, OverflowError):      # not readable, or not a table of numbers
            continue
        if np.isfinite(p).all() and (
                (tie > 0) & (abs(a + b + tie - 1) < 1e-6) & (abs(a * b - (tie / TIE)**2) < 1e-6)).all():
            truth |= dict(zip(frame["id"], p.T))
    return truth
