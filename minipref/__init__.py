"""minipref: DeBERTa-v3 from scratch in PyTorch, applied to predicting human preferences.

The files in the order in which they are best read:

    model.py         the whole model: buckets, attention, encoder, classifier
    config.py        its configuration, and what makes it v3
    checkpoint.py    the published file format, as a table of names
    tokenizer.py     text to ids;  sentencepiece_model.py  the vocabulary's file
    data.py          a row to a padded batch;  layouts.py  the files in which people keep rows
    recipes.py       hyperparameters and their sources
    optim.py         AdamW, the learning-rate schedule, clipping
    ../train.py      options, data, model, loop, report
    metrics.py       scores, baselines, calibration;  surface.py  what can be counted, and its blend with the model
    predictor.py     a trained model in use;  ../predict.py  the submission

Side rooms, each of which can be skipped:

    fast/            the same numbers, sooner: `accelerate(model)`
    auxiliary.py     a second head that helps a small encoder to train
    run/             state on disk, resume, signals, several processes, the report
    pretrain/        how such an encoder is pretrained: replaced-token detection
    explain/         what a head attends to, and token attributions for a prediction
    synthetic/       the synthetic dataset
    hub.py           fetches weights and data
    runtime.py       what every command shares: errors, devices, atomic files
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
