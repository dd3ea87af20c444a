"""Replaced-token detection: inputs, gradients of the shared table, exported encoder, and learning."""

import csv
import gzip
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, large_weights, worst_gradient
from mutation import failures, mutated, replaced
from safetensors.torch import load_file

import minipref
from minipref import runtime, synthetic
from minipref.config import EncoderConfig
from minipref.optim import AdamW, decay_groups
from minipref.pretrain import Corpus, PackedWindows, Pretraining, evaluate, export_encoder, load_corpus, loop
from minipref.pretrain.__main__ import main
from minipref.pretrain.corpus import encode_documents, is_held_out, read_corpus
from minipref.pretrain.evaluation import average_precision, best_f1, detection_scores, unigram_scores
from minipref.pretrain.objective import (
    bert_mask,
    masked_token_loss,
    replaced_token_loss,
    sample_categorical,
    sample_mask,
)
from minipref.run import folder
from minipref.run.state import read_state
from minipref.runtime import InputError

SIZES = ["--width", "32", "--heads", "2", "--layers", "2", "--feed-forward", "64", "--vocab-size", "350",
         "--heldout-share", "0.1", "--precision", "fp32", "--length", "24", "--long-length", "48"]


WHO = ("the old cook", "a young judge", "her brother", "the tall guard", "my neighbour", "their teacher")
DOES = ("reads both answers twice before choosing one of them", "keeps seven copper pots above the kitchen stove",
        "writes long letters to the king every winter", "walks along the river until the sun goes down",
        "counts all the stars that stand above the hill", "never tells the children where the honey is kept")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file of 400 one-line documents: six people, each with one of six activities."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(f"{rng.choice(WHO)} {rng.choice(DOES)}." for _ in range(400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(text) -> Corpus:
    return load_corpus([text], 0.1, None, 350)


