# %% [markdown]
# # Human preference with minipref
#
# Trains DeBERTa-v3 on the competition's rows and writes `submission.csv`. It needs no internet. Attach three inputs:
#
# - the competition's data (`train.csv`, `test.csv`);
# - a dataset with the project's files (`train.py`, `predict.py`, `minipref/`);
# - a dataset with an encoder in the Hugging Face layout (`config.json`, `model.safetensors`, `spm.model`). Without one,
#   the small encoder in the project's `weights/minipref-tiny` is taken, which is good for a rehearsal only.
#
# If a trained model (the `model/` folder of a run) is attached as well, training is skipped.
#
# This file is made from `docs/kaggle_notebook.py` by `make docs`, and a test of the project runs every cell.

# %%
import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("NOTEBOOK_INPUT", "/kaggle/input"))
WORK = Path(os.environ.get("NOTEBOOK_WORK", "/kaggle/working"))
TRAIN_OPTIONS = os.environ.get("NOTEBOOK_TRAIN_OPTIONS", "").split()      # '--epochs 2', for instance


def folder_with(*names, outside=None):
    """The first folder among the inputs, and not within `outside`, that has all of these files; None without one."""
    return next((path.parent for path in sorted(INPUT.rglob(names[0]))
                 if outside not in path.parents and all((path.parent / name).exists() for name in names)), None)


project, rows = folder_with("train.py", "predict.py", "minipref"), folder_with("test.csv", "train.csv")
assert project, f"no project files below {INPUT}: attach the dataset with train.py, predict.py and minipref/"
assert rows, f"no train.csv and test.csv below {INPUT}: attach the competition's data"
trained = folder_with("minipref.json", "model.safetensors")
# Whatever is an encoder is taken, even an incomplete one: training then says what is missing.
encoder = next(filter(None, (folder_with(name, "config.json", outside=project)
                             for name in ("spm.model", "tokenizer.json", "config.json"))),
               project / "weights" / "minipref-tiny")
print(f"project  {project}\nrows     {rows}\nmodel    {trained or f'to be trained from {encoder}'}")

WORK.mkdir(parents=True, exist_ok=True)
os.chdir(WORK)
sys.path.insert(0, str(project))

# %% [markdown]
# ## A look at the rows
#
# Each text cell is a JSON list of turns; one row in seven has more than one. Of the three winner columns one is 1.

# %%
import pandas as pd

frame = pd.read_csv(rows / "train.csv", dtype={"id": str})
print(f"{len(frame):,} rows")
print(frame[["winner_model_a", "winner_model_b", "winner_tie"]].mean().round(3).to_string())
print(f"answer A of the first row: {frame['response_a'].iloc[0][:200]}")

# %% [markdown]
# ## Training
#
# The same as `python train.py --train ... --encoder ... --run run`. The first lines say what was taken and the recipe;
# after twenty steps comes an estimate of how long the others take. The best model so far is always in `run/model`; the
# figures at the end are in `run/report.html`.

# %%
import train

if trained is None:
    arguments = ["--train", str(rows / "train.csv"), "--encoder", str(encoder), "--run", "run", *TRAIN_OPTIONS]
    assert train.main(arguments) == 0
    trained = Path("run/model")

# %% [markdown]
# ## Prediction
#
# Every pair is judged in both orders and the two verdicts are averaged; `--no-swap-average` halves the time and costs
# score.

# %%
import predict

assert predict.main([str(rows / "test.csv"), "--model", str(trained), "--output", "submission.csv"]) == 0
print(pd.read_csv("submission.csv", dtype={"id": str}).head().to_string(index=False))

# %% [markdown]
# ## One pair, explained
#
# Token attributions for the prediction, and what the heads attend to. `explain.html` among the notebook's outputs can
# be opened on its own.

# %%
from minipref.explain.__main__ import main as explain

assert explain([str(rows / "test.csv"), "--row", "1", "--model", str(trained), "--output", "explain.html"]) == 0
