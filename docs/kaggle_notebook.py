# %% [markdown]
# # Human preference with minipref
#
# Trains DeBERTa-v3 on the competition's rows and writes `submission.csv`. It needs no internet. Attach three inputs:
#
# - the competition's data (`train.csv`, `test.csv`);
# - a dataset with the project's files (`train.py`, `predict.py`, `minipref/`, and `weights/` for a rehearsal);
# - a dataset with an encoder in the Hugging Face layout (`config.json`, `model.safetensors`, `spm.model`).
#
# `REHEARSAL = True` trains the small encoder in the project's `weights/minipref-tiny` instead, with its own recipe; the
# third input is not needed then. If a trained model (the `model/` folder of a run, or those of its folds)
# is attached as well, training is skipped.
#
# This file is made from `docs/kaggle_notebook.py` by `make docs`, and a test of the project runs every cell.

# %%
import os
import subprocess
import sys
from pathlib import Path

import torch

REHEARSAL = os.environ.get("NOTEBOOK_REHEARSAL") == "1"
DEFAULT_OPTIONS = "" if REHEARSAL else "--recipe competition --max-length 512"         # + " --folds 3" for folds
TRAIN_OPTIONS = os.environ.get("NOTEBOOK_TRAIN_OPTIONS", DEFAULT_OPTIONS).split()
INPUT = Path(os.environ.get("NOTEBOOK_INPUT", "/kaggle/input"))
WORK = Path(os.environ.get("NOTEBOOK_WORK", "/kaggle/working"))
PROCESSES = int(os.environ.get("NOTEBOOK_PROCESSES", max(torch.cuda.device_count(), 1)))       # two on 'T4 x2'


def folders_with(*names):
    """All folders among the inputs that have all of these files."""
    return [path.parent for path in sorted(INPUT.rglob(names[0])) if all((path.parent / n).exists() for n in names)]


def program(name, *arguments):
    """Run train.py or predict.py, in a process for each GPU if there are several."""
    if PROCESSES == 1:
        assert __import__(name).main(list(arguments)) == 0
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "--",
               str(project / f"{name}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    assert process.returncode == 0, f"{name}.py ended with {process.returncode}"


projects, rows = folders_with("train.py", "predict.py", "minipref"), folders_with("test.csv", "train.csv")
assert projects, f"no project files below {INPUT}: attach the dataset with train.py, predict.py and minipref/"
assert rows, f"no train.csv and test.csv below {INPUT}: attach the competition's data"
project, rows = projects[0], rows[0]
trained = folders_with("minipref.json", "model.safetensors")
encoders = [folder for tokenizer in ("spm.model", "tokenizer.json")
            for folder in folders_with("config.json", "model.safetensors", tokenizer)
            if project not in folder.parents and folder not in trained]
unusable = [folder for folder in folders_with("pytorch_model.bin") if folder not in encoders]
assert trained or REHEARSAL or encoders or not unusable, (
    f"{unusable[0]} has pytorch_model.bin and cannot be used as it is: put config.json, spm.model and that file into "
    "weights/deberta-v3-small, run `make weights`, and attach the model.safetensors that it writes")
assert trained or REHEARSAL or encoders, (
    f"no encoder below {INPUT}: attach a dataset with config.json, model.safetensors and spm.model, or set "
    "REHEARSAL = True to train the small one that comes with the project")
encoder = project / "weights" / "minipref-tiny" if REHEARSAL else encoders[0] if encoders else None
print(f"project  {project}\nrows     {rows}")
print(f"model    {', '.join(map(str, trained)) or f'to be trained from {encoder}, {PROCESSES} processes'}")

WORK.mkdir(parents=True, exist_ok=True)
os.chdir(WORK)
sys.path.insert(0, str(project))

# %% [markdown]
# ## A look at the rows
#
# Each text cell is a JSON list of turns. Of the three winner columns one is 1.

# %%
import pandas as pd

frame = pd.read_csv(rows / "train.csv", dtype={"id": str})
print(f"{len(frame):,} rows")
print(frame[["winner_model_a", "winner_model_b", "winner_tie"]].mean().round(3).to_string())
print(f"answer A of the first row: {frame['response_a'].iloc[0][:200]}")

# %% [markdown]
# ## Training
#
# The same as `python train.py --train ... --encoder ... --run run`. It logs its inputs, then each hyperparameter with
# its source; after twenty steps, an estimate of the remaining time (with `--folds`, of the fold). The best
# model so far is always in `run/model`, or in `run/fold-1/model` and so on with `--folds`; the scores are also in
# `run/report.html`.

# %%
if not trained:
    program("train", "--train", str(rows / "train.csv"), "--encoder", str(encoder), "--run", "run", *TRAIN_OPTIONS)
    trained = sorted(Path("run").glob("fold-*/model")) or [Path("run/model")]

# %% [markdown]
# ## Prediction
#
# Every pair is predicted in both orders, and the two predictions are averaged, as are those of all folds' models.
# `--no-swap-average` halves the time, for a worse score.

# %%
program("predict", str(rows / "test.csv"), "--model", *map(str, trained), "--output", "submission.csv")
print(pd.read_csv("submission.csv", dtype={"id": str}).head().to_string(index=False))

# %% [markdown]
# ## One pair, explained
#
# Token attributions for the prediction, and what the heads attend to. `explain.html` among the notebook's outputs can
# be opened on its own.

# %%
from minipref.explain.__main__ import main as explain

assert explain([str(rows / "test.csv"), "--row", "1", "--model", str(trained[0]), "--output", "explain.html"]) == 0
