"""Fine-tune DeBERTa-v3 on human preferences: options, data, model, loop, report.

    python train.py                                     as `make train`: the real rows and weights if they exist
    python train.py --train data/train.csv --encoder weights/deberta-v3-small --run runs/first
    python train.py --resume --run runs/first           resume a stopped run
    torchrun --standalone --nproc-per-node 4 -- train.py   four processes, on four GPUs or on one CPU

What is unusual here: the order of the rows and the swaps of A and B are functions of (seed, epoch). So a run can stop
after any step; on a CPU it resumes bit for bit from `TrainState`, parameters, optimizer and random generators.
Saving, locking, logging and synchronisation are in `minipref/run/`.
"""

import argparse
import filecmp
import math
import sys
import time
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path

import minipref.threads  # isort: skip  # noqa: F401 - before torch
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from minipref import metrics, runtime, synthetic
from minipref.auxiliary import ModelWithAuxiliaryHead, aux_loss
from minipref.checkpoint import grow_embeddings, load_classifier
from minipref.data import Pair, collate, encode_pairs, epoch_batches, read_pairs, swap_mask
from minipref.fast import accelerate, checkpoint_activations, tune_malloc
from minipref.optim import AdamW, clip_gradients, decay_groups, learning_rates
from minipref.predictor import Judge, check_vocabulary, predict_logits
from minipref.recipes import RECIPES, TrainConfig, default_recipe, recipe_name
from minipref.run import distributed, folder, log
from minipref.run.report import check_resumed, final_report, folds_report
from minipref.run.setup import PATHS, PROGRAM, Setup, hyperparameters, split_rows, warmup, write_or_check_manifest
from minipref.run.signals import StopSignal
from minipref.run.state import keep_globals, load_state, make_deterministic, save_state, seed_everything, weights_sha256
from minipref.runtime import ArgumentParser, InputError, RunError, Stopped, autocast, number, run_program
from minipref.surface import surface_features
from minipref.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
REAL_WEIGHTS, BUNDLED_WEIGHTS = Path("weights/deberta-v3-small"), Path("weights/minipref-tiny")
REAL_ROWS, SYNTHETIC_ROWS = Path("data/train.csv"), Path("data/synthetic/train.csv")
PAD_MULTIPLE = 8                 # tokens: oneDNN compiles a kernel for each matrix shape; this gives fewer shapes
MAX_SKIPPED = 25                 # consecutive fp16 steps that may overflow before the run fails


@dataclass
class TrainState:
    """The state of a run apart from the parameters, the optimizer, the scaler and the random generators."""

    split: str = ""              # SHA-256 of the indices of the training and the validation rows
    step: int = 0                # optimizer steps taken, including those that overflowed
    last_eval: int = 0           # the step of the last evaluation
    best_loss: float = math.inf  # lowest validation log loss so far
    best_step: int = 0
    best_weights: str = ""       # SHA-256 of the best parameters, which model/ holds
    evals_since_best: int = 0
    loss_sum: float = 0.0        # over the training rows since the last evaluation
    loss_rows: int = 0
    lr: float = 0.0              # of the last step
    skipped: int = 0             # fp16 steps that overflowed
    skipped_in_a_row: int = 0
    seconds: float = 0.0         # of training, over all resumes
    history: list[dict] = field(default_factory=list)    # metrics.csv
    timing: list[dict] = field(default_factory=list)     # timing.csv


def main(arguments: list[str] | None = None) -> int:
    def body() -> None:
        with StopSignal() as stop, distributed.process_group():   # no signal interrupts the group's shutdown
            train(resolve_options(parse_arguments(arguments)), stop)

    return run_program("train.py", body, "; a smaller --batch-size with a larger --accumulate takes less memory, as "
                       "does --checkpoint-activations", distributed.rank_suffix())


# --- data -------------------------------------------------------------------------------------------------------------

