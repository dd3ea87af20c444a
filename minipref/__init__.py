"""minipref: DeBERTa-v3 written out by hand in PyTorch, and put to predicting human preference.

In the order in which it is best read:

    positions.py     from a distance to a row of the relative table
    attention.py     disentangled attention: the definition, then the module
    encoder.py       embeddings, layers
    classifier.py    [CLS] to three logits
    checkpoint.py    the published file format, as a table of names
    config.py        what makes it v3; the training recipes
    data.py          a CSV row to a padded batch
    optim.py         AdamW, the schedule, clipping
    ../train.py      the loop
    metrics.py       what the score means;  report.py  what is said of it
    judge.py         a trained model in use;  ../predict.py  the submission
    explain.py       what a head attends to, what moved a decision;  plots.py  a run's page
    pretrain.py      how such an encoder is made: replaced-token detection

and beside the path: fused.py (the attention again, fast), lean.py (the other steps, lean), tokenizer.py, runs.py (state
that survives), sample.py (the generated task), hub.py (fetching), distributed.py (several processes), files.py and
errors.py.
"""

__version__ = "0.1.0"      # a run goes on only with the version that began it

from minipref.attention import attention_by_definition
from minipref.checkpoint import load_classifier, load_encoder, save_classifier
from minipref.judge import load_judge
from minipref.metrics import evaluate
from minipref.optim import AdamW, cosine_with_warmup
from minipref.positions import log_bucket
from minipref.tokenizer import load_tokenizer

__all__ = ["AdamW", "attention_by_definition", "cosine_with_warmup", "evaluate", "load_classifier", "load_encoder",
           "load_judge", "load_tokenizer", "log_bucket", "save_classifier"]
