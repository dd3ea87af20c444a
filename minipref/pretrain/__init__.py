"""Pretraining from scratch: replaced-token detection with gradient-disentangled embedding sharing (GDES).

The files in reading order:

    objective.py     v3's objective: generator, discriminator, shared word embeddings, the two losses
    corpus.py        text to documents, token ids and packed windows
    evaluation.py    held-out metrics and their baselines
    loop.py          the run: forward, backward, clip, schedule, step
    vocabulary.py    a Unigram vocabulary trained on the corpus
    __main__.py      the options

    python -m minipref.pretrain --corpus CORPUS [CORPUS ...] --output runs/pretrain
    python -m minipref.pretrain --corpus CORPUS --encoder weights/minipref-tiny      start from a trained encoder
    python -m minipref.pretrain --resume --output runs/pretrain                      resume a stopped run
"""

import minipref.threads  # noqa: F401 - before torch
from minipref.pretrain.corpus import Corpus, PackedWindows, load_corpus, read_corpus
from minipref.pretrain.evaluation import evaluate
from minipref.pretrain.loop import export_encoder, pretrain
from minipref.pretrain.objective import Pretraining

__all__ = ["Corpus", "PackedWindows", "Pretraining", "evaluate", "export_encoder", "load_corpus", "pretrain",
           "read_corpus"]
