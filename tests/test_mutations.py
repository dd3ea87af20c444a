"""Deliberate mistakes, one at a time, and the test that must detect each.

A test has little value until it has been seen to fail. Each entry below is a plausible mistake in a DeBERTa or a
training loop, as a change of the source. The source is changed in memory, and the named test must fail. A mutant that
survives shows a missing test. `tests/sweep.py` does the same with every sign and comparison of the arithmetic.
"""

import subprocess
import sys
from typing import NamedTuple

import pytest
from mutation import ROOT, failures, mutated, replaced


class Mistake(NamedTuple):
    what: str
    file: str
    right: str            # must occur exactly once in the file
    wrong: str
    noticed_by: str       # tests/NAME.py::test


MISTAKES = [
    # Positions.
    Mistake("floor for ceil", "minipref/model.py", "torch.ceil(", "torch.floor(",
            "test_positions::test_every_bucket_of_v3_is_the_one_of_exact_arithmetic"),
    Mistake("no logarithm: distances are just clamped", "minipref/model.py",
            "return torch.where(distance.abs() <= exact, distance, (exact + steps) * distance.sign())",
            "return distance.clamp(1 - position_buckets, position_buckets - 1)",
            "test_positions::test_buckets_of_v3_are_the_published_ones"),
    Mistake("distances are not clamped", "minipref/model.py",
            "distance = distance.clamp(1 - max_distance, max_distance - 1)", "",
            "test_positions::test_distances_past_the_largest_are_clamped_as_microsoft_does"),
    Mistake("buckets in the ambient precision", "minipref/model.py", "clamp(min=exact).double()",
            "clamp(min=exact).to(torch.get_default_dtype())",
            "test_positions::test_buckets_do_not_depend_on_the_ambient_precision"),
    Mistake("j - i for i - j", "minipref/model.py", "i[:, None] - i[None, :]", "i[None, :] - i[:, None]",
            "test_positions::test_relative_index_holds_the_row_of_i_minus_j"),
    Mistake("the table's middle is off by one", "minipref/model.py",
            "return log_bucket(distance, position_buckets, max_distance) + position_buckets",
            "return log_bucket(distance, position_buckets, max_distance) + position_buckets - 1",
            "test_positions::test_rows_run_from_one_to_the_last_and_row_zero_is_never_read"),

    # Attention.
    Mistake("p2c with the paper's sign", "minipref/model.py", "index.mT.expand_as(c2c.mT)",
            "index.expand_as(c2c.mT)",
            "test_attention::test_p2c_is_the_key_times_the_row_of_i_minus_j_not_of_j_minus_i"),
    Mistake("sqrt(d) for sqrt(3 d)", "minipref/model.py", "scale = 1 / math.sqrt(3 * q.shape[-1])",
            "scale = 1 / math.sqrt(q.shape[-1])", "test_attention::test_c2c_is_query_times_key_over_sqrt_3d"),
    Mistake("p2c is not scaled", "minipref/model.py", "q, pos_q = q * scale, pos_q * scale",
            "q, pos_q = q * scale, pos_q",
            "test_attention::test_p2c_is_the_key_times_the_row_of_i_minus_j_not_of_j_minus_i"),
    Mistake("c2p reads the queries' table", "minipref/model.py", "every_row = q @ pos_k.mT",
            "every_row = q @ (pos_q / scale).mT",
            "test_attention::test_c2p_is_the_query_times_the_row_of_i_minus_j"),
    Mistake("queries are masked, not keys", "minipref/model.py", "~attention_mask[:, None, None, :]",
            "~attention_mask[:, None, :, None]",
            "test_attention::test_padding_keys_get_no_probability_and_padding_queries_stay_finite"),
    Mistake("padding is masked with -inf", "minipref/model.py", "torch.finfo(scores.dtype).min", "-math.inf",
            "test_attention::test_a_sequence_of_padding_only_gives_no_nan"),
    Mistake("softmax in half precision", "minipref/model.py",
            "scores = scores.to(torch.promote_types(scores.dtype, torch.float32))", "scores = scores",
            "test_attention::test_softmax_is_float32_or_better_whatever_the_scores_are"),
    Mistake("no bias on the positions", "minipref/model.py", "self.split_heads(self.q_proj(rel))",
            "self.split_heads(rel @ self.q_proj.weight.mT)",
            "test_attention::test_positions_go_through_the_query_and_key_projections_biases_included"),
    Mistake("positions' keys through the query projection", "minipref/model.py",
            "self.split_heads(self.k_proj(rel)))", "self.split_heads(self.q_proj(rel)))",
            "test_attention::test_positions_go_through_the_query_and_key_projections_biases_included"),
    Mistake("heads take every H-th column", "minipref/model.py",
            "x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)",
            "x.unflatten(-1, (-1, self.num_heads)).movedim(-1, -3)",
            "test_attention::test_positions_go_through_the_query_and_key_projections_biases_included"),
    Mistake("no dropout on the relative table", "minipref/model.py", "rel = self.rel_dropout(rel_embeddings)",
            "rel = rel_embeddings", "test_parity::test_dropout_falls_in_the_same_places_as_in_the_reference"),
    Mistake("the definition itself with the paper's sign", "minipref/model.py", "p2c = k[b, h, j] @ pos_q[h, row]",
            "p2c = k[b, h, j] @ pos_q[h, log_bucket(torch.tensor(j - i), position_buckets, max_distance)\n"
            "                                                    + position_buckets]",
            "test_attention::test_definition_gives_the_numbers_worked_out_by_hand"),

    Mistake("p2c with the paper's sign, seen by the whole plain model", "minipref/model.py",
            "index.mT.expand_as(c2c.mT)", "index.expand_as(c2c.mT)",
            "test_golden::test_golden_embeddings_and_every_layer[small_span-plain]"),
    Mistake("p2c with the paper's sign, seen by the fast model", "minipref/model.py",
            "index.mT.expand_as(c2c.mT)", "index.expand_as(c2c.mT)",
            "test_fast::test_the_accelerated_model_is_the_plain_one"),

    # The fast forms of attention.
    Mistake("p2c's table laid out the other way round", "minipref/fast/attention.py",
            "by_distance(pos_q * scale, buckets)",
            "by_distance(pos_q * scale, buckets.flip(0))",
            "test_attention::test_path_equals_the_definition_in_value_and_gradient[blocks]"),
    Mistake("the softmax's gradient without its row sum", "minipref/fast/attention.py",
            "torch._softmax_backward_data(d_probs, probs, -1, probs.dtype, grad_input=d_probs)", "d_probs.mul_(probs)",
            "test_attention::test_path_passes_gradcheck"),
    Mistake("c2p's gradient put back in ascending order", "minipref/fast/attention.py",
            "index_add_(1, buckets.flip(0), d_table_k",
            "index_add_(1, buckets, d_table_k", "test_attention::test_path_passes_gradcheck"),
    Mistake("the scale missing from the queries' gradient", "minipref/fast/attention.py", "dq.mul_(scale)", "dq",
            "test_attention::test_path_passes_gradcheck"),
    Mistake("a tile begins one distance too late", "minipref/fast/attention.py",
            "column = others_start - (start + b) + L", "column = others_start - (start + b) + L + (a > 0)",
            "test_attention::test_path_in_float32_is_within_rounding_of_float64_at_v3s_spans"),
    Mistake("far keys begin one too early", "minipref/fast/attention.py", "self.first - reach + 1, last + reach",
            "self.first - reach + 2, last + reach",
            "test_attention::test_keys_past_the_last_bucket_are_scored_by_one_product"),
    Mistake("far keys of the other side", "minipref/fast/attention.py",
            "((slice(0, start), reach), (slice(stop, n), -reach))",
            "((slice(0, start), -reach), (slice(stop, n), reach))",
            "test_attention::test_keys_past_the_last_bucket_are_scored_by_one_product"),
    Mistake("padding is not masked in the blocks", "minipref/fast/attention.py", "if padding is not None:", "if False:",
            "test_attention::test_path_equals_the_definition_in_value_and_gradient[blocks]"),
    Mistake("padding is not masked in the batch", "minipref/fast/attention.py",
            "bias = bias.masked_fill(~attention_mask",
            "bias = bias.masked_fill((~attention_mask & False)",
            "test_attention::test_path_equals_the_definition_in_value_and_gradient[batched]"),
    Mistake("[CLS] looks at positive distances", "minipref/fast/attention.py", "buckets = buckets[:L].flip(0)",
            "buckets = buckets[L - 1:]",
            "test_attention::test_attention_of_cls_alone_is_the_definitions_first_row"),
    Mistake("attention drops out in evaluation", "minipref/fast/__init__.py",
            "dropout = self.attn_dropout.p if self.training else 0.0", "dropout = self.attn_dropout.p",
            "test_encoder::test_attention_drops_out_in_training_only"),

    Mistake("the fast last layer reads the wrong token", "minipref/fast/__init__.py", "queries = x[:, :1] if cls_only",
            "queries = x[:, -1:] if cls_only", "test_fast::test_the_accelerated_model_is_the_plain_one"),
    Mistake("the fast table is not normalised", "minipref/fast/__init__.py",
            "table = self.rel_norm(self.rel_embeddings.weight[lowest:highest + 1])",
            "table = self.rel_embeddings.weight[lowest:highest + 1]",
            "test_fast::test_the_accelerated_model_is_the_plain_one"),
    Mistake("the fast positions' keys through the query projection", "minipref/fast/__init__.py", "(self.k_proj, rel)",
            "(self.q_proj, rel)", "test_fast::test_the_accelerated_model_is_the_plain_one"),

    # Encoder and classifier.
    Mistake("no norm on the relative table", "minipref/model.py",
            "table = self.rel_norm(self.rel_embeddings.weight)",
            "table = self.rel_embeddings.weight", "test_encoder::test_every_layer_is_the_definition"),
    Mistake("GELU by tanh", "minipref/fast/layers.py", "return F.linear(F.gelu(x), weight",
            "return F.linear(F.gelu(x, approximate='tanh'), weight",
            "test_encoder::test_every_layer_is_the_definition"),
    Mistake("GELU by tanh where no gradient is wanted", "minipref/fast/layers.py", "ff_out(F.gelu(ff_in(part)))",
            "ff_out(F.gelu(ff_in(part), approximate='tanh'))",
            "test_encoder::test_without_gradients_every_layer_is_the_same"),
    Mistake("the gradient of GELU by tanh", "minipref/fast/layers.py", "grad_input(d_hidden, x, grad_input=d_hidden)",
            "grad_input(d_hidden, x, approximate='tanh', grad_input=d_hidden)",
            "test_encoder::test_every_gradient_is_the_definitions"),
    Mistake("norms with torch's epsilon", "minipref/model.py",
            "self.ff_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)",
            "self.ff_norm = nn.LayerNorm(D)", "test_encoder::test_norms_all_have_the_configured_epsilon"),
    Mistake("norm before, not after (pre-LN)", "minipref/model.py",
            "return self.ff_norm(x + self.dropout(self.feed_forward(x)))",
            "return x + self.dropout(self.feed_forward(self.ff_norm(x)))",
            "test_encoder::test_every_layer_is_the_definition"),
    Mistake("no residual connection", "minipref/model.py", "self.ff_norm(x + self.dropout",
            "self.ff_norm(self.dropout", "test_encoder::test_every_layer_is_the_definition"),
    Mistake("padding is not zeroed", "minipref/model.py", " * attention_mask[..., None])", ")",
            "test_encoder::test_embeddings_are_normalised_words_with_padding_zeroed"),
    Mistake("dropout on the embeddings before the padding is known", "minipref/model.py",
            "return self.dropout(self.word_norm(self.word_embeddings(input_ids)) * attention_mask[..., None])",
            "return self.word_norm(self.word_embeddings(input_ids)) * attention_mask[..., None]",
            "test_parity::test_dropout_falls_in_the_same_places_as_in_the_reference"),
    Mistake("padding's word vector is trained", "minipref/model.py",
            "nn.Embedding(V, D, padding_idx=config.pad_token_id)",
            "nn.Embedding(V, D)", "test_encoder::test_a_padding_id_among_real_tokens_is_not_trained"),
    Mistake("pooler with tanh", "minipref/model.py", "F.gelu(self.pooler(", "torch.tanh(self.pooler(",
            "test_encoder::test_classifier_reads_cls_through_pooler_gelu_and_head"),
    Mistake("the mean of all tokens for [CLS]", "minipref/model.py", "return x, last[:, 0]",
            "return x, last.mean(1)",
            "test_encoder::test_classifier_reads_cls_through_pooler_gelu_and_head"),
    Mistake("a [SEP] counts as a token of the next segment", "minipref/auxiliary.py",
            "is_sep.cumsum(dim=1) - is_sep", "is_sep.cumsum(dim=1)",
            "test_encoder::test_every_token_is_of_the_prompt_of_a_of_b_or_of_nothing"),
    Mistake("the sum of a segment for its mean", "minipref/auxiliary.py",
            " / is_in.sum(dim=1)[..., None]", "",
            "test_encoder::test_the_auxiliary_head_reads_the_means_of_the_segments"),
    Mistake("the auxiliary head learns from the model", "minipref/auxiliary.py", "aux_logits.detach()", "aux_logits",
            "test_encoder::test_the_model_learns_from_the_auxiliary_head_and_that_from_the_labels"),
    Mistake("the model is taken for the teacher", "minipref/auxiliary.py",
            "F.kl_div(F.log_softmax(logits.float(), dim=-1), targets,",
            "F.kl_div(targets, F.log_softmax(logits.float(), dim=-1),",
            "test_encoder::test_the_model_learns_from_the_auxiliary_head_and_that_from_the_labels"),
    Mistake("no dropout before the classifier", "minipref/model.py", "self.classifier(self.classifier_dropout(pooled))",
            "self.classifier(pooled)", "test_parity::test_dropout_falls_in_the_same_places_as_in_the_reference"),
    # Checkpoints.
    Mistake("values loaded as keys", "minipref/checkpoint.py", '"encoder.layer.{}.attention.self.key_proj"',
            '"encoder.layer.{}.attention.self.value_proj"',
            "test_checkpoint::test_the_rename_table_covers_every_parameter_once"),
    Mistake("the two norms of a layer exchanged", "minipref/checkpoint.py",
            '''    "layers.{}.attn_norm": "encoder.layer.{}.attention.output.LayerNorm",''',
            '''    "layers.{}.attn_norm": "encoder.layer.{}.output.LayerNorm",
    "layers.{}.ff_norm": "encoder.layer.{}.attention.output.LayerNorm",
} | {''', "test_golden::test_golden_embeddings_and_every_layer"),
    Mistake("unknown tensors silently skipped", "minipref/checkpoint.py",
            "if name.startswith(PRETRAINING_HEADS):", "if True:",
            "test_checkpoint::test_an_unknown_tensor_is_named"),
    Mistake("NaN in a file is no matter", "minipref/checkpoint.py",
            "if not all(torch.isfinite(end) for end in tensor.aminmax()):", "if False:",
            "test_checkpoint::test_weights_that_are_not_finite_are_refused_by_name"),
    Mistake("a model is saved in its own precision", "minipref/checkpoint.py", 'tensor.detach().to("cpu", dtype)',
            'tensor.detach().to("cpu")',
            "test_checkpoint::test_the_saved_file_is_float32_and_says_it_is_from_torch"),

    # Optimizer.
    Mistake("biases and norms decay", "minipref/optim.py", "(weight_decay if decays else 0.0, lr)",
            "(weight_decay, lr)", "test_optim::test_matrices_and_tables_decay_and_biases_and_norms_do_not"),
    Mistake("coupled decay", "minipref/optim.py", 'p_.mul_(1 - group["lr"] * group["weight_decay"])',
            'g = g + group["weight_decay"] * p_', "test_optim::test_adamw_decay_is_decoupled_from_the_gradient"),
    Mistake("no bias correction of the mean", "minipref/optim.py", 'group["lr"] / (1 - beta1**t)', 'group["lr"]',
            "test_optim::test_adamw_first_step_by_hand"),
    Mistake("no bias correction of the squares", "minipref/optim.py", "math.sqrt(1 - beta2**t)", "1.0",
            "test_optim::test_adamw_first_step_by_hand"),
    Mistake("epsilon under the root", "minipref/optim.py", 'v.sqrt().div_(root_correction).add_(group["eps"])',
            'v.div(root_correction**2).add_(group["eps"]).sqrt_()', "test_optim::test_adamw_first_step_by_hand"),
    Mistake("one step counter for all parameters", "minipref/optim.py", 'state["step"].item()',
            'max(s["step"].item() for s in self.state.values())',
            "test_optim::test_adamw_counts_steps_for_each_parameter"),
    Mistake("parameters without gradient in this step forget their moments", "minipref/optim.py", "if not state:",
            "if not state or p.grad.norm() == 0:",
            "test_optim::test_adamw_moves_rows_whose_gradient_is_zero_as_long_as_their_moments_do"),
    Mistake("warmup off by one", "minipref/optim.py", "# 1. warming up, from 0\n        return peak_lr * step",
            "\n        return peak_lr * (step + 1)", "test_optim::test_schedule_follows_the_table"),
    Mistake("a whole cosine for half of one", "minipref/optim.py", "math.cos(math.pi * progress)",
            "math.cos(2 * math.pi * progress)", "test_optim::test_schedule_follows_the_table"),
    Mistake("gradients clipped one by one", "minipref/optim.py", "torch._foreach_mul_(gradients, max_norm / norm)",
            "[g.mul_(min(1, max_norm / g.norm().item())) for g in gradients]", "test_optim::test_clipping_is_torchs"),
    Mistake("a gradient of NaN is clipped", "minipref/optim.py", "if math.isfinite(norm) and norm > max_norm:",
            "if not norm <= max_norm:",
            "test_optim::test_clipping_reports_a_norm_that_is_not_finite_and_touches_nothing"),

    # Metrics.
    Mistake("log loss in bits", "minipref/metrics.py", "float(-np.log(chosen", "float(-np.log2(chosen",
            "test_metrics::test_log_loss_of_known_answers"),
    Mistake("precision and recall exchanged", "minipref/metrics.py", "precision = hits / np.maximum(guesses, 1)",
            "precision = hits / np.maximum(truths, 1)", "test_metrics::test_every_score_is_scikit_learns"),
    Mistake("confusion transposed", "minipref/metrics.py", "np.add.at(confusion, (y, predicted), 1)",
            "np.add.at(confusion, (predicted, y), 1)",
            "test_metrics::test_confusion_has_truth_in_rows_and_prediction_in_columns"),
    Mistake("bins of the calibration error weigh the same", "minipref/metrics.py", "ece += inside.mean() *",
            "ece += 1 / BINS *", "test_metrics::test_calibration_error_by_hand"),
    Mistake("logits are averaged, not probabilities", "minipref/metrics.py", "logits + surface[:, None]).mean(1)",
            "logits + surface[:, None]).prod(1)",
            "test_metrics::test_averaging_takes_the_mean_of_the_orders_probabilities_not_of_their_logits"),
    Mistake("temperature inverted in the calibration", "minipref/metrics.py",
            "np.asarray(logits, dtype=np.float64) / temperature", "np.asarray(logits, dtype=np.float64) * temperature",
            "test_metrics::test_the_temperature_undoes_the_sharpening"),
    Mistake("the surface counts in one order only", "minipref/surface.py",
            "np.concatenate([features, features * signs]), np.concatenate([labels, swapped])", "features, labels",
            "test_surface::test_the_regression_treats_a_and_b_alike"),
    Mistake("every feature is trusted alike", "minipref/surface.py", 'if "characters" in name or "identical" in name',
            "if True",
            "test_surface::test_other_features_than_length_count_in_full_with_many_rows_and_hardly_with_few"),
    Mistake("a blend may count against its surface", "minipref/metrics.py", "if weight <= 0:", "if False:",
            "test_surface::test_a_surface_that_says_nothing_hardly_counts"),
    Mistake("rows calibrate themselves", "minipref/metrics.py", "held, rest = fold == f, fold != f",
            "held, rest = fold == f, fold == f",
            "test_metrics::test_cross_fitting_uses_no_row_to_calibrate_itself"),

    # Data.
    Mistake("swap without swapping the label", "minipref/data.py",
            "labels.append({0: 1, 1: 0}.get(label, label) if swap else label)", "labels.append(label)",
            "test_data::test_a_swapped_row_shows_b_first_and_turns_its_label"),
    Mistake("the label swapped, the answers not", "minipref/data.py", "(b, a) if swap else (a, b)", "a, b",
            "test_data::test_a_swapped_row_shows_b_first_and_turns_its_label"),
    Mistake("a split that leaks prompts", "minipref/data.py", "group_of.setdefault(prompt_key(prompt), len(group_of))",
            "group_of.setdefault((prompt_key(prompt), len(group_of)), len(group_of))",
            "test_data::test_no_prompt_is_on_both_sides_of_the_split"),
    Mistake("the same prompt in other letters counts as another", "minipref/data.py", ".casefold()", "",
            "test_data::test_prompts_differ_by_their_turns_not_only_by_their_text"),
    Mistake("truncation drops B", "minipref/data.py", "budgets = truncation_budgets(full, max_length - SPECIALS)",
            "room = max_length - SPECIALS\n"
            "            budgets = [min(n, max(0, room - sum(full[:f]))) for f, n in enumerate(full)]",
            "test_data::test_answer_b_is_there_whatever_the_length_of_prompt_and_a"),
    Mistake("truncation drops the tail", "minipref/data.py", "return ids[:budget - tail] + ids[len(ids) - tail:]",
            "return ids[:budget]", "test_data::test_a_segment_that_is_truncated_keeps_its_head_and_its_tail"),
    Mistake("every epoch in the same order", "minipref/data.py", "random = np.random.default_rng([seed, 2, epoch])",
            "random = np.random.default_rng([seed, 2])",
            "test_data::test_epochs_differ_seeds_differ_and_the_same_comes_again"),
    Mistake("the last, smaller batch is dropped", "minipref/data.py",
            "for i in range(0, len(rows), batch_size))", "for i in range(0, len(rows) - batch_size + 1, batch_size))",
            "test_data::test_an_epoch_shows_every_row_once"),
    Mistake("padding counts as tokens", "minipref/data.py", "attention_mask[i, :len(sequence)] = True",
            "attention_mask[i] = True",
            "test_data::test_a_sequence_is_cls_prompt_sep_a_sep_b_sep_padded_to_the_longest_of_its_batch"),
    Mistake("classes are not exchanged with the answers", "minipref/data.py", "probabilities[..., [1, 0, 2]]",
            "probabilities", "test_data::test_swapping_classes_exchanges_a_and_b_and_leaves_the_tie"),

    # Files of others.
    Mistake("any file is written over", "predict.py", "if not is_submission:", "if False:",
            "test_outputs::test_a_file_that_is_no_submission_is_not_written_over"),
    Mistake("labels are written over", "predict.py", """ and set(cells.flat) != {"0", "1"}""", "",
            "test_outputs::test_labels_and_notes_under_a_submissions_header_are_not_written_over"),
    Mistake("a page of somebody else is written over", "minipref/runtime.py",
            """if start and b"\\n" + mark.encode() not in start:""", "if False:",
            "test_outputs::test_a_page_of_somebody_else_is_not_written_over_and_ones_own_is"),
    Mistake("each row of Python decides alone", "minipref/data.py", "_to_pair(row, number, as_lists) for",
            "_to_pair(row, number, are_json_lists([row[0]])) for",
            "test_data::test_many_rows_of_python_decide_by_all_of_their_prompts_as_a_file_does"),
    Mistake("pretraining begins again with any encoder", "minipref/pretrain/loop.py",
            '["trained_encoder"] != trained_encoder', '["trained_encoder"] == ""',
            "test_pretrain::test_a_run_killed_before_its_first_state_begins_again_with_the_encoder_that_moved_and_no_other"),
    Mistake("a file that the network lost is left out", "minipref/hub.py",
            "(isinstance(error, LookupError) or not online)", "True",
            "test_hub::test_a_network_that_fails_at_an_optional_file_leaves_no_encoder_without_it"),
    Mistake("some folds are taken for all", "minipref/run/folder.py", "if len(models) != folds:", "if False:",
            "test_outputs::test_folds_are_averaged_only_where_all_are_there"),
    Mistake("a contradicting winner is ignored", "minipref/layouts.py", "if winner is not None and record",
            "if False and record", "test_layouts::test_a_winner_that_contradicts_the_other_columns_is_named"),

    # Models and tokenizers of others.
    Mistake("the first added token is found, not the longest", "minipref/tokenizer.py",
            "sorted(ids, key=len, reverse=True)", "sorted(ids, key=len)",
            "test_tokenizer::test_added_tokens_have_the_ids_of_transformers[the longest]"),
    Mistake("special tokens are found in texts", "minipref/tokenizer.py",
            'if token.get("special"):', "if False:",
            "test_tokenizer::test_a_special_token_without_flags_is_special_where_another_file_says_so"),
    Mistake("the classes stay in the file's order", "minipref/checkpoint.py", "tensors[name][order]", "tensors[name]",
            "test_checkpoint::test_a_preference_head_has_its_classes_in_whatever_order_the_file_names_them["
            "tie,model_a,model_b]"),
    Mistake("a token classifier passes for a preference head", "minipref/checkpoint.py",
            'any(name.startswith("pooler.") for name in head)', "True",
            "test_checkpoint::test_a_token_classifier_with_our_names_is_another_tasks_head"),
    Mistake("half a character stays in a text", "minipref/data.py", "tuple(turn and replace_surrogates(turn) for",
            "tuple(turn for", "test_data::test_lone_surrogates_are_mended_where_rows_are_read_and_the_cells_counted"),
    Mistake("a plain answer that is a list is parsed", "minipref/data.py",
            "turns = parse_turns(cell) if as_lists else (cell,)", "turns = parse_turns(cell)",
            "test_data::test_cells_are_json_lists_where_most_prompts_are_and_a_plain_answer_that_is_a_list_stays_text"),
    Mistake("a file is packed if its name says so", "minipref/layouts.py", "if start.startswith(magic)",
            "if path.suffix == '.gz'",
            "test_data::test_a_file_is_read_for_what_it_is_packed_or_not_whatever_its_name_and_encoding"),
    Mistake("NaN is a text", "minipref/data.py", 'in ("None", "nan", "<NA>", "NaT")', 'in ("None", "<NA>", "NaT")',
            "test_data::test_a_missing_value_of_python_is_an_empty_cell_and_a_missing_turn_in_a_list"),
    Mistake("control characters get onto a page", "minipref/runtime.py", r'html.escape(FORBIDDEN.sub("\ufffd", text))',
            "html.escape(text)", "test_report::test_characters_that_html_forbids_are_on_no_page"),

    # Judging and training.
    Mistake("the CSV after --model is a model", "predict.py", "options.csv = files[-1]", "options.csv = None",
            "test_train::test_the_csv_is_found_before_among_and_after_the_models"),
    Mistake("the swapped order's prediction is not mapped back", "minipref/predictor.py",
            "swap_classes(out) if swapped else out", "out",
            "test_explain::test_the_prediction_is_the_judges_in_both_orders"),
    Mistake("accumulated micro-batches count the same whatever their rows", "train.py",
            "(loss + extra) / step_rows)", "(loss + extra) / len(rows) / len(micro_batches))",
            "test_train::test_accumulated_micro_batches_equal_one_large_batch"),
    Mistake("a resumed run draws other dropout", "minipref/run/state.py", 'if f"{prefix}rng.torch" in tensors:',
            "if False:", "test_train::test_a_run_stopped_anywhere_and_resumed_ends_as_if_it_had_not_been[7]"),
    Mistake("a signal that nohup ignores stops the run", "minipref/run/signals.py",
            "before != signal.SIG_IGN or", "True or",
            "test_reliability::test_a_signal_that_is_ignored_stays_ignored"),
    Mistake("a log line on a closed terminal ends the run", "minipref/run/signals.py",
            "mute_closed_terminal()  ", "pass  ",
            "test_reliability::test_a_closed_terminal_costs_nothing_though_each_print_fails"),
    Mistake("deterministic mode is left on", "minipref/run/state.py",
            "torch.set_deterministic_debug_mode(mode)", "pass",
            "test_reliability::test_what_a_command_may_change_for_its_process_is_put_back"),
    Mistake("torch.compile's errors are unforeseen", "minipref/runtime.py", "elif is_compile_failure(problem):",
            "elif False:", "test_reliability::test_without_a_compiler_compile_is_one_line"),
    Mistake("--warmup is cut like a recipe's", "minipref/run/setup.py", 'if "warmup" in options:', "if False:",
            "test_config::test_warmup_is_steps_or_a_fraction_of_them"),
    Mistake("the recipe goes by the folder's name", "minipref/recipes.py", "hidden_size < SMALLEST_PUBLISHED",
            "Path(encoder).name == 'minipref-tiny'",
            "test_config::test_the_default_recipe_follows_the_encoders_size_whatever_its_folder_is_called"),
    Mistake("relative paths mean others in another directory", "minipref/run/folder.py",
            "return str(there) if", "return str(there) if False and",
            "test_reliability::test_paths_of_a_moved_project_are_found_where_the_run_is_resumed"),
    Mistake("a rank's rows count for what others' do not", "minipref/run/distributed.py",
            "shard(rows), shard(swapped), world_size()", "shard(rows), shard(swapped), len(shard(rows))",
            "test_distributed::test_shards_of_a_batch_are_its_rows_once_each_and_weigh_alike"),
    Mistake("a row that is another rank's counts twice", "minipref/run/distributed.py",
            "rows[:1], swapped[:1], 0", "rows[:1], swapped[:1], world_size()",
            "test_distributed::test_shards_of_a_batch_are_its_rows_once_each_and_weigh_alike"),
    Mistake("all ranks draw the same dropout", "minipref/run/distributed.py",
            "if not is_main_process():\n        torch.manual_seed", "if False:\n        torch.manual_seed",
            "test_distributed::test_each_rank_draws_its_own_dropout_and_rank_0_what_one_process_would"),
    Mistake("a resumed run forgets the optimizer's moments", "minipref/run/state.py",
            'restore_optimizer(optimizer, tensors, f"optimizer.{i}.")', "pass",
            "test_train::test_a_run_stopped_anywhere_and_resumed_ends_as_if_it_had_not_been[7]"),

    # Files of others.
    Mistake("a run takes any folder", "minipref/run/folder.py", "        check_own(folder)\n", "",
            "test_outputs::test_a_folder_that_is_no_runs_is_refused_by_name_and_left_as_it_was"),
    Mistake("an output is compared with the inputs by its name", "minipref/runtime.py",
            "os.path.samefile(path, file)", "Path(path) == Path(file)",
            "test_outputs::test_an_output_that_is_an_input_is_refused_by_whatever_name"),
    Mistake("any table of probabilities is the truth", "minipref/synthetic/generator.py",
            " & (abs(a * b - (tie / TIE)**2) < 1e-6)", "",
            "test_outputs::test_a_truth_that_is_not_the_synthetic_datasets_is_not_read"),

    Mistake("the user's way of waiting is replaced", "minipref/threads.py",
            ' or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()', "",
            "test_threads::test_what_the_user_has_set_is_kept"),

    # The page and its server.
    Mistake("the page's swapped order is not mapped back", "minipref/explain/attribution.py",
            "b_first[[1, 0, 2]]", "b_first", "test_explain::test_the_prediction_is_the_judges_in_both_orders"),
    Mistake("the swapped order's attributions stay at its own places", "minipref/explain/attribution.py",
            "b_first[places]", "b_first",
            "test_explain::test_attributions_are_the_slope_of_the_log_odds_along_each_tokens_embedding"),
    Mistake("c2p's vector is p2c's", "minipref/explain/attribution.py",
            "pos_q[:, buckets], pos_k[:, buckets]", "pos_k[:, buckets], pos_q[:, buckets]",
            "test_explain::test_the_vectors_products_add_up_to_each_term"),
    Mistake("any difference between the orders is order-sensitive", "minipref/explain/attribution.py",
            " and _leads(first) and _leads(second)", "", "test_explain::test_the_words_fit_the_probabilities"),
    Mistake("a text ends the page's script", "minipref/explain/page.py", r'.replace("<", "\\u003c")', "",
            "test_explain::test_what_a_text_holds_stays_text"),
    Mistake("a page of any host may ask", "minipref/explain/serve.py", "host not in self.server.hosts", "not host",
            "test_live::test_other_pages_of_the_browser_are_refused"),
    Mistake("a page of any origin may ask", "minipref/explain/serve.py",
            'origin not in (None, f"http://{host}")', "False",
            "test_live::test_other_pages_of_the_browser_are_refused"),
    Mistake("the address needs no token", "minipref/explain/serve.py",
            "not secrets.compare_digest(token.encode(), self.server.token.encode())", "not token",
            "test_live::test_without_the_token_nothing_is_there"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.what for mistake in MISTAKES])