@keep_globals()
def train(options: argparse.Namespace, stop: StopSignal) -> None:
    """Read, split and tokenize the rows; then train and report once, or once per fold."""
    run, config = Path(options.run), hyperparameters(options)
    device = distributed.local_device(runtime.choose_device(options.device))
    precision = runtime.choose_precision(options.precision, device)
    make_deterministic(device)
    tune_malloc()
    with (folder.lock_run(run, PROGRAM, options.resume, options.encoder),
          folder.resume_hint(run, "python train.py --resume --run")):
        tokenizer = load_tokenizer(options.encoder)
        tokenizer = tokenizer.with_token("\n") if options.newline_token else tokenizer
        pairs = [pair for path in options.train for pair in read_pairs(path, soft=options.soft_labels)][:options.limit]
        held_out = read_pairs(options.valid) if options.valid else []
        splits = split_rows(pairs, held_out, config, options)
        pairs += held_out
        write_or_check_manifest(run, options, config, device, precision)
        tokenized = encode_pairs(pairs, tokenizer, config.max_length, progress=sys.stderr.isatty())
        setup = Setup(options, config, device, precision, tokenizer, pairs, tokenized,
                      synthetic.read_truth(options.train), surface_features(pairs), stop)
        log.log_header(setup, splits, *hints(options))

        logits = []
        for fold, (train_rows, valid_rows) in enumerate(splits, 1):
            if len(splits) > 1:
                print(f"\nfold {fold} of {len(splits)}")
            logits.append(fit(run / f"fold-{fold}" if len(splits) > 1 else run, train_rows, valid_rows, setup))
        if len(splits) > 1:
            folds_report(run, logits, splits, setup)
        print(f"\nto predict: python predict.py test.csv   (uses {run}, the newest run)")


# --- model and loop ---------------------------------------------------------------------------------------------------

