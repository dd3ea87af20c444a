"""A very small encoder with the bundled tokenizer, and training rows, for runs of seconds."""

import random
from pathlib import Path

import torch

from minipref.checkpoint import encoder_tensors, load_classifier, write_checkpoint
from minipref.config import EncoderConfig
from minipref.model import Encoder, init_weights
from minipref.predictor import Judge
from minipref.tokenizer import load_tokenizer

BUNDLED = Path(__file__).resolve().parents[1] / "weights" / "minipref-tiny"


def write_judge(folder: Path, surface=None) -> Path:
    """A small classifier with large weights in `folder`, saved as train.py saves one."""
    write_encoder(folder, dropout=0.0)
    model = load_classifier(folder)
    torch.manual_seed(3)
    init_weights(model, 0.3)
    Judge(model, load_tokenizer(folder), 96, temperature=1.5, surface=surface).save(folder, replace=True)
    return folder


def write_encoder(folder: Path, dropout: float = 0.1, seed: int = 0) -> Path:
    """Write a random encoder with 32 hidden units in the Hugging Face layout, with the bundled encoder's tokenizer."""
    tokenizer = load_tokenizer(BUNDLED)
    config = EncoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_attention_heads=2,
                           num_hidden_layers=2, intermediate_size=64, position_buckets=16, max_distance=64,
                           hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    torch.manual_seed(seed)
    encoder = Encoder(config)
    init_weights(encoder, 0.1)
    write_checkpoint(encoder_tensors(encoder), config.to_json(), folder)
    tokenizer.save(folder)
    return folder


def write_rows(path: Path, rows: int, seed: int = 0, labels: bool = True) -> Path:
    """Write a CSV with a rule that a small model learns quickly: 'yes' wins against 'no', equal answers are a tie."""
    draw = random.Random(seed)
    lines = ["id,prompt,response_a,response_b" + (",winner_model_a,winner_model_b,winner_tie" if labels else "")]
    for n in range(rows):
        a, b = (draw.choice(("yes", "no")) for _ in "ab")
        label = "0,0,1" if a == b else "1,0,0" if a == "yes" else "0,1,0"
        filler = [" ".join(draw.choice(("the", "house", "is", "red", "and", "old")) for _ in range(3)) for _ in "pab"]
        lines.append(f'{n}{draw.randrange(10**6):06},"[""{n} {filler[0]}""]","[""{a} {filler[1]}""]",'
                     f'"[""{b} {filler[2]}""]"' + (f",{label}" if labels else ""))
    path.write_text("\n".join(lines) + "\n")
    return path
