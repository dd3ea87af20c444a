"""The hyperparameters of a fine-tuning run and four named presets, with a source for each value.

`train.py --recipe NAME` chooses a preset; other options override single values.
"""

import math
from argparse import ArgumentTypeError
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from minipref.config import EncoderConfig
from minipref.runtime import check_folder


def _between(lowest: float, highest: float, help: str, default=MISSING):
    """A hyperparameter, with the limits and the help text of its option in train.py."""
    return field(default=default, metadata={"lowest": lowest, "highest": highest, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The hyperparameters that change a run's result."""

    epochs: int = _between(1, 10**4, "training epochs")
    batch_size: int = _between(1, 10**9, "rows of a micro-batch, over all processes")
    eval_batch_size: int = _between(1, 10**9, "rows of a batch in evaluation")
    lr: float = _between(0, 1e30, "peak learning rate")
    warmup: float = _between(0, 10**9, "steps of warmup; below 1, a fraction of all steps")
    weight_decay: float = _between(0, 1, "weight decay of matrices and embeddings")
    adam_beta2: float = _between(0, 0.999999, "AdamW's decay rate of the mean of squared gradients")
    adam_eps: float = _between(0, 1, "added to AdamW's denominator")
    clip: float = _between(0, 10**9, "maximum L2 norm of all gradients together")
    head_dropout: float = _between(0, 0.999, "dropout before the classifier")
    patience: int = _between(0, 10**9, "evaluations without a better log loss before stopping; 0 never stops")
    evals_per_epoch: int = _between(1, 10**4, "evaluations per epoch")
    max_length: int = _between(8, 1 << 16, "maximum length of a sequence, in tokens")
    accumulate: int = _between(1, 10**9, "micro-batches per optimizer step", default=1)
    valid_fraction: float = _between(0.001, 0.9, "fraction of the rows used for validation (default 0.1)", default=0.1)
    head_lr: float = _between(0, 1e30, "peak learning rate of the new head; 0: as --lr", default=0.0)
    layer_decay: float = _between(0.01, 1, "learning rate of a layer, relative to the layer above it", default=1.0)
    label_smoothing: float = _between(0, 0.999, "share of each label spread over all three classes", default=0.0)
    aux_loss: float = _between(0, 1000, "weight of the auxiliary head's loss; 0: no auxiliary head", default=0.0)
    schedule: str = field(default="cosine", metadata={"choices": ("cosine", "linear"), "help": "of the learning rate"})
    swap: bool = True          # swap A and B in half of the rows, drawn anew each epoch

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps in an epoch of `rows` training rows; the last step may have fewer rows."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.accumulate)

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of warmup."""
        return round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)


MNLI = "Microsoft's mnli.sh for v3-small"
ARGS = "the default of Microsoft's DeBERTa/optims/args.py"
ELECTRA = "ELECTRA's configure_finetuning.py"
DEBERTA = "DeBERTa's fine-tuning (arXiv 2006.03654, appendix A)"
RECIPES: dict[str, dict[str, tuple[int | float | str, str]]] = {   # preset -> hyperparameter -> (value, source)
    "baseline": {
        "epochs": (20, "the recipe this project started from"),
        "batch_size": (8, "the recipe this project started from"),
        "eval_batch_size": (32, "the recipe this project started from"),
        "lr": (1.6e-5, f"{MNLI}: 4.5e-5 at batch 64, times sqrt(8 / 64)"),
        "warmup": (0.08, f"{MNLI}: 1,500 of 18,408 steps"),
        "weight_decay": (0.01, f"{ARGS}; none on biases and LayerNorms"),
        "adam_beta2": (0.999, "torch's and transformers' default"),
        "adam_eps": (1e-6, ARGS),
        "clip": (1.0, ARGS),
        "head_dropout": (0.5, "the recipe this project started from"),
        "patience": (2, "the recipe this project started from"),
        "evals_per_epoch": (1, "the recipe this project started from"),
        "max_length": (512, "the longest the encoder was pretrained on"),
        "aux_loss": (0.0, "the recipe this project started from"),
    },
    "microsoft": {
        "epochs": (3, MNLI),
        "batch_size": (64, MNLI),
        "eval_batch_size": (64, "has no influence on the result beyond rounding"),
        "lr": (4.5e-5, MNLI),
        "warmup": (1500, MNLI),
        "weight_decay": (0.01, f"{ARGS}; none on biases and LayerNorms"),
        "adam_beta2": (0.999, "torch's and transformers' default"),
        "adam_eps": (1e-6, ARGS),
        "clip": (1.0, ARGS),
        "head_dropout": (0.2, MNLI),
        "patience": (0, "the published recipe runs to its end"),
        "evals_per_epoch": (2, "so that the best of six states is kept"),
        "max_length": (256, MNLI),
        "aux_loss": (0.0, MNLI),
        "schedule": ("linear", ARGS),
    },
    "competition": {                                      # for the published weights; not measured here
        "epochs": (3, f"{ELECTRA}; not measured here"),
        "batch_size": (32, f"{DEBERTA}: 16 to 64; not measured here"),
        "eval_batch_size": (32, "has no influence on the result beyond rounding"),
        "lr": (3e-5, f"{DEBERTA}: 1.5e-5 to 4e-5 for the base size; not measured here"),
        "warmup": (0.1, f"{ELECTRA}; not measured here"),
        "weight_decay": (0.01, f"{ARGS}; none on biases and LayerNorms"),
        "adam_beta2": (0.999, "torch's and transformers' default"),
        "adam_eps": (1e-6, ARGS),
        "clip": (1.0, ARGS),
        "head_dropout": (0.1, f"{DEBERTA}: 0 to 0.15; not measured here"),
        "patience": (4, "an epoch's evaluations"),
        "evals_per_epoch": (4, "the best score often comes inside an epoch; not measured here"),
        "max_length": (1024, "half of the competition's first 100 rows are longer than 512 tokens; not measured here"),
        "aux_loss": (0.0, "for the small encoder only"),
        "head_lr": (1e-4, "a new head needs larger steps; not measured here"),
        "layer_decay": (0.9, f"{ELECTRA}: 0.8 for its small and base sizes, 0.9 for large; not measured here"),
    },
    "tiny": {
        "epochs": (2, "better than 1; unrecorded trials"),
        "batch_size": (32, "faster than 16 for a slightly worse score; unrecorded trials"),
        "eval_batch_size": (128, "has no influence on the result beyond rounding"),
        "lr": (5e-4, "for batches of 32; unrecorded trials"),
        "warmup": (0.05, "no effect in docs/experiments.md; a precaution"),
        "weight_decay": (0.01, f"{ARGS}; none on biases and LayerNorms"),
        "adam_beta2": (0.98, "v3's pretraining"),
        "adam_eps": (1e-6, ARGS),
        "clip": (1.0, ARGS),
        "head_dropout": (0.0, "an unrecorded trial"),
        "patience": (2, "an epoch's evaluations"),
        "evals_per_epoch": (2, "to see it learn"),
        "max_length": (256, "no pair of the synthetic dataset is longer"),
        "aux_loss": (1.0, "ablations in docs/experiments.md"),
    },
}


def recipe_name(text: str) -> str:
    """argparse type of --recipe."""
    if text == "seed":
        print("note: the recipe 'seed' is now called 'baseline'")
        return "baseline"
    if text not in RECIPES:
        raise ArgumentTypeError(f"{text!r}, expected {', '.join(sorted(RECIPES))}")
    return text


def recipe(name: str) -> TrainConfig:
    """A preset's hyperparameters, without their sources."""
    return TrainConfig(**{parameter: value for parameter, (value, _) in RECIPES[name].items()})


SMALLEST_PUBLISHED = 384           # v3-xsmall's hidden size
RECIPE_RULES = {"tiny": f"the default below a hidden size of {SMALLEST_PUBLISHED}",
                "baseline": f"the default from a hidden size of {SMALLEST_PUBLISHED} on"}


def default_recipe(encoder: str | Path) -> str:
    """The preset for the encoder in a folder, by its hidden size. Errors: `InputError` without a config.json."""
    check_folder(encoder, "a Hugging Face folder with config.json and model.safetensors")
    hidden_size = EncoderConfig.from_json(Path(encoder) / "config.json").hidden_size
    return "tiny" if hidden_size < SMALLEST_PUBLISHED else "baseline"