def test_the_mistake_is_noticed(mistake):
    name, test = mistake.noticed_by.split("::")
    with mutated(mistake.file, replaced(mistake.file, mistake.right, mistake.wrong)):
        failed = failures([f"tests/{name}.py::{test}"])
    assert failed, f"{mistake.what}: {mistake.noticed_by} did not notice"


@pytest.mark.slow
def test_without_a_mistake_the_same_tests_pass():
    tests = sorted({"tests/{}.py::{}".format(*mistake.noticed_by.split("::")) for mistake in MISTAKES})
    assert failures(tests, stop_at_first=False) == {}


def test_a_mutant_exists_inside_its_block_only():
    import minipref.model
    with mutated("minipref/model.py", replaced("minipref/model.py", "torch.ceil(", "torch.floor(")):
        from minipref.model import log_bucket as wrong
    from minipref.model import log_bucket as right
    assert wrong is not right
    assert right is minipref.model.log_bucket
    import torch
    assert (wrong(torch.tensor(132)), right(torch.tensor(132))) == (130, 131)


@pytest.mark.slow
def test_every_sign_turned_around_is_noticed():
    """In two files of six; `python tests/sweep.py` takes an hour for all."""
    command = [sys.executable, "tests/sweep.py", "minipref/optim.py", "minipref/auxiliary.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
