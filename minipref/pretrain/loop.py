"""The pretraining run: preparation and training loop.

What is unusual here: generator and discriminator have separate optimizers, learning rates and gradient norms, as with
Microsoft's `--decoupled_training`. With GDES and NES a step has two updates (DeBERTaV3, section 3.3): first the
generator's, then the discriminator's on the sampled tokens. With ES both losses train one table, so there is one
backward pass on their sum before both updates.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minipref import __version__, runtime, threads
from minipref.checkpoint import encoder_tensors, load_encoder, write_checkpoint
from minipref.config import EncoderConfig
from minipref.fast import accelerate
from minipref.optim import AdamW, clip_gradients, cosine_with_warmup, decay_groups
from minipref.predictor import check_vocabulary
from minipref.pretrain.corpus import Corpus, PackedWindows, heldout_batches, load_corpus, step_windows
from minipref.pretrain.evaluation import evaluate, summary
from minipref.pretrain.objective import RTD_WEIGHT, Pretraining, masked_token_loss, replaced_token_loss
from minipref.run import folder, log
from minipref.run.signals import StopSignal
from minipref.run.state import keep_globals, load_state, save_state, seed_everything, weights_sha256
from minipref.runtime import InputError, RunError, Stopped, autocast
from minipref.tokenizer import Tokenizer

PROGRAM = "python -m minipref.pretrain"
PATHS = ("corpus", "encoder", "tokenizer")         # options that name files, which may move during a run
ADAM = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}      # v3's
MAX_GRADIENT_NORM = 1.0


@dataclass
class PretrainState:
    """The state of a run apart from the parameters, the optimizers and the random generators."""

    step: int = 0                        # steps taken
    mlm_loss_sum: float = 0.0            # over the steps since the last evaluation
    rtd_loss_sum: float = 0.0
    loss_steps: int = 0                  # their number,
    tokens: int = 0                      # their tokens,
    seconds: float = 0.0                 # their wall-clock time,
    processor_seconds: float = 0.0       # and their processor time, summed over cores
    history: list[dict] = field(default_factory=list)    # metrics.csv
    timing: list[dict] = field(default_factory=list)     # timing.csv


@keep_globals()
def pretrain(options: argparse.Namespace) -> None:
    """A pretraining run in a locked folder."""
    run = Path(options.output)
    with (folder.lock_run(run, PROGRAM, options.resume, options.encoder),
          folder.resume_hint(run, f"{PROGRAM} --resume --output")):
        fit(run, options, resuming=options.resume and folder.can_resume(run))


def fit(run: Path, options: argparse.Namespace, resuming: bool) -> None:
    """Build or restore the model, train, evaluate, and export the encoder."""
    if options.threads:
        torch.set_num_threads(options.threads)
    seed_everything(options.seed)
    device = runtime.choose_device(options.device)
    precision = runtime.choose_precision(options.precision, device)
    precision = "fp32" if precision == "fp16" else precision               # fp16 would need a loss scaler

    encoder = load_encoder(options.encoder) if options.encoder and not resuming else None
    corpus = load_corpus(options.corpus, options.heldout_share,
                         run / "model" if resuming else options.encoder or options.tokenizer, options.vocab_size)
    export_config = (EncoderConfig(**folder.read_manifest(run, PROGRAM)["encoder"]) if resuming else encoder.config
                     if encoder else fresh_config(options, corpus.tokenizer))
    check_vocabulary(corpus.tokenizer, export_config.vocab_size, options.encoder or run)
    short, long = (PackedWindows(corpus.train, length, options.batch_tokens // length, options.seed,
                                 corpus.tokenizer.cls_id)
                   for length in (options.length, options.long_length if options.long_share else options.length))
    heldout = heldout_batches(corpus, options.length, options.heldout_tokens, device)

    config = replace(export_config, hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout)
    model = Pretraining(config, corpus.tokenizer, options.objective, options.sharing)
    if encoder:
        model.load_encoder_weights(encoder)
    accelerate(model).to(device).train()
    parts = model.trainable_parts()                                        # generator, for "rtd" discriminator
    optimizers = [AdamW(decay_groups(part, ADAM["weight_decay"]), **ADAM) for part in parts]
    joint = options.objective == "rtd" and options.sharing == "es"         # both losses train one table

    log_header(options, model, corpus, device, precision)
    state = PretrainState()
    fingerprint = {"corpus": corpus.sha256, "precision": precision, "minipref": __version__}
    fingerprint |= folder.machine_fingerprint(device)
    trained_encoder = weights_sha256(encoder) if encoder else None
    if options.resume:
        if not resuming and folder.read_manifest(run, PROGRAM)["trained_encoder"] != trained_encoder:
            raise InputError(file=options.encoder, found="other weights than those with which the run began",
                             expected="the same encoder, or a new run")
        folder.check_manifest(run, PROGRAM, {}, fingerprint, {name: getattr(options, name) for name in PATHS})
    if resuming:
        state = load_state(run / "state", state, model, optimizers)
        folder.check_report(run, state.step == options.steps)
        folder.write_logs(run, state)
        print(f"resumed at step {state.step:,} of {options.steps:,}", flush=True)
    else:
        stored = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
        folder.write_manifest(run, {"program": PROGRAM, "options": stored, "hyperparameters": {},
                                    "fingerprint": fingerprint, "encoder": asdict(export_config),
                                    "trained_encoder": trained_encoder})
        corpus.tokenizer.save(run / "model")
    eval_steps = {round(options.steps * (k + 1) / options.evaluations) for k in range(options.evaluations)}
    clock = log.Clock()
    bar = tqdm(total=options.steps * options.batch_tokens, initial=state.step * options.batch_tokens,
               unit=" tokens", unit_scale=True, disable=None, dynamic_ncols=True, smoothing=0.02)
    with bar, StopSignal() as stop:
        for step in range(state.step, options.steps):
            input_ids = step_windows(step, short, long, options.long_share).to(device)              # (B, L)
            # Steps 1 to total of total + 1: neither the first nor the last step has a learning rate of 0.
            lr_scale = cosine_with_warmup(step + 1, options.steps + 1, options.warmup, 1.0)
            lr, discriminator_lr = lr_scale * options.lr, lr_scale * options.discriminator_lr

            # The generator predicts the masked tokens.
            with autocast(device, precision):
                is_masked, corrupted_ids, mlm_logits = model.corrupt(input_ids)
            mlm_loss = masked_token_loss(mlm_logits, input_ids, is_masked)
            if not joint:
                mlm_loss.backward()
                clip_and_step(optimizers[0], parts[0], lr, mlm_loss)

            # The discriminator classifies every token of the corrupted text.
            if options.objective == "rtd":
                with autocast(device, precision):
                    rtd_logits = model.discriminate(corrupted_ids)
                rtd_loss = replaced_token_loss(rtd_logits, corrupted_ids, input_ids)
                (RTD_WEIGHT * rtd_loss + (mlm_loss if joint else 0)).backward()
                if joint:
                    clip_and_step(optimizers[0], parts[0], lr, mlm_loss)
                clip_and_step(optimizers[1], parts[1], discriminator_lr, rtd_loss)
                state.rtd_loss_sum += rtd_loss.item()

            state.mlm_loss_sum += mlm_loss.item()
            state.tokens += input_ids.numel()
            state.step, state.loss_steps = step + 1, state.loss_steps + 1
            seconds, processor_seconds = clock.lap()
            state.seconds += seconds
            state.processor_seconds += processor_seconds
            bar.update(input_ids.numel())

            if state.step in eval_steps:
                record_evaluation(state, lr, evaluate(model, heldout, corpus.counts, precision))
                bar.write(summary(state.history[-1]))
                export_encoder(model, export_config, corpus.tokenizer, run / "model")
                save_state(run / "state", state, model, optimizers)
                folder.write_logs(run, state)
                clock.lap()                                                # excludes the time of the evaluation
            try:
                stop.check()
            except Stopped:
                save_state(run / "state", state, model, optimizers)
                raise
    if not folder.is_finished(run):
        runtime.write_json(run / "report.json", {"parameters": count(model.kept_encoder()[0]), **state.history[-1]})


def clip_and_step(optimizer: AdamW, part: nn.Module, lr: float, loss: Tensor) -> None:
    """Clip, step, and zero the gradients. Errors: `RunError`, before the step, where loss or norm is not finite."""
    norm = clip_gradients(part.parameters(), MAX_GRADIENT_NORM)
    if not math.isfinite(norm) or not math.isfinite(loss.item()):
        raise RunError(f"loss {loss.item()}, gradient norm {norm} at a learning rate of {lr:.1e}. A lower --lr or "
                       "--discriminator-lr, or --precision fp32, usually helps.")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def record_evaluation(state: PretrainState, lr: float, scores: dict[str, float]) -> None:
    """Add a row to `history` and `timing`, and reset the sums."""
    tokens_before = state.history[-1]["tokens"] if state.history else 0
    state.history.append({"step": state.step, "tokens": tokens_before + state.tokens, "lr": round(lr, 7),
                          "train_mlm_loss": round(state.mlm_loss_sum / state.loss_steps, 5),
                          "train_rtd_loss": round(state.rtd_loss_sum / state.loss_steps, 5)} | scores)
    state.timing.append({"step": state.step, "seconds": round(state.seconds, 1),
                         "processor_seconds": round(state.processor_seconds, 1),
                         "tokens_per_second": round(state.tokens / state.seconds)})
    state.mlm_loss_sum = state.rtd_loss_sum = state.seconds = state.processor_seconds = 0.0
    state.loss_steps = state.tokens = 0


def fresh_config(options: argparse.Namespace, tokenizer: Tokenizer) -> EncoderConfig:
    """A v3 encoder of the sizes in the options. Its dropout is 0: with v3's 0.1, fine-tuning a small encoder does not
    improve on the class-prior baseline (an earlier trial, not kept)."""
    if options.width % options.heads:
        raise InputError(found=f"--width {options.width} with --heads {options.heads}",
                         expected="a multiple of the heads")
    return EncoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=options.width,
                         num_attention_heads=options.heads, num_hidden_layers=options.layers,
                         intermediate_size=options.feed_forward, initializer_range=options.init_std,
                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cls_dropout=0.0,
                         pad_token_id=tokenizer.pad_id)


def export_encoder(model: Pretraining, config: EncoderConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the final encoder with one embedding table in the Hugging Face layout, float16, and the tokenizer."""
    encoder, table = model.kept_encoder()
    tensors = encoder_tensors(encoder) | {"deberta.embeddings.word_embeddings.weight": table}
    fields = config.to_json()
    of_a_classifier = ["id2label", "label2id", "problem_type"]
    if config.cls_dropout == config.hidden_dropout_prob:                   # the default of a missing field
        of_a_classifier.append("cls_dropout")
    for name in of_a_classifier:
        del fields[name]
    tokenizer.save(folder)
    write_checkpoint(tensors, fields | {"architectures": ["DebertaV2Model"], "dtype": "float16"}, folder, torch.float16)


def log_header(options: argparse.Namespace, model: Pretraining, corpus: Corpus, device: torch.device, precision: str
               ) -> None:
    """Print encoder, corpus, steps and machine."""
    train_tokens, heldout_tokens = (sum(map(len, part)) for part in (corpus.train, corpus.heldout))
    tokens = options.steps * options.batch_tokens
    print(f"encoder    {options.encoder or 'fresh weights'}; {count(model):,} parameters, "
          f"{count(model.kept_encoder()[0]):,} of them kept")
    print(f"corpus     {len(corpus.train):,} documents, {train_tokens:,} tokens; held out: {len(corpus.heldout):,} "
          f"documents, {heldout_tokens:,} tokens")
    print(f"steps      {options.steps:,}, {options.warmup:,} of them warmup; {tokens:,} tokens, "
          f"{tokens / train_tokens:.2f} epochs")
    print(f"machine    {device.type}, {precision}, {torch.get_num_threads()} threads{threads.NOTE}, "
          f"torch {torch.__version__}", flush=True)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