def fit(run: Path, train_rows: np.ndarray, valid_rows: np.ndarray, setup: Setup) -> np.ndarray:
    """Train one model and report on it. Returns the validation rows' logits in both orders, (rows, 2, 3)."""
    options, config, device, precision = setup.options, setup.config, setup.device, setup.precision
    tokenizer, tokenized, valid = setup.tokenizer, setup.tokenized, setup.tokenized.take(valid_rows)

    seed_everything(options.seed)
    classifier = load_classifier(options.encoder, device=device)           # a missing head is initialised
    if options.newline_token:
        grow_embeddings(classifier, tokenizer.vocab_size)
    check_vocabulary(tokenizer, classifier.config.vocab_size, options.encoder)
    log.log_model(classifier, run)
    classifier.encoder.config = replace(classifier.config, cls_dropout=config.head_dropout)
    classifier.classifier_dropout.p = config.head_dropout
    classifier.encoder.word_embeddings.weight.requires_grad_(not options.freeze_embeddings)
    model = ModelWithAuxiliaryHead(classifier, tokenizer.sep_id).to(device) if config.aux_loss else classifier
    model = model if options.no_fast or options.compile else accelerate(model)  # equal but for rounding, masks
    if options.checkpoint_activations:
        checkpoint_activations(classifier)
    forward = torch.compile(model, dynamic=True) if options.compile else model
    forward = distributed.wrap_ddp(forward, device)
    distributed.seed_rank(options.seed)
    groups = decay_groups(model, config.weight_decay, config.lr, config.head_lr, config.layer_decay)
    optimizer = AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), eps=config.adam_eps)
    peaks = [config.lr, *(group["peak_lr"] for group in groups)]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    steps_per_epoch = config.steps_per_epoch(len(train_rows))
    total_steps = config.epochs * steps_per_epoch
    warmup_steps, warmup_note = warmup(options, config, total_steps)
    eval_steps = {epoch * steps_per_epoch + round(part * steps_per_epoch / config.evals_per_epoch)
                  for epoch in range(config.epochs) for part in range(1, config.evals_per_epoch + 1)}
    print(f"steps      {total_steps:,} of {config.batch_size * config.accumulate} rows, {warmup_steps:,} of them warmup"
          f"{warmup_note}{f'; {len(eval_steps)} evaluations at most' if len(valid_rows) else ''}")

    def save() -> None:
        state.seconds += clock.lap()[0]
        save_state(run / "state", state, model, [optimizer], scaler)
        folder.write_logs(run, state)

    state = TrainState(folder.json_sha256([train_rows.tolist(), valid_rows.tolist()]))
    clock, last_save, batches_epoch, step_seconds = log.Clock(), time.monotonic(), None, []
    if options.resume and folder.can_resume(run):
        state = load_state(run / "state", state, model, [optimizer], scaler)
        check_resumed(run, state, bool(end_reason(state, total_steps, config)), device)
        folder.write_logs(run, state)
        save_best(run, state, classifier, setup)
        print(f"resumed at step {state.step:,} of {total_steps:,}")
    bar = tqdm(total=config.epochs * len(train_rows), initial=state.step * config.batch_size * config.accumulate,
               unit="pairs", disable=distributed.rank() > 0 or None, dynamic_ncols=True, smoothing=0.05)
    model.train()
    try:
        while True:
            if state.step in eval_steps and state.last_eval < state.step:
                if len(valid_rows):
                    logits = predict_logits(
                        classifier, valid, tokenizer, config.eval_batch_size * config.max_length,
                        config.eval_batch_size, precision, orders=(False,), progress=setup.stop.check, together=True)
                    state.seconds += clock.lap()[0]
                    record_evaluation(state, logits, valid_rows, setup, steps_per_epoch, bar)
                    if state.evals_since_best == 0:
                        state.best_weights = distributed.broadcast(weights_sha256(classifier))
                state.last_eval = state.step
                save()
                save_best(run, state, classifier, setup)                   # after the state: a kill in between is safe
                last_save = time.monotonic()
                setup.stop.check()
            if ended := end_reason(state, total_steps, config):
                break

            # One optimizer step: the mean loss over all rows of its micro-batches, in all processes. Losses are sums
            # over rows. `weight` undoes DDP's division by the number of processes; it is 0 for a process without a row.
            started = time.monotonic()
            epoch, step_in_epoch = divmod(state.step, steps_per_epoch)
            if epoch != batches_epoch:
                batches_epoch, batches = epoch, epoch_batches(tokenized.lengths[train_rows], config.batch_size,
                                                              options.seed, epoch)
                swapped = swap_mask(len(train_rows), options.seed, epoch) & config.swap
            micro_batches = batches[step_in_epoch * config.accumulate:(step_in_epoch + 1) * config.accumulate]
            step_rows, step_loss = sum(map(len, micro_batches)), 0.0
            # Numbered from 1 in a schedule of total + 1 steps, so no step has a learning rate of 0.
            lr, *rates = learning_rates(config.schedule, state.step + 1, total_steps + 1, warmup_steps, peaks)
            optimizer.zero_grad(set_to_none=True)
            for micro_batch in micro_batches:
                rows, swap, weight = distributed.shard_batch(train_rows[micro_batch], swapped[micro_batch])
                input_ids, attention_mask, labels = (tensor.to(device) for tensor in collate(
                    tokenized, rows, swap, tokenizer, PAD_MULTIPLE))       # (B, L), (B, L), (B,)
                with distributed.gradient_sync(forward, now=micro_batch is micro_batches[-1]):
                    with autocast(device, precision):
                        logits = forward(input_ids, attention_mask)        # (B, 3)
                    logits, *aux_logits = logits if config.aux_loss else (logits,)
                    loss = F.cross_entropy(logits.float(), labels, reduction="sum",
                                           label_smoothing=config.label_smoothing)
                    extra = sum(config.aux_loss * aux_loss(logits, aux, labels) for aux in aux_logits)
                    scaler.scale(weight * (loss + extra) / step_rows).backward()
                step_loss += loss.item() / step_rows if weight else 0.0
            step_loss = float(distributed.all_reduce_sum(step_loss))
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(model.parameters(), config.clip)
            check_step(state, step_loss, grad_norm, scaler, [train_rows[b] for b in micro_batches], setup.pairs)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            scaler.step(optimizer)                                         # skips a step that overflowed
            scaler.update()
            state.step, state.lr = state.step + 1, lr

            bar.update(step_rows)
            bar.set_postfix(loss=f"{step_loss:.3f}", lr=f"{lr:.1e}", refresh=False)
            log.log_eta(step_seconds, time.monotonic() - started, total_steps - state.step, bar)
            if distributed.all_reduce_max(time.monotonic() - last_save >= 60 * options.save_every):
                save()
                last_save = time.monotonic()
            setup.stop.check()
    except Stopped:
        save()
        raise
    finally:
        bar.close()
    print(f"ended: {ended}")
    if state.step < total_steps and state.lr > 0.1 * config.lr:
        print(f"           at {state.lr / config.lr:.0%} of the peak learning rate: with fewer --epochs it would have "
              "fallen further, which often lowers the log loss (docs/troubleshooting.md)")
    return final_report(run, classifier, state, ended, train_rows, valid_rows, setup)


