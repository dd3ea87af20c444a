"""Shared by the tests: sizes, weights, batches, error measures, and the transformers reference.

The weights are large on purpose. With DeBERTa's N(0, 0.02) attention is nearly uniform, and a wrong sign changes the
output by less than a thousandth. With 1.6 / sqrt(D) the softmaxes are peaked, and the same mistake changes it by 2.
With even larger weights, saturated softmaxes amplify float32 rounding too much for a comparison.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipref.checkpoint import HEAD_NAMES, encoder_tensors
from minipref.config import EncoderConfig
from minipref.model import PreferenceModel, attention_by_definition

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0,
              "cls_dropout": 0.0}

# Small enough for tests of seconds; position_buckets is so small that 20 tokens reach the logarithmic buckets. With
# d = 12 the scale sqrt(3 d) is 6, exact in every precision.
SMALL = EncoderConfig(vocab_size=60, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40,
                      position_buckets=8, max_distance=24,
                      layer_norm_eps=1e-7, **NO_DROPOUT)
# v3-small with a small vocabulary, which only changes the size of the embedding table.
V3_SMALL = EncoderConfig(vocab_size=500, **NO_DROPOUT)


def large_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all parameters: matrices, embeddings, biases N(0, 1.6 / sqrt(D)), norms around 1 and 0. Returns `module`."""
    generator = torch.Generator().manual_seed(seed)
    std = 1.6 / math.sqrt(module.config.hidden_size)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if isinstance(part, nn.LayerNorm):
                    parameter.copy_(0.2 * noise + (1 if name == "weight" else 0))
                else:
                    parameter.copy_(std * noise)
    return module


