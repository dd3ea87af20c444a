"""Make the golden tensors: what transformers computes, kept so that the proof runs without transformers.

    python tests/golden/make_golden.py            needs requirements-dev.txt; writes *.safetensors beside this file

Each file is one small random `DebertaV2ForSequenceClassification` in float64 with all that `tests/test_golden.py`
compares: `weight.*` and `loss_gradient.*` and `all_gradient.*` under transformers' names, `ids`, `is_token`, `labels`,
`layer.0` (embeddings) to `layer.N`, `logits`, `loss`. The configuration is in the file's metadata. Nothing of minipref
is used here. Heads are 12 wide: the scale sqrt(3 * 12) is 6, which transformers' rounding of it to float32 leaves as it
is.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

HERE = Path(__file__).resolve().parent
V3 = {"relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"],
      "position_biased_input": False, "type_vocab_size": 0, "hidden_act": "gelu", "pooler_hidden_act": "gelu",
      "layer_norm_eps": 1e-7, "pad_token_id": 0, "num_labels": 3, "hidden_dropout_prob": 0.0,
      "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0, "problem_type": "single_label_classification"}
CASES = {
    # A span so small that 24 tokens reach the last bucket, padding, two heads, two layers.
    "small_span": ({"vocab_size": 30, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2,
                    "intermediate_size": 36, "position_buckets": 8, "max_relative_positions": 24,
                    "max_position_embeddings": 24}, [24, 17, 1]),
    # v3's own span and distances over 300 tokens, deep into the logarithmic buckets.
    "v3_span": ({"vocab_size": 30, "hidden_size": 12, "num_attention_heads": 1, "num_hidden_layers": 2,
                 "intermediate_size": 20, "position_buckets": 256, "max_relative_positions": 512,
                 "max_position_embeddings": 512}, [300]),
}


def draw_weights(model: nn.Module, width: int, generator: torch.Generator) -> None:
    """N(0, 1.6 / sqrt(D)), and norms around 1 and 0: large enough that a wrong sign in attention moves the output."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "LayerNorm" in name:
            noise = 0.2 * noise + (1 if name.endswith("weight") else 0)
        else:
            noise = noise * 1.6 / width**0.5
        parameter.data.copy_(noise)


def make(name: str, sizes: dict, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    config = DebertaV2Config(**sizes, **V3)
    model = DebertaV2ForSequenceClassification(config).double().eval()
    draw_weights(model, config.hidden_size, generator)
    ids = torch.randint(1, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    is_token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = ids * is_token
    labels = torch.arange(len(lengths)) % 3

    out = model(ids, attention_mask=is_token.long(), labels=labels, output_hidden_states=True)
    out.loss.backward(retain_graph=True)
    golden = {f"loss_gradient.{n}": p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    # Every entry of every layer at a real token, each with a weight of its own that needs no generator to make again.
    total = sum((torch.cos(torch.arange(h.numel(), dtype=h.dtype)).view_as(h) * h)[is_token].sum()
                for h in out.hidden_states)
    total.backward()
    golden |= {f"all_gradient.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    golden |= {f"weight.{n}": p.detach() for n, p in model.named_parameters()}
    golden |= {f"layer.{i}": h.detach() for i, h in enumerate(out.hidden_states)}
    golden |= {"ids": ids, "is_token": is_token, "labels": labels, "logits": out.logits.detach(),
               "loss": out.loss.detach()}
    path = HERE / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in golden.items()}, path,
              metadata={"config": json.dumps(sizes | V3 | {"model_type": "deberta-v2"}, sort_keys=True),
                        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    path.chmod(0o644)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for name, (sizes, lengths) in CASES.items():
        make(name, sizes, lengths)