def check_step(state: TrainState, loss: float, grad_norm: float, scaler: torch.amp.GradScaler, rows: list[np.ndarray],
               pairs: list[Pair]) -> None:
    """Record the step's loss, or an overflow that the scaler skips. Errors: `RunError` if otherwise not finite."""
    if math.isfinite(grad_norm) and math.isfinite(loss):
        step_rows = sum(map(len, rows))
        state.skipped_in_a_row = 0
        state.loss_sum += loss * step_rows
        state.loss_rows += step_rows
    elif scaler.is_enabled() and state.skipped_in_a_row < MAX_SKIPPED:
        state.skipped += 1
        state.skipped_in_a_row += 1
    else:
        ids = ", ".join(pairs[row].id for batch in rows for row in batch)
        raise RunError(f"step {state.step + 1}: loss {loss}, gradient norm {grad_norm}; rows {ids}. "
                       "A smaller --lr or --precision bf16 or fp32 usually helps (docs/troubleshooting.md).")


def record_evaluation(state: TrainState, logits: np.ndarray, valid_rows: np.ndarray, setup: Setup,
                      steps_per_epoch: int, bar: tqdm) -> None:
    """Score and log an evaluation, and note whether it is the best so far. Errors: `RunError` for non-finite logits."""
    broken = valid_rows[~np.isfinite(logits).all(axis=(1, 2))]
    if len(broken):
        ids = ", ".join(setup.pairs[row].id for row in broken[:20])
        raise RunError(f"step {state.step}: logits that are not finite for {len(broken):,} of {len(valid_rows):,} "
                       f"validation rows: {ids}{', ...' if len(broken) > 20 else ''}. A smaller --lr usually helps.")
    scores = metrics.evaluate(metrics.swap_averaged(logits, 1.0), setup.tokenized.labels[valid_rows])
    improved = scores["log_loss"] < state.best_loss
    state.evals_since_best = 0 if improved else state.evals_since_best + 1
    if improved:
        state.best_loss, state.best_step = scores["log_loss"], state.step
    epoch, train_loss = state.step / steps_per_epoch, state.loss_sum / max(state.loss_rows, 1)
    state.loss_sum, state.loss_rows = 0.0, 0
    state.history.append({
        "step": state.step, "epoch": round(epoch, 4), "train_loss": train_loss, "lr": state.lr,
        **{name: scores[name] for name in ("log_loss", "accuracy", "precision", "recall", "f1", "ece")},
        "skipped": state.skipped, "best": int(improved)})
    state.timing.append({"step": state.step, "seconds": round(state.seconds, 1),
                         "peak_memory_mb": round(log.peak_memory() / 2**20)})
    bar.write(f"epoch {epoch:5.2f}   train loss {train_loss:.4f}   log loss {scores['log_loss']:.4f}   "
              f"accuracy {scores['accuracy']:.3f}   F1 {scores['f1']:.3f}{'   best' if improved else ''}")


def save_best(run: Path, state: TrainState, classifier: nn.Module, setup: Setup) -> None:
    """Write model/ if the state just saved or loaded belongs to the best evaluation.

    The state is saved first: a run that is killed between the two writes model/ when it is resumed.
    """
    is_best = state.best_step == state.step == state.last_eval > 0
    if is_best and distributed.is_main_process() and not folder.is_finished(run):
        Judge(classifier, setup.tokenizer, setup.config.max_length).save(run / "model", replace=True)
        folder.write_latest(run)


def end_reason(state: TrainState, total_steps: int, config: TrainConfig) -> str:
    """The reason to end the loop now, or an empty string."""
    if config.patience and state.evals_since_best >= config.patience:
        return f"no better log loss in {config.patience} evaluations"
    return f"all {config.epochs} epochs done" if state.step == total_steps else ""


# --- options ----------------------------------------------------------------------------------------------------------

