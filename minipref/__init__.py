"""minipref: DeBERTa-v3 from scratch in PyTorch, applied to predicting human preferences.

The files in reading order:

    model.py         the whole model: buckets, attention, encoder, classifier
    config.py        its configuration, and the facts that define v3
    checkpoint.py    the published file format, as a table of names
    tokenizer.py     text to ids;  sentencepiece_model.py  the vocabulary's file
    data.py          rows to padded batches;  layouts.py  CSV, JSON lines and Parquet files
    recipes.py       hyperparameters and their sources
    optim.py         AdamW, the learning-rate schedule, clipping
    ../train.py      options, data, model, loop, report
    metrics.py       scores, baselines, calibration;  surface.py  a regression on length and layout, for the blend
    predictor.py     a trained model in use;  ../predict.py  the submission

Optional reading:

    fast/            the same numbers in less time: `accelerate(model)`
    auxiliary.py     a second head that helps to train a small encoder
    run/             state on disk, resume, signals, several processes, the report
    pretrain/        pretraining by replaced-token detection
    explain/         attention scores and token attributions for a prediction
    synthetic/       the synthetic dataset
    hub.py           fetches weights and data
    runtime.py       shared by all commands: errors, devices, atomic files
"""

__version__ = "0.2.0"      # a run resumes only with the version that began it

from minipref.checkpoint import load_classifier, load_encoder, save_classifier
from minipref.fast import accelerate
from minipref.metrics import evaluate
from minipref.model import attention_by_definition, log_bucket
from minipref.optim import AdamW, cosine_with_warmup
from minipref.predictor import load_judge
from minipref.tokenizer import load_tokenizer

__all__ = ["AdamW", "accelerate", "attention_by_definition", "cosine_with_warmup", "evaluate", "load_classifier",
           "load_encoder", "load_judge", "load_tokenizer", "log_bucket", "save_classifier"]
