"""minipref: DeBERTa-v3 written out by hand in PyTorch, and put to predicting human preference."""

from minipref.attention import attention_by_definition
from minipref.checkpoint import load_classifier, load_encoder, save_classifier
from minipref.positions import log_bucket

__all__ = ["attention_by_definition", "load_classifier", "load_encoder", "log_bucket", "save_classifier"]