def small_model(corpus: Corpus, objective: str = "rtd", sharing: str = "gdes", num_hidden_layers: int = 2,
                spare_rows: int = 0, **sizes) -> Pretraining:
    torch.manual_seed(0)
    config = EncoderConfig(vocab_size=corpus.tokenizer.vocab_size + spare_rows, hidden_size=32,
                           num_attention_heads=2, num_hidden_layers=num_hidden_layers, intermediate_size=64,
                           hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return Pretraining(config, corpus.tokenizer, objective, sharing)


def some_ids(corpus: Corpus, length: int = 24, size: int = 8) -> torch.Tensor:
    return PackedWindows(corpus.train, length, size, 0, corpus.tokenizer.cls_id).batch(0)


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path, encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# --- It learns ---

@pytest.mark.slow
def test_a_few_hundred_lines_of_text_teach_generator_and_discriminator(text, tmp_path):
    """On held-out lines: from the first to the last evaluation the MLM loss falls by 40%; the final RTD loss is 15%
    below the best constant's; F1 is above 0.3, while 'always original' has 0 and word frequency, with its threshold
    tuned on these tokens, is below 0.3."""
    code = main(["--corpus", str(text), "--output", str(tmp_path), *SIZES, "--long-share", "0",
                          "--steps", "200", "--warmup", "20", "--batch-tokens", "1024", "--init-std", "0.15",
                          "--lr", "1e-2", "--discriminator-lr", "5e-3", "--evaluations", "4"])
    assert code == 0
    first, *_, last = rows_of(tmp_path / "metrics.csv")
    assert last["mlm_loss"] < 0.6 * first["mlm_loss"]
    assert last["rtd_loss"] < 0.85 * last["constant_loss"]
    assert last["rtd_f1"] > 0.3 > last["unigram_best_f1"]


@pytest.mark.slow
def test_a_few_hundred_lines_of_other_text_teach_the_generator_more_than_word_frequencies(tmp_path):
    """300 synthetic answers. The generator's final loss on held-out ones is at least 0.3 below a prediction by
    frequency. The discriminator has not begun to learn by then: what it is to find is still nearly random."""
    answers = [json.loads(cell)[-1] for cell in synthetic.generate(300, 5).frame["response_a"]]
    text = tmp_path / "answers.txt"
    text.write_text("\n".join(" ".join(answer.split()) for answer in answers), encoding="utf-8")
    sizes = [*SIZES, "--vocab-size", "600", "--long-share", "0", "--init-std", "0.15"]
    assert main(["--corpus", str(text), "--output", str(tmp_path / "run"), *sizes, "--steps", "200",
                          "--warmup", "20", "--batch-tokens", "1024", "--lr", "1e-2", "--evaluations", "4"]) == 0
    first, *_, last = rows_of(tmp_path / "run/metrics.csv")
    assert last["mlm_loss"] < first["mlm_loss"] - 0.2
    assert last["mlm_loss"] < last["unigram_loss"] - 0.3
    assert last["mlm_accuracy"] > 1.3 * last["unigram_accuracy"]


# --- Which gradient reaches which table ---

def table_gradients(model: Pretraining, input_ids: torch.Tensor) -> dict[str, tuple[bool, bool]]:
    """Which loss reaches which of (generator's table, discriminator's own parameter): {"mlm": ..., "rtd": ...}."""
    is_masked, corrupted_ids, mlm_logits = model.corrupt(input_ids)
    losses = {"mlm": masked_token_loss(mlm_logits, input_ids, is_masked),
              "rtd": replaced_token_loss(model.discriminate(corrupted_ids), corrupted_ids, input_ids)}
    reached = {}
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward()
        tables = model.generator.word_embeddings.weight, model.discriminator.word_embeddings.weight
        reached[name] = tuple(table.grad is not None and bool(table.grad.any()) for table in tables)
    return reached


@pytest.mark.parametrize(("sharing", "mlm", "rtd"), [
    ("gdes", (True, False), (False, True)),        # E_G only from MLM, E_delta only from RTD
    ("nes", (True, False), (False, True)),         # two tables
    ("es", (True, True), (True, True)),            # one table, seen twice
])
def test_each_loss_reaches_the_table_that_is_its_own(corpus, form, sharing, mlm, rtd):
    model = form(small_model(corpus, sharing=sharing))
    assert table_gradients(model, some_ids(corpus)) == {"mlm": mlm, "rtd": rtd}


def test_both_losses_have_the_same_gradients_in_every_form(corpus, form):
    """In the plain model and in the accelerated one, with weights as large as `helpers.large_weights`."""
    plain = large_weights(small_model(corpus))
    found = {}
    for model in (plain, form(plain)):
        torch.manual_seed(0)
        is_masked, corrupted_ids, mlm_logits = model.corrupt(some_ids(corpus))
        rtd_loss = replaced_token_loss(model.discriminate(corrupted_ids), corrupted_ids, some_ids(corpus))
        model.zero_grad()
        (masked_token_loss(mlm_logits, some_ids(corpus), is_masked) + 50 * rtd_loss).backward()
        found[model] = gradients(model)
    worst, name = worst_gradient(*reversed(found.values()))
    assert worst < 1e-3, name


def test_without_the_stop_gradient_the_gradient_test_fails():
    mutant = replaced("minipref/pretrain/objective.py", "self.generator.word_embeddings.weight.detach() +",
                      "self.generator.word_embeddings.weight +")
    with mutated("minipref/pretrain/objective.py", mutant):
        failed = failures(["tests/test_pretrain.py::test_each_loss_reaches_the_table_that_is_its_own"],
                          stop_at_first=False)
    cases = {name.rsplit("[")[-1].removesuffix("]") for name in failed}
    assert cases == {f"{form}-gdes-mlm0-rtd0" for form in ("plain", "fast", "batched")}, failed


def test_gdes_sees_the_generators_words_plus_a_difference_that_starts_at_zero(corpus):
    model = small_model(corpus)
    generator, delta = model.generator.word_embeddings.weight, model.discriminator.word_embeddings.weight
    assert not delta.any()
    assert torch.equal(model.discriminator_table(), generator)
    with torch.no_grad():
        delta.normal_()
    assert torch.equal(model.discriminator_table(), generator + delta)
    ids = some_ids(corpus)
    by_table = model.eval().discriminate(ids)
    model.discriminator.word_embeddings.weight.data = generator + delta      # an ordinary encoder with the sum as table
    plain = model.replaced_token_head(model.discriminator(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert torch.equal(by_table, plain)


@pytest.mark.parametrize("sharing", ["gdes", "nes", "es"])
def test_the_two_optimizers_share_no_parameter_and_leave_none_out(corpus, sharing):
    model = small_model(corpus, sharing=sharing)
    optimizers = [AdamW(decay_groups(part, 0.01)) for part in model.trainable_parts()]
    trained = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())


def test_no_gradient_flows_back_through_the_sampled_words(corpus):
    model = small_model(corpus, sharing="nes")
    _, corrupted, _ = model.corrupt(some_ids(corpus))
    model.discriminate(corrupted).sum().backward()
    assert all(p.grad is None for part in (model.generator, model.masked_token_head) for p in part.parameters())


def test_cls_learns_from_the_labels_of_all_other_tokens(corpus):
    head = small_model(corpus).replaced_token_head
    x = torch.randn(2, 6, 32, requires_grad=True)
    F.binary_cross_entropy_with_logits(head(x)[:, 1:], torch.ones(2, 5)).backward()
    assert x.grad[:, 0].abs().max() > 1e-6


def test_the_generator_is_half_as_deep_and_mlm_alone_trains_one_of_full_depth(corpus):
    assert len(small_model(corpus, num_hidden_layers=4).generator.layers) == 2
    assert len(small_model(corpus, num_hidden_layers=1).generator.layers) == 1
    alone = small_model(corpus, objective="mlm", num_hidden_layers=4)
    assert len(alone.generator.layers) == 4
    assert not hasattr(alone, "discriminator")


# --- Hiding and replacing ---

def test_fifteen_percent_of_each_window_is_hidden_and_never_a_special_token(corpus):
    ids = some_ids(corpus, length=100, size=12)
    ids[:, 40] = corpus.tokenizer.sep_id
    model = small_model(corpus)
    torch.manual_seed(1)
    chosen = torch.stack([sample_mask(ids, model.is_special(ids)) for _ in range(200)])
    assert (chosen.sum(-1) == 15).all()
    assert not chosen[:, model.is_special(ids)].any()
    often = chosen.float().mean(0)[~model.is_special(ids)]
    assert often.min() > 0.05 and often.max() < 0.30                     # every word has its turn
    mostly_special = ids.masked_fill(torch.arange(100) > 4, corpus.tokenizer.pad_id)
    words = ~model.is_special(mostly_special)
    assert torch.equal(sample_mask(mostly_special, ~words), words)     # all there are, which is fewer than 15


def test_rtd_hides_with_mask_alone_and_mlm_with_bert_s_80_10_10(corpus):
    tokenizer = corpus.tokenizer
    ids = torch.full((40, 1000), 300)
    is_masked = torch.zeros_like(ids, dtype=torch.bool)
    is_masked[:, ::2] = True
    torch.manual_seed(0)
    hidden = bert_mask(ids, is_masked, tokenizer.mask_id, tokenizer.vocab_size)
    assert torch.equal(hidden[~is_masked], ids[~is_masked])
    share = (hidden[is_masked] == tokenizer.mask_id).float().mean().item()
    kept = (hidden[is_masked] == 300).float().mean().item()
    assert share == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert len(hidden[is_masked].unique()) > 0.5 * tokenizer.vocab_size


def test_only_hidden_tokens_are_replaced_and_a_right_guess_counts_as_original(corpus):
    model, ids = small_model(corpus), some_ids(corpus)
    is_masked, corrupted, _ = model.corrupt(ids)
    assert torch.equal(corrupted[~is_masked], ids[~is_masked])
    assert (corrupted != ids).sum() > 0
    with torch.no_grad():                          # a generator that always predicts id 300
        model.masked_token_head.bias[300] = 1e4
    is_masked, corrupted, _ = model.corrupt(ids)
    assert (corrupted[is_masked] == 300).all()
    same = torch.full_like(ids, 300)
    is_masked, corrupted, _ = model.corrupt(same)
    assert is_masked.any() and torch.equal(corrupted, same)


@pytest.mark.parametrize("objective", ["rtd", "mlm"])
def test_rows_of_the_table_that_are_no_word_are_neither_guessed_nor_drawn(corpus, objective):
    """v3's table has 128,100 rows for 128,001 ids."""
    model = small_model(corpus, objective, spare_rows=3000)
    ids = some_ids(corpus)
    for _ in range(5):
        _, corrupted, mlm_logits = model.corrupt(ids)
        assert mlm_logits.shape[1] == corpus.tokenizer.vocab_size
        assert corrupted.max() < corpus.tokenizer.vocab_size
    assert bert_mask(ids, torch.ones_like(ids, dtype=torch.bool), 0, model.vocab_size).max() < model.vocab_size
    scores = evaluate(model, [ids], corpus.counts)
    assert all(np.isfinite(value) for value in scores.values())


def test_words_are_drawn_as_often_as_the_generator_finds_them_likely():
    """20,000 draws from one distribution: chi-squared, 5 words, 99.99% of honest samplers stay below 23.5."""
    wanted = torch.tensor([0.05, 0.5, 0.2, 0.24, 0.01])
    torch.manual_seed(0)
    drawn = torch.bincount(sample_categorical(wanted.log().expand(20_000, 5)), minlength=5)
    assert ((drawn - 20_000 * wanted) ** 2 / (20_000 * wanted)).sum() < 23.5
    never = sample_categorical(torch.tensor([[-1e4, 0.0, -1e4]]).expand(1000, 3))
    assert (never == 1).all()


# --- Windows ---

def test_an_epoch_holds_the_text_once_without_padding_and_the_next_in_another_order(corpus):
    windows = PackedWindows(corpus.train, 32, 4, seed=3, cls_id=corpus.tokenizer.cls_id)
    epochs = [torch.cat([windows.batch(e * windows.batches_per_epoch + k) for k in range(windows.batches_per_epoch)])
              for e in (0, 1)]
    text = np.concatenate(corpus.train)
    for epoch in epochs:
        assert (epoch[:, 0] == corpus.tokenizer.cls_id).all()
        assert not (epoch == corpus.tokenizer.pad_id).any()
        left_over = np.bincount(text) - np.bincount(epoch[:, 1:].flatten().numpy(), minlength=text.max() + 1)
        assert (left_over >= 0).all() and left_over.sum() < 5 * 31
    assert not torch.equal(*epochs)


def test_a_batch_depends_on_its_number_and_the_seed_alone(corpus):
    def batch(k, *before, seed=3):
        windows = PackedWindows(corpus.train, 32, 4, seed, corpus.tokenizer.cls_id)
        for number in before:
            windows.batch(number)
        return windows.batch(k)

    far = 10 * batch(0).numel()
    assert torch.equal(batch(7), batch(7, 0, 1, far, 6))
    assert not torch.equal(batch(7), batch(7, seed=4))


def test_sep_comes_after_every_paragraph(corpus):
    tokenizer = corpus.tokenizer
    found, = encode_documents(tokenizer, ["a fire keeps\nthe camp\n \nwarm\n\n\n and dry\n"])
    parts = [tokenizer.encode(text) for text in ("a fire keeps the camp", "warm", "and dry")]
    assert found.tolist() == [id for part in parts for id in [*part, tokenizer.sep_id]]


def test_held_out_documents_are_about_the_share_asked_for_and_copies_stay_together():
    documents = [f"document number {n}" for n in range(4000)]
    held = [d for d in documents if is_held_out(d, 0.05)]
    assert 150 < len(held) < 250
    assert [d for d in documents * 2 if is_held_out(d, 0.05)] == held * 2
    assert set(held) < {d for d in documents if is_held_out(d, 0.10)}


# --- Figures ---

def test_figures_agree_with_scikit_learn_and_with_a_count_by_hand():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.random(3000) < 0.15
    logits = rng.normal(size=3000) + 1.5 * labels - 1.5
    commonness = rng.integers(0, 9, 3000).astype(float)
    scores = detection_scores(logits, labels, commonness)
    assert scores["rtd_loss"] == pytest.approx(sklearn.log_loss(labels, 1 / (1 + np.exp(-logits))))
    assert scores["rtd_precision"] == pytest.approx(sklearn.precision_score(labels, logits > 0))
    assert scores["rtd_recall"] == pytest.approx(sklearn.recall_score(labels, logits > 0))
    assert scores["rtd_f1"] == pytest.approx(sklearn.f1_score(labels, logits > 0))
    assert scores["rtd_average_precision"] == pytest.approx(sklearn.average_precision_score(labels, logits))
    assert scores["constant_loss"] == pytest.approx(sklearn.log_loss(labels, np.full(3000, labels.mean())))
    assert scores["rtd_best_f1"] == pytest.approx(max(sklearn.f1_score(labels, logits >= t) for t in logits[::7]),
                                                   abs=0.01)
    by_hand = [sklearn.f1_score(labels, sign * commonness >= t) for sign in (1, -1) for t in sign * np.arange(9.0)]
    assert scores["unigram_best_f1"] == pytest.approx(max(by_hand))


def test_guessing_by_frequency_has_the_loss_and_the_hits_of_a_count_by_hand():
    scores = unigram_scores(np.array([0, 1, 1, 3]), np.array([3, 7, 0, 0]))
    assert scores["unigram_loss"] == pytest.approx(-np.log([4 / 14, 8 / 14, 8 / 14, 1 / 14]).mean())
    assert scores["unigram_accuracy"] == 0.5


def test_the_frequencies_of_an_evaluation_leave_out_what_is_never_hidden(corpus):
    counts = corpus.counts.copy()
    scores = evaluate(small_model(corpus), [some_ids(corpus)], counts)
    counts[corpus.tokenizer.sep_id] += 10**6
    assert evaluate(small_model(corpus), [some_ids(corpus)], counts) == scores
    assert 0 < scores["unigram_accuracy"] < 0.5 and 2 < scores["unigram_loss"] < np.log(350)


def test_with_nothing_replaced_the_figures_are_zero_and_not_an_error():
    nothing = np.zeros(5, dtype=bool)
    assert best_f1(np.arange(5.0), nothing) == 0
    assert average_precision(np.arange(5.0), nothing) == 0
    assert detection_scores(-np.ones(5), nothing, np.ones(5))["rtd_f1"] == 0


def test_an_evaluation_repeats_itself_and_leaves_the_random_state_alone(corpus):
    model, batches = small_model(corpus), [some_ids(corpus)]
    before = torch.get_rng_state()
    first = evaluate(model, batches, corpus.counts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert evaluate(model, batches, corpus.counts) == first
    assert model.training


# --- A stopped run resumes exactly ---

RUN = [*SIZES, "--steps", "16", "--warmup", "3", "--batch-tokens", "384", "--evaluations", "4", "--dropout", "0.1",
       "--long-share", "0.3"]


def run(text: Path, output: Path, *more: str) -> int:
    return main(["--corpus", str(text), "--output", str(output), *RUN, *more])


def interrupt(monkeypatch, after: int, how) -> None:
    """Call `how()` in the middle of this optimizer step."""
    real, calls = loop.clip_and_step, []

    def clip_and_step(*args):
        calls.append(1)
        if len(calls) == after:
            how()
        real(*args)

    monkeypatch.setattr(loop, "clip_and_step", clip_and_step)


def same_result(one: Path, other: Path) -> None:
    tensors, others = load_file(one / "model/model.safetensors"), load_file(other / "model/model.safetensors")
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert (one / "report.json").read_bytes() == (other / "report.json").read_bytes()
    states = [read_state(run / "state")[0] for run in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(("sharing", "number", "code"), [("gdes", signal.SIGTERM, 143), ("es", signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_ends_bit_for_bit_the_same(text, tmp_path, monkeypatch, sharing, number,
                                                                     code):
    before = signal.getsignal(signal.SIGINT)
    assert run(text, tmp_path / "whole", "--sharing", sharing) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, 11, lambda: os.kill(os.getpid(), number))
        assert run(text, tmp_path / "parts", "--sharing", sharing) == code
    assert signal.getsignal(signal.SIGINT) is before                           # the handlers are put back
    assert run(text, tmp_path / "parts", "--sharing", sharing, "--resume") == 0
    same_result(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_run_goes_on_from_its_last_evaluation_to_the_same_end(text, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    assert run(text, tmp_path / "whole") == 0
    with monkeypatch.context() as patched, pytest.raises(Killed):
        interrupt(patched, 21, kill)
        run(text, tmp_path / "parts")
    assert main(["--resume", "--output", str(tmp_path / "parts")]) == 0        # the run knows its other options
    same_result(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_before_its_first_state_begins_anew_and_one_whose_state_is_lost_does_not(text, tmp_path, capsys):
    assert run(text, tmp_path / "run") == 0
    (tmp_path / "run/state").rename(tmp_path / "state")
    assert run(text, tmp_path / "run", "--resume") == 2
    assert "no state" in capsys.readouterr().err
    (tmp_path / "run/report.json").unlink()
    (tmp_path / "run/metrics.csv").rename(tmp_path / "metrics.csv")
    assert run(text, tmp_path / "run", "--resume") == 0
    assert (tmp_path / "run/metrics.csv").read_bytes() == (tmp_path / "metrics.csv").read_bytes()


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings_or_another_text(text, tmp_path, capsys):
    assert run(text, tmp_path / "run") == 0
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + "\none more line of text", encoding="utf-8")
    for begun_with, more, said in ((text, [], "--resume"), (text, ["--resume", "--lr", "0.5"], "--lr 0.5"),
                                   (other, ["--resume"], "corpus has changed")):
        capsys.readouterr()
        assert run(begun_with, tmp_path / "run", *more) == 2
        assert said in capsys.readouterr().err
    assert run(text, tmp_path / "new", "--resume") == 2
    settings = tmp_path / "run/config.json"
    for content in (settings.read_text().replace('"seed": 0', '"seed": 1'), "{", "[]"):
        settings.write_text(content)
        assert run(text, tmp_path / "run", "--resume") == 2
        assert "config.json" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is_when_it_is_resumed(text, tmp_path):
    assert run(text, tmp_path / "run") == 0
    edited = [tmp_path / "run" / name for name in ("metrics.csv", "timing.csv", "report.json", "model/README.md")]
    for path in edited:
        path.write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run(text, tmp_path / "run", "--resume") == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_report_of_another_state_is_refused(text, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt(patched, 21, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(text, tmp_path / "run") == 143
    (tmp_path / "run/report.json").write_text("{}")
    capsys.readouterr()
    assert run(text, tmp_path / "run", "--resume") == 2
    assert "report.json: a report, although the run has not ended" in capsys.readouterr().err


def test_two_processes_do_not_write_into_one_folder(text, tmp_path, capsys):
    with folder.lock_run(tmp_path / "run", loop.PROGRAM):
        assert run(text, tmp_path / "run") == 2
    assert "another process" in capsys.readouterr().err


def test_the_same_ids_in_other_documents_are_another_text(corpus):
    first, *rest = corpus.train
    cut = [first[:5], first[5:], *rest]
    assert replace(corpus, train=list(corpus.train)).sha256 == corpus.sha256
    assert replace(corpus, train=cut).sha256 != corpus.sha256
    assert replace(corpus, train=corpus.train + corpus.heldout[:1], heldout=corpus.heldout[1:]).sha256 != corpus.sha256


def test_a_gradient_that_is_no_number_ends_a_run_before_its_step(text, tmp_path, monkeypatch, capsys):
    norms = iter([1.0] * 9 + [float("inf")])
    monkeypatch.setattr(loop, "clip_gradients", lambda *_: next(norms))
    assert run(text, tmp_path) == 1
    error = capsys.readouterr().err
    assert "gradient norm inf" in error
    assert f"to resume: python -m minipref.pretrain --resume --output '{tmp_path}'" in error
    assert read_state(tmp_path / "state")[1]["step"] == 4           # the last evaluation; step 5 has the tenth norm


def test_a_run_that_goes_on_with_other_threads_says_that_it_is_not_bit_for_bit(text, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        interrupt(patched, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(text, tmp_path) == 143
    threads = torch.get_num_threads()
    assert run(text, tmp_path, "--resume", "--threads", str(threads + 1)) == 0
    assert f"note: threads has changed (it was {threads} and is {threads + 1})" in capsys.readouterr().out


@pytest.mark.parametrize(("raised", "code", "said"), [(OSError(28, "No space left on device"), 1, "No space left"),
                                                      (KeyboardInterrupt(), 130, "interrupted")])
def test_what_ends_a_run_from_outside_is_one_line(text, tmp_path, monkeypatch, capsys, raised, code, said):
    def end(*_):
        raise raised

    monkeypatch.setattr(loop, "load_corpus", end)
    assert run(text, tmp_path) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_where_half_precision_would_be_fp16_it_is_fp32_since_no_loss_is_scaled(text, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "choose_precision", lambda name, device: "fp16" if name == "auto" else name)
    assert run(text, tmp_path, "--precision", "auto") == 0
    assert folder.read_manifest(tmp_path, loop.PROGRAM)["fingerprint"]["precision"] == "fp32"


# --- A run that starts from an encoder ---

@pytest.mark.parametrize(("objective", "sharing"), [("rtd", "gdes"), ("rtd", "es"), ("rtd", "nes"), ("mlm", "gdes")])
def test_an_encoder_goes_on_from_where_it_was_and_the_generator_from_its_words_and_lowest_layers(corpus, objective,
                                                                                               sharing):
    begun = small_model(corpus, num_hidden_layers=4).discriminator
    for parameter in begun.parameters():                                 # nothing that a fresh model could have as well
        torch.nn.init.normal_(parameter)
    model = small_model(corpus, objective, sharing, num_hidden_layers=4)
    model.load_encoder_weights(begun)
    encoder, table = model.kept_encoder()
    assert torch.equal(table, begun.word_embeddings.weight)
    for name, value in begun.state_dict().items():
        if name != "word_embeddings.weight":
            assert torch.equal(encoder.state_dict()[name], value), name
    lowest = model.generator.state_dict()
    assert len(model.generator.layers) == (4 if objective == "mlm" else 2)
    assert all(torch.equal(value, begun.state_dict()[name]) for name, value in lowest.items())
    if sharing == "gdes" and objective == "rtd":
        assert not model.discriminator.word_embeddings.weight.any()


def test_a_run_goes_on_from_a_folder_with_its_sizes_and_its_vocabulary_and_resumes(text, tmp_path, monkeypatch, capsys):
    assert run(text, tmp_path / "first") == 0
    folder = tmp_path / "first/model"
    more = ["--corpus", str(text), "--encoder", str(folder), *SIZES[SIZES.index("--heldout-share"):],
            "--steps", "8", "--warmup", "3", "--batch-tokens", "384", "--evaluations", "2"]
    assert main([*more, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        interrupt(patched, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*more, "--output", str(tmp_path / "parts")]) == 143
    folder.rename(tmp_path / "elsewhere")                                # the state has everything needed
    assert main([*more, "--output", str(tmp_path / "parts"), "--resume"]) == 0
    (tmp_path / "elsewhere").rename(folder)
    same_result(tmp_path / "whole", tmp_path / "parts")
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "whole/model" / file).read_bytes() == (folder / file).read_bytes()
    (tmp_path / "first/state").rename(tmp_path / "kept")
    assert main([*more, "--output", str(tmp_path / "first")]) == 2
    assert "which the run would overwrite" in capsys.readouterr().err
    for option, value in (("--width", "32"), ("--tokenizer", str(folder)), ("--vocab-size", "350")):   # its own, too
        capsys.readouterr()
        assert main([*more, "--output", str(tmp_path / "other"), option, value]) == 2
        assert f"{option} with --encoder" in capsys.readouterr().err


def test_a_run_killed_before_its_first_state_begins_again_with_the_encoder_that_moved_and_no_other(
        text, tmp_path, monkeypatch, capsys):
    assert run(text, tmp_path / "first") == 0
    for place in ("there", "elsewhere"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "there")
    shutil.copytree(tmp_path / "first/model", "encoder")
    more = ["--corpus", str(text), "--encoder", "encoder", *SIZES[SIZES.index("--heldout-share"):],
            "--steps", "4", "--warmup", "1", "--batch-tokens", "384", "--evaluations", "2"]
    assert main([*more, "--output", "../whole"]) == 0

    def killed():
        raise MemoryError                                                # no state is saved

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        interrupt(patched, 1, killed)
        main([*more, "--output", "../run"])
    assert not (tmp_path / "run/state").exists()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--resume", "--output", "../run", "--tokenizer", "../first/model"]) == 2
    assert "--tokenizer ../first/model, where the run has None" in capsys.readouterr().err
    assert main(["--resume", "--output", "../run", "--encoder", "../whole/model"]) == 2
    assert "../whole/model: other weights than those with which the run began" in capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert main(["--resume", "--output", "../again"]) == 0               # 'encoder' is in the folder where it began
    (tmp_path / "there/encoder").rename("moved")
    assert main(["--resume", "--output", "../run", "--encoder", "moved"]) == 0
    same_result(tmp_path / "whole", tmp_path / "run")
    same_result(tmp_path / "whole", tmp_path / "again")


def test_whose_encoder_it_was_keeps_its_distances_and_its_dropout(text, corpus, tmp_path):
    model = small_model(corpus, position_buckets=32, max_distance=96, spare_rows=7)
    published = replace(model.config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, cls_dropout=0.3)
    export_encoder(model, published, corpus.tokenizer, tmp_path / "theirs")
    assert main(["--corpus", str(text), "--encoder", str(tmp_path / "theirs"), "--output",
                          str(tmp_path / "ours"), *SIZES[SIZES.index("--heldout-share"):], "--steps", "2", "--warmup",
                          "1", "--batch-tokens", "384", "--evaluations", "1", "--objective", "mlm"]) == 0
    config = minipref.load_encoder(tmp_path / "ours/model").config
    assert config == minipref.load_encoder(tmp_path / "theirs").config
    assert (config.position_buckets, config.max_distance) == (32, 96)
    assert (config.hidden_dropout_prob, config.cls_dropout) == (0.1, 0.3)


# --- What is shipped ---

@pytest.mark.parametrize("options", [["--sharing", "gdes"], ["--sharing", "es"], ["--sharing", "nes"],
                                     ["--objective", "mlm"]], ids=lambda options: options[1])
def test_only_the_encoder_is_shipped_with_its_table_summed_up(text, tmp_path, options):
    assert run(text, tmp_path, *options) == 0
    state, _ = read_state(tmp_path / "state")
    table = state["model.generator.word_embeddings.weight"]
    if options[1] == "gdes":
        assert state["model.discriminator.word_embeddings.weight"].abs().max() > 0
        table = table + state["model.discriminator.word_embeddings.weight"]
    elif options[1] == "nes":
        table = state["model.discriminator.word_embeddings.weight"]
    encoder = minipref.load_encoder(tmp_path / "model")
    assert torch.equal(encoder.word_embeddings.weight, table.half().float())
    side = "generator" if options[1] == "mlm" else "discriminator"
    for name, parameter in encoder.named_parameters():
        if name != "word_embeddings.weight":
            assert torch.equal(parameter, state[f"model.{side}.{name}"].half().float()), name
    assert encoder.load_report.heads_skipped == []
    assert encoder.config.hidden_dropout_prob == encoder.config.attention_probs_dropout_prob == 0.0


def test_transformers_loads_what_is_shipped_and_computes_the_same(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert run(text, tmp_path) == 0
    theirs, loading = transformers.AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32,
                                                             output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(theirs).__name__ == "DebertaV2Model"
    ours, tokenizer = minipref.load_encoder(tmp_path / "model"), minipref.load_tokenizer(tmp_path / "model")
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode("a fire keeps the camp warm " * 6), tokenizer.sep_id]])
    with torch.no_grad():
        mine = ours(ids, torch.ones_like(ids, dtype=torch.bool))
        reference = theirs.eval()(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert (mine - reference).abs().max() < 1e-4 * reference.abs().max()


# --- Text and arguments that are wrong ---

def test_documents_come_from_every_kind_of_file_in_the_order_of_their_names(tmp_path):
    line = '{"text": "%s", "source": "somewhere"}\n'
    (tmp_path / "b.jsonl").write_text(line % "two" + "\n" + line % "three")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((line % "one").encode()))
    (tmp_path / "c.txt").write_text("four\nstill four\r\n\r\nfive\n\n\n\nsix")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/e.txt").write_text("seven\neight\n")
    (tmp_path / "f.jsonl.txt").write_text("nine\nstill nine\n \t\nten")
    (tmp_path / "notes.md").write_text("not text to train on")
    wanted = ["one", "two", "three", "four\nstill four", "five", "six", "seven", "eight", "nine\nstill nine", "ten"]
    assert [d.strip() for d in read_corpus([tmp_path])] == wanted
    assert read_corpus([tmp_path / "b.jsonl"]) == ["two", "three"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("x.jsonl", b'{"text": "fine"}\n{"text": 5}\n', "row 2"),
    ("x.jsonl", b'{"text": "fine"}\n\n["text"]\n', "row 3"),
    ("x.jsonl", b"plain\n", "row 1"),
    ("x.jsonl.gz", b"not gzip", "UTF-8 text"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "fine"}', mtime=0)[:-9], "UTF-8 text"),
    ("x.txt", b"\xff\xfe\xff", "UTF-8 text"),
    ("x.csv", b"a,b", "a file or folder of"),
])
def test_a_file_that_is_not_text_is_named_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as problem:
        read_corpus([tmp_path / name])
    assert name in str(problem.value)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--corpus", "nowhere"], "no such file"),
    (["--corpus", "."], "no text in this folder"),
    (["--corpus", "tiny.txt"], "held out"),
    ([], "--corpus"),
    (["--corpus", "tiny.txt", "--steps", "0"], "number from 1"),
    (["--corpus", "tiny.txt", "--long-share", "2"], "--long-share"),
    (["--corpus", "tiny.txt", "--length", "9999"], "--length"),
    (["--corpus", "tiny.txt", "--length", "3"], "--length"),
    (["--corpus", "tiny.txt", "--init-std", "0"], "--init-std"),
    (["--corpus", "tiny.txt", "--seed", "-1"], "--seed"),
    (["--corpus", "tiny.txt", "--seed", str(2**63)], "--seed"),
    (["--corpus", "tiny.txt", "--steps", "300"], "--warmup 400"),
    (["--corpus", "tiny.txt", "--sharing", "some"], "some"),
    (["--corpus", "tiny.txt", "--encoder", "nowhere"], "nowhere"),
])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    if "tiny.txt" in arguments:
        (tmp_path / "tiny.txt").write_text("one line")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_corpus_too_short_for_one_batch_says_so(text, tmp_path, capsys):
    assert main(["--corpus", str(text), "--output", str(tmp_path), *SIZES, "--batch-tokens", "1000000"]) == 2
    assert "tokens of text" in capsys.readouterr().err
    assert main(["--corpus", str(text), "--output", str(tmp_path), *SIZES, "--heldout-share", "0.001",
                          "--length", "300", "--long-length", "300", "--batch-tokens", "600"]) == 2
    assert "--heldout-share" in capsys.readouterr().err


def test_tokens_are_those_that_were_read_where_the_lengths_do_not_divide_the_batch(text, tmp_path):
    assert run(text, tmp_path, "--batch-tokens", "400", "--long-share", "0") == 0
    assert [row["tokens"] for row in rows_of(tmp_path / "metrics.csv")] == [n * 384 for n in (4, 8, 12, 16)]