def parse_arguments(arguments: list[str] | None) -> dict:
    """The options given on the command line, without defaults: --resume must know which ones the user gave."""
    parser = ArgumentParser(prog="train.py", description="Fine-tune DeBERTa-v3 on human preferences.",
                            argument_default=argparse.SUPPRESS)
    add, add_split = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--train", nargs="+", metavar="CSV", help="labelled rows (default: data/train.csv, else the synthetic dataset)")
    add("--soft-labels", action="store_true", help="--train's label columns hold probabilities, not 0 and 1")
    add_split("--valid", metavar="CSV", help="validation rows (default: a part of the training rows)")
    add("--encoder", metavar="DIR", help="folder with config.json, model.safetensors and a tokenizer")
    add("--run", metavar="DIR", help="the run's folder (default: runs/ and the time)")
    add("--recipe", type=recipe_name, help=f"{', '.join(sorted(RECIPES))} (default: baseline; small encoders: tiny)")
    add("--resume", action="store_true", help="resume the run in --run")
    add_split("--folds", type=number(int, 2, 1000), help="cross-validation with this many folds, one model for each")
    add_split("--all-rows", action="store_true", help="train on every row, without validation")
    for option in fields(TrainConfig):
        if option.metadata and option.name not in ("adam_eps", "clip"):
            allowed = dict(option.metadata)
            if "choices" not in allowed:
                allowed["type"] = number(option.type, allowed.pop("lowest"), allowed.pop("highest"))
            (add_split if option.name == "valid_fraction" else add)(f"--{option.name.replace('_', '-')}", **allowed)
    add("--precision", choices=runtime.PRECISIONS, help="precision of the forward pass; parameters stay float32")
    add("--device", choices=runtime.DEVICES, help="default: a GPU if there is one")
    add("--seed", type=number(int, 0, 2**63 - 1), help="of split, row order, swaps, new weights, dropout (default 42)")
    add("--newline-token", action="store_true", help="add a token for line breaks, which v3's vocabulary lacks")
    add("--no-swap", action="store_true", help="do not swap A and B at random in training")
    add("--freeze-embeddings", action="store_true", help="do not train the word embeddings")
    add("--checkpoint-activations", action="store_true", help="less memory: recompute activations in backward")
    add("--compile", action="store_true", help="use torch.compile instead of minipref/fast/")
    add("--no-fast", action="store_true", help="train the plain model of minipref/model.py, which is slower")
    add("--no-blend", action="store_true", help="do not blend the model with a regression on surface features")
    add("--save-every", type=number(float, 0), metavar="MINUTES", help="time between saved states (default 10)")
    add("--limit", type=number(int, 1), metavar="N", help="use only the first N rows")
    return vars(parser.parse_args(arguments))


DEFAULTS = {"valid": None, "folds": None, "limit": None, "precision": "auto", "device": "auto", "seed": 42,
            "save_every": 10.0} | dict.fromkeys(
    ("soft_labels", "resume", "all_rows", "no_swap", "newline_token", "freeze_embeddings", "checkpoint_activations",
     "compile", "no_fast", "no_blend"), False)


def resolve_options(overrides: dict) -> argparse.Namespace:
    """All options of the run. Options not given have their default, or on --resume the value stored in the run."""
    if overrides.get("resume"):
        if "run" not in overrides:
            raise InputError(found="--resume without --run", expected="the folder of the run to resume")
        return argparse.Namespace(**folder.resumed_options(Path(overrides["run"]), PROGRAM, overrides,
                                                           {"resume", "run", "save_every"}, PATHS))
    options = argparse.Namespace(**DEFAULTS | overrides)
    if "run" not in options:
        options.run = distributed.broadcast(f"runs/{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3])
    if "encoder" not in options:
        places = (REAL_WEIGHTS, HERE / REAL_WEIGHTS, BUNDLED_WEIGHTS, HERE / BUNDLED_WEIGHTS)
        options.encoder = str(next((place for place in places if place.is_dir()), places[-1]))
    if "train" not in options:
        if not (REAL_ROWS.is_file() or SYNTHETIC_ROWS.is_file()) and distributed.is_main_process():
            synthetic.write_dataset(SYNTHETIC_ROWS.parent)
        distributed.barrier()
        options.train = [str(REAL_ROWS if REAL_ROWS.is_file() else SYNTHETIC_ROWS)]
    if "recipe" not in options:
        options.recipe = default_recipe(options.encoder)
    return options


def hints(options: argparse.Namespace) -> tuple[str, str]:
    """How to get the published encoder and real rows, where a substitute is used."""
    files = [Path(place) / "model.safetensors" for place in (options.encoder, HERE / BUNDLED_WEIGHTS)]
    is_bundled = all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)
    return ("   (the small one that ships with minipref; the real one: make weights)" if is_bundled else "",
            "   (the synthetic dataset; real rows: make data)" if options.train == [str(SYNTHETIC_ROWS)] else "")


if __name__ == "__main__":
    sys.exit(main())
