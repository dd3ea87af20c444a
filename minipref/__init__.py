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
    threads.py       how CPU threads wait for each other
    runtime.py       shared by all commands: errors, devices, atomic files
"""

__version__ = "0.2.0"      # a run resumes only with the version that began it

from importlib import import_module

_PUBLIC = {"AdamW": "optim", "accelerate": "fast", "attention_by_definition": "model", "cosine_with_warmup": "optim",
           "evaluate": "metrics", "load_classifier": "checkpoint", "load_encoder": "checkpoint",
           "load_judge": "predictor", "load_tokenizer": "tokenizer", "log_bucket": "model",
           "save_classifier": "checkpoint"}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Import a public name when it is used: `minipref.threads` has to come before torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minipref' has no attribute {name!r}")
    return getattr(import_module(f"minipref.{_PUBLIC[name]}"), name)