def large_model(config: EncoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreferenceModel:
    """A `PreferenceModel` with large weights, in eval mode."""
    return large_weights(PreferenceModel(config).to(dtype), seed).eval()


def padded_batch(config: EncoderConfig, lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input_ids that begin with 1 for [CLS], one row per length, padded, and their attention_mask.

    Shapes: -> (B, L), (B, L).
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(4, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    input_ids[:, 0] = 1
    attention_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return input_ids.masked_fill(~attention_mask, config.pad_token_id), attention_mask


def relative(found: Tensor, wanted: Tensor, at_least: float = 0.0) -> float:
    """The largest difference divided by the largest wanted entry (or by `at_least`, if that is larger).

    0 if both are zero; infinity for NaN or infinity on either side.
    """
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    found, wanted = found.detach().double(), wanted.detach().double()
    difference = (found - wanted).abs().max().item()
    if difference == 0:
        return 0.0
    size = max(wanted.abs().max().item(), at_least)
    return difference / size if math.isfinite(difference) and size > 0 else math.inf


def worst_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of all gradients, and its parameter. Errors are relative to the tensor's largest entry
    or to a thousandth of the model's, if that is larger (the gradient of a key bias cancels to rounding noise)."""
    assert found.keys() == wanted.keys(), f"not in both: {sorted(found.keys() ^ wanted.keys())}"
    floor = max(gradient.abs().max().item() for gradient in wanted.values()) / 1000
    return max((relative(found[name], wanted[name], at_least=floor), name) for name in wanted)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; zeros for a parameter without gradient."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


def projection(outputs: Iterator[Tensor] | list[Tensor], attention_mask: Tensor, seed: int = 0) -> Tensor:
    """A random linear combination of all entries of all outputs, without those at padding."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        total = total + (weights * output)[attention_mask].sum()
    return total


def reference_config(config: EncoderConfig):
    """The same sizes as a transformers `DebertaV2Config`."""
    from transformers import DebertaV2Config
    return DebertaV2Config(**{key: value for key, value in config.to_json().items() if key != "architectures"})


def reference_model(model: PreferenceModel):
    """transformers' `DebertaV2ForSequenceClassification` with `model`'s sizes, weights, precision and mode."""
    from transformers import DebertaV2ForSequenceClassification
    reference = DebertaV2ForSequenceClassification(reference_config(model.config))
    reference = reference.to(next(model.parameters()).dtype)
    reference.load_state_dict(reference_names(model))
    return reference.train(model.training)


@contextlib.contextmanager
def reference_scale_in_float64() -> Iterator[None]:
    """transformers always rounds sqrt(3 d) to float32; within this block it does not."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs
    rounded = theirs.scaled_size_sqrt
    theirs.scaled_size_sqrt = lambda query, factor: torch.tensor(math.sqrt(query.shape[-1] * factor), dtype=query.dtype)
    try:
        yield
    finally:
        theirs.scaled_size_sqrt = rounded


@contextlib.contextmanager
def reference_distance_clamped() -> Iterator[None]:
    """transformers does not clamp distances before the bucket formula; within this block it does."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs
    unclamped = theirs.make_log_bucket_position
    theirs.make_log_bucket_position = lambda distance, span, max_distance: unclamped(
        distance.clamp(1 - max_distance, max_distance - 1), span, max_distance)
    try:
        yield
    finally:
        theirs.make_log_bucket_position = unclamped


def reference_names(model: PreferenceModel) -> dict[str, Tensor]:
    """The model's parameters by transformers' names."""
    head = {f"{theirs}.{kind}": model.get_parameter(f"{ours}.{kind}")
            for ours, theirs in HEAD_NAMES.items() for kind in ("weight", "bias")}
    return encoder_tensors(model.encoder) | head


def gradients_by_reference_name(model: PreferenceModel) -> dict[str, Tensor]:
    """`gradients` by transformers' names."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in reference_names(model).items()}


def resized(config: EncoderConfig, **changes) -> EncoderConfig:
    """`config` with some sizes changed."""
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(repr=False)
class Outcome:
    """The results of a model for a batch that are compared."""

    layers: list[Tensor]                  # embeddings and every layer's output, (B, L, D)
    logits: Tensor
    loss: Tensor
    loss_gradients: dict[str, Tensor]     # of the classifier's loss
    all_gradients: dict[str, Tensor]      # of a projection of every layer's output


def our_outcome(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Outcome:
    model.zero_grad()
    logits = model(input_ids, attention_mask)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    loss_gradients = {name: g.clone() for name, g in gradients_by_reference_name(model).items()}
    model.zero_grad()
    layers = list(model.encoder.hidden_states(input_ids, attention_mask))
    projection(layers, attention_mask).backward()
    return Outcome([x.detach() for x in layers], logits.detach(), loss.detach(), loss_gradients,
                   gradients_by_reference_name(model))


def their_outcome(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Outcome:
    """The same for transformers' model with `model`'s weights."""
    reference = reference_model(model)
    out = reference(input_ids, attention_mask=attention_mask.long(), labels=labels, output_hidden_states=True)
    out.loss.backward(retain_graph=True)
    loss_gradients = {name: g.clone() for name, g in gradients(reference).items()}
    reference.zero_grad()
    projection(out.hidden_states, attention_mask).backward()
    return Outcome([x.detach() for x in out.hidden_states], out.logits.detach(), out.loss.detach(), loss_gradients,
                   gradients(reference))


def layers_by_definition(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """`Encoder.hidden_states` from the model's parameters, `attention_by_definition` and elementary arithmetic."""
    config, encoder = model.config, model.encoder
    H = config.num_attention_heads
    x = norm_by_definition(encoder.word_norm, encoder.word_embeddings.weight[input_ids]) * attention_mask[..., None]
    rel = norm_by_definition(encoder.rel_norm, encoder.rel_embeddings.weight)
    outputs = [x]
    for layer in encoder.layers:
        attention = layer.attention
        q, k, v = (heads(linear(projection, x), H) for projection in
                   (attention.q_proj, attention.k_proj, attention.v_proj))
        pos_q, pos_k = heads(linear(attention.q_proj, rel), H), heads(linear(attention.k_proj, rel), H)
        mixed = attention_by_definition(q, k, v, pos_q, pos_k, attention_mask, config.position_buckets,
                                        config.max_distance)
        mixed = torch.cat([mixed[:, h] for h in range(H)], dim=-1)
        x = norm_by_definition(layer.attn_norm, x + linear(attention.out_proj, mixed))
        hidden = gelu_by_definition(linear(layer.ff_in, x))
        x = norm_by_definition(layer.ff_norm, x + linear(layer.ff_out, hidden))
        outputs.append(x)
    return outputs


def logits_by_definition(model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The classifier's logits, likewise."""
    cls = layers_by_definition(model, input_ids, attention_mask)[-1][:, 0]
    return linear(model.classifier, gelu_by_definition(linear(model.pooler, cls)))


def linear(projection: nn.Linear, x: Tensor) -> Tensor:
    return x @ projection.weight.T + projection.bias


def heads(x: Tensor, H: int) -> Tensor:
    """(..., L, D) -> (..., H, L, d): head h takes the columns h * d to (h + 1) * d."""
    d = x.shape[-1] // H
    return torch.stack([x[..., h * d:(h + 1) * d] for h in range(H)], dim=-3)


def norm_by_definition(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu_by_definition(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2
