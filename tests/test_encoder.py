"""Encoder and classifier: against a definition in elementary arithmetic, and property by property."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SMALL,
    gradients,
    large_model,
    layers_by_definition,
    logits_by_definition,
    padded_batch,
    projection,
    relative,
    resized,
    worst_gradient,
)
from torch import nn

from minipref.auxiliary import AuxiliaryHead, ModelWithAuxiliaryHead, aux_loss, segment_ids
from minipref.config import EncoderConfig
from minipref.fast import checkpoint_activations
from minipref.model import Encoder, PreferenceModel, init_weights

TINY = resized(SMALL, hidden_size=12, num_attention_heads=2, intermediate_size=20)


@pytest.fixture(scope="module")
def tiny():
    """A model in float64, a padded batch, and every layer by definition."""
    model = large_model(TINY, seed=3, dtype=torch.float64)
    ids, attention_mask = padded_batch(TINY, [15, 8], seed=3)
    return model, ids, attention_mask, layers_by_definition(model, ids, attention_mask)


def test_embeddings_are_normalised_words_with_padding_zeroed(tiny):
    model, ids, attention_mask, wanted = tiny
    embeddings = model.encoder.embed(ids, attention_mask)
    assert relative(embeddings, wanted[0]) < 1e-13
    assert (embeddings[~attention_mask] == 0).all()


def test_every_layer_is_the_definition(tiny, form):
    model, ids, attention_mask, wanted = tiny
    model = form(model)
    outputs = list(model.encoder.hidden_states(ids, attention_mask))
    assert len(outputs) == TINY.num_hidden_layers + 1
    for number, (found, output) in enumerate(zip(outputs, wanted)):
        assert relative(found[attention_mask], output[attention_mask]) < 1e-13, f"layer {number}"


def test_without_gradients_every_layer_is_the_same(tiny, form):
    model, ids, attention_mask, wanted = tiny
    model = form(model)
    with torch.inference_mode():
        outputs = list(model.encoder.hidden_states(ids, attention_mask))
    for number, (found, output) in enumerate(zip(outputs, wanted)):
        assert relative(found[attention_mask], output[attention_mask]) < 1e-13, f"layer {number}"


def test_without_gradients_a_long_batch_is_the_same():
    model = large_model(TINY, dtype=torch.float64)
    ids, attention_mask = padded_batch(TINY, [700, 523])
    wanted, logits = model.encoder(ids, attention_mask), model(ids, attention_mask)
    with torch.no_grad():
        assert relative(model.encoder(ids, attention_mask)[attention_mask], wanted[attention_mask]) < 1e-13
        assert relative(model(ids, attention_mask), logits) < 1e-13


def test_encoder_gives_the_last_layers_output(tiny):
    model, ids, attention_mask, wanted = tiny
    assert relative(model.encoder(ids, attention_mask)[attention_mask], wanted[-1][attention_mask]) < 1e-13


def test_every_gradient_is_the_definitions(tiny, form):
    model, ids, attention_mask, _ = tiny
    model = form(model)
    model.zero_grad()
    projection(layers_by_definition(model, ids, attention_mask), attention_mask).backward()
    wanted = {name: g.clone() for name, g in gradients(model.encoder).items()}
    model.zero_grad()
    projection(model.encoder.hidden_states(ids, attention_mask), attention_mask).backward()
    wanted["word_embeddings.weight"][TINY.pad_token_id] = 0           # padding's row is never trained
    worst, name = worst_gradient(gradients(model.encoder), wanted)
    assert worst < 1e-11, name


def test_a_padding_id_among_real_tokens_is_not_trained(tiny):
    model, ids, attention_mask, _ = tiny
    ids = ids.clone()
    ids[0, 3] = TINY.pad_token_id                          # as transformers: it has no gradient wherever it stands
    model.zero_grad()
    projection(model.encoder.hidden_states(ids, attention_mask), attention_mask).backward()
    gradient = model.encoder.word_embeddings.weight.grad
    assert (gradient[TINY.pad_token_id] == 0).all()
    assert (gradient[ids[0, 4]] != 0).any()


def test_classifier_reads_cls_through_pooler_gelu_and_head(tiny, form):
    model, ids, attention_mask, _ = tiny
    model = form(model)
    assert relative(model(ids, attention_mask), logits_by_definition(model, ids, attention_mask)) < 1e-13


# [CLS] p p [SEP] a a a [SEP] b [SEP], and a shorter pair without a prompt, padded.
PAIRS = torch.tensor([[1, 9, 8, 2, 7, 6, 5, 2, 4, 2], [1, 2, 7, 2, 6, 2, 0, 0, 0, 0]])
SEGMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]])


def test_every_token_is_of_the_prompt_of_a_of_b_or_of_nothing():
    assert torch.equal(segment_ids(PAIRS, sep_id=2), SEGMENTS)


def opinionated(head):
    """The head with random weights; its initial weights are 0."""
    assert not head.linear.weight.any() and not head.linear.bias.any()
    init_weights(head, 1.0)
    nn.init.normal_(head.linear.bias)
    return head.double()


def test_the_auxiliary_head_reads_the_means_of_the_segments():
    head = opinionated(AuxiliaryHead(TINY))
    x = torch.randn(2, 10, TINY.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for logits, vectors, fields in zip(head(x, SEGMENTS), x, SEGMENTS):
        means = [vectors[fields == k].mean(0) for k in range(3)]
        assert relative(logits, head.linear.weight @ torch.cat(means) + head.linear.bias) < 1e-14


def test_a_long_segment_does_not_overflow_the_auxiliary_head_in_float16():
    head, field = opinionated(AuxiliaryHead(TINY)).float(), torch.tensor([[0] * 2000 + [1] * 40 + [2] * 8])
    x = torch.full((1, field.shape[1], TINY.hidden_size), 40.0)          # 2,000 of them are above float16's 65,504
    with torch.autocast("cpu", torch.float16):
        logits = head(x, field)
    assert logits.dtype == torch.float16 and relative(logits.float(), head(x, field)) < 1e-2


def test_a_model_with_an_auxiliary_head_gives_its_own_logits_and_the_heads_of_what_the_last_layer_reads(form):
    model = form(large_model(TINY, seed=3, dtype=torch.float64))
    both = ModelWithAuxiliaryHead(model, sep_id=2).double()
    opinionated(both.auxiliary_head)
    attention_mask = PAIRS != 0
    logits, aux_logits = both(PAIRS, attention_mask)
    assert relative(logits, model(PAIRS, attention_mask)) < 1e-13
    before_the_last = list(model.encoder.hidden_states(PAIRS, attention_mask))[-2]
    assert relative(aux_logits, both.auxiliary_head(before_the_last, SEGMENTS)) < 1e-13
    aux_logits.sum().backward()
    assert all(p.grad is None for p in model.encoder.layers[-1].parameters()) and model.classifier.weight.grad is None
    assert model.encoder.layers[-2].ff_out.weight.grad.abs().sum() > 0


def test_the_model_learns_from_the_auxiliary_head_and_that_from_the_labels():
    generator = torch.Generator().manual_seed(4)
    logits, aux_logits = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    logits.requires_grad_(), aux_logits.requires_grad_()
    labels = torch.tensor([2, 0])
    loss = aux_loss(logits, aux_logits, labels)
    said, lesson = (torch.softmax(z, dim=-1).detach() for z in (logits, aux_logits))
    by_hand = sum((q * (q / p).log()).sum() - q[label].log() for p, q, label in zip(said, lesson, labels))
    assert abs(loss.item() - by_hand.item()) < 1e-6                            # the loss is a float32
    loss.backward()
    assert torch.allclose(logits.grad, said - lesson, atol=1e-6)             # towards the auxiliary head, not the label
    assert torch.allclose(aux_logits.grad, lesson - F.one_hot(labels, 3), atol=1e-6)     # the label alone


def test_every_gradient_of_the_classifiers_loss_is_the_definitions(tiny, form):
    model, ids, attention_mask, _ = tiny
    model = form(model)
    labels = torch.tensor([2, 0])
    model.zero_grad()
    F.cross_entropy(logits_by_definition(model, ids, attention_mask), labels).backward()
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    F.cross_entropy(model(ids, attention_mask), labels).backward()
    worst, name = worst_gradient(gradients(model), wanted)
    assert worst < 1e-11, name


def test_words_of_padding_change_nothing(tiny, form):
    model, ids, attention_mask, _ = tiny
    model = form(model)
    other = ids.masked_fill(~attention_mask, 37)
    for found, wanted in zip(*(model.encoder.hidden_states(words, attention_mask) for words in (other, ids))):
        assert torch.equal(found[attention_mask], wanted[attention_mask])
    assert torch.equal(model(other, attention_mask), model(ids, attention_mask))


def test_longer_padding_and_company_change_nothing(tiny, form):
    model, ids, attention_mask, _ = tiny
    model = form(model)
    alone, alone_is_token = ids[1:, :8], attention_mask[1:, :8]
    padded = F.pad(ids[1:], (0, 9))
    padded_is_token = F.pad(attention_mask[1:], (0, 9))
    wanted = model.encoder(alone, alone_is_token)
    assert relative(model.encoder(ids, attention_mask)[1:, :8], wanted) < 1e-13
    assert relative(model.encoder(padded, padded_is_token)[:, :8], wanted) < 1e-13
    assert relative(model(padded, padded_is_token), model(alone, alone_is_token)) < 1e-13


def test_order_matters_and_only_through_the_relative_table(tiny):
    model, ids, attention_mask, _ = tiny
    backwards = torch.cat([ids[:1, :1], ids[:1, 1:].flip(1)], dim=1)
    assert relative(model(backwards, attention_mask[:1]), model(ids[:1], attention_mask[:1])) > 0.01
    flat = copy.deepcopy(model)
    table = flat.encoder.rel_embeddings.weight.data
    table[:] = table[0]                                                        # every distance looks the same
    assert relative(flat(backwards, attention_mask[:1]), flat(ids[:1], attention_mask[:1])) < 1e-12


def test_checkpointed_activations_change_neither_values_nor_gradients(tiny, form):
    model, ids, attention_mask, _ = tiny
    results = []
    for checkpointed in (False, True):
        model = form(tiny[0])
        if checkpointed:
            checkpoint_activations(model)
        loss = projection(model.encoder.hidden_states(ids, attention_mask), attention_mask)
        loss = loss + F.cross_entropy(model(ids, attention_mask), torch.tensor([0, 1]))
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (wanted_loss, wanted), (loss, checkpointed) = results
    assert torch.equal(wanted_loss, loss)
    assert worst_gradient(checkpointed, wanted)[0] < 1e-13


def test_checkpointed_activations_are_not_kept():
    kept = []
    for checkpointed in (False, True):
        model, sizes = large_model(TINY), []
        if checkpointed:
            checkpoint_activations(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1],
                                                      lambda x: x):
            model(*padded_batch(TINY, [15, 8]))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_checkpointed_activations_repeat_their_dropout(form):
    config = resized(TINY, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    plain = large_model(config, dtype=torch.float64).train()
    ids, attention_mask = padded_batch(TINY, [15, 8])
    found = []
    for checkpointed in (False, True):
        model = form(plain)
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(5)
        projection(model.encoder.hidden_states(ids, attention_mask), attention_mask).backward()
        found.append(gradients(model))
    assert worst_gradient(found[1], found[0])[0] < 1e-12


def test_dropout_rates_are_the_configurations():
    config = resized(TINY, hidden_dropout_prob=0.11, attention_probs_dropout_prob=0.22, pooler_dropout=0.33,
                     cls_dropout=0.44)
    model = PreferenceModel(config)
    assert model.encoder.dropout.p == 0.11
    assert model.pooler_dropout.p == 0.33
    assert model.classifier_dropout.p == 0.44
    for layer in model.encoder.layers:
        assert layer.dropout.p == layer.attention.rel_dropout.p == 0.11
        assert layer.attention.attn_dropout.p == 0.22


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    model = large_model(resized(TINY, hidden_dropout_prob=0.5), dtype=torch.float64)
    ids, attention_mask = padded_batch(TINY, [15, 8])
    still = model.encoder.embed(ids, attention_mask)
    assert torch.equal(model(ids, attention_mask), model(ids, attention_mask))
    torch.manual_seed(0)
    model.train()
    draws = torch.stack([model.encoder.embed(ids, attention_mask) for _ in range(400)])
    assert 0.45 < (draws[:, attention_mask] == 0).double().mean() < 0.55
    assert relative(draws.mean(0), still) < 0.25
    assert not torch.equal(model(ids, attention_mask), model(ids, attention_mask))


def test_attention_drops_out_in_training_only(form):
    config = resized(TINY, attention_probs_dropout_prob=0.4)
    model, still = form(large_model(config, dtype=torch.float64)), large_model(TINY, dtype=torch.float64)
    ids, attention_mask = padded_batch(config, [15, 8])
    for forward, wanted in ((model, still), (model.encoder, still.encoder)):       # [CLS] alone, and every token
        model.eval()
        assert relative(forward(ids, attention_mask), wanted(ids, attention_mask)) < 1e-12
        model.train()
        assert relative(forward(ids, attention_mask), wanted(ids, attention_mask)) > 0.01
        assert not torch.equal(forward(ids, attention_mask), forward(ids, attention_mask))


def test_an_id_outside_the_vocabulary_is_an_index_error():
    model = large_model(TINY)
    for wrong in (TINY.vocab_size, -1):
        with pytest.raises(IndexError):
            model(torch.tensor([[1, wrong]]), torch.ones(1, 2, dtype=torch.bool))


def test_fresh_weights_are_debertas():
    torch.manual_seed(0)
    model = PreferenceModel(resized(SMALL, hidden_size=120, vocab_size=300))
    init_weights(model, std=0.05)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear | nn.Embedding):
            assert module.weight.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(module.weight.mean().item()) < 0.01, name
    assert (model.encoder.word_embeddings.weight[SMALL.pad_token_id] == 0).all()
    assert (model.encoder.rel_embeddings.weight[0] != 0).any()


def test_normalisation_uses_the_configured_epsilon():
    # Word vectors of the size of sqrt(eps): an epsilon a hundred times larger would shrink them visibly.
    for eps in (1e-7, 1e-5):
        encoder = Encoder(resized(TINY, layer_norm_eps=eps)).double()
        with torch.no_grad():
            encoder.word_embeddings.weight.copy_(math.sqrt(eps) * encoder.word_embeddings.weight)
        ids, attention_mask = padded_batch(TINY, [9])
        words = encoder.word_embeddings.weight[ids]
        centred = words - words.mean(-1, keepdim=True)
        wanted = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        assert relative(encoder.eval().embed(ids, attention_mask), wanted) < 1e-12


def test_norms_all_have_the_configured_epsilon():
    model = PreferenceModel(resized(TINY, layer_norm_eps=3e-6))
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 + 2 * TINY.num_hidden_layers
    assert all(norm.eps == 3e-6 for norm in norms)


def test_the_parameters_of_v3_small_are_counted_right():
    with torch.device("meta"):
        model = PreferenceModel(EncoderConfig())
    count = sum(p.numel() for p in model.parameters())
    assert count == 141_897_219
    assert model.encoder.word_embeddings.weight.numel() / count == pytest.approx(0.693, abs=5e-4)
    assert len(list(model.encoder.parameters())) == 102
