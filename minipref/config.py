"""What the encoder is: a dozen numbers read from a Hugging Face `config.json`, and everything else refused.

Unusual here: DeBERTa-v2/v3 code usually carries a switch for every variant that was ever tried (`if "c2p" in
pos_att_type ...`). minipref implements the one that was released as v3, so the switches are *checked* once, in
`from_json`, and never appear again. What differs from v3 in kind is an error that names the field; what differs in
size (width, depth, heads, span) is just another `EncoderConfig`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from minipref.errors import InputError, shown
from minipref.files import read_json

# Field of config.json -> the only value v3 has for it. A field that is absent counts as `ABSENT_MEANS`.
V3_FACTS = {
    "model_type": "deberta-v2",         # v3 is v2's architecture, pretrained differently
    "relative_attention": True,
    "share_att_key": True,              # positions go through the layer's own query and key projections
    "norm_rel_ebd": "layer_norm",       # the relative table is LayerNorm'ed before it is projected
    "pos_att_type": {"c2p", "p2c"},
    "position_biased_input": False,     # no absolute positions at the input
    "type_vocab_size": 0,               # no segment embeddings
    "conv_kernel_size": 0,              # v2-xlarge and xxlarge add a convolution, v3 does not
    "hidden_act": "gelu",               # the exact one, with erf
    "pooler_hidden_act": "gelu",
}
ABSENT_MEANS = {  # transformers' own defaults, which is what the absence of a field means to whoever wrote the file
    "model_type": "deberta-v2", "relative_attention": False, "share_att_key": False, "norm_rel_ebd": "none",
    "pos_att_type": set(), "position_biased_input": True, "type_vocab_size": 0, "conv_kernel_size": 0,
    "hidden_act": "gelu", "pooler_hidden_act": "gelu",
}
LARGEST = 1 << 22          # of any size: mDeBERTa's vocabulary has 250,101 ids, v2-xxlarge's feed-forward 6,144 numbers
LABELS = ("A", "B", "tie")


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a DeBERTa-v3 encoder. The defaults are v3-small's.

    The letters are those used all through minipref (legend in `attention.py`).
    """

    vocab_size: int = 128_100      # V
    width: int = 768               # D
    heads: int = 12                # H, each of d = D / H
    layers: int = 6                # N
    feed_forward: int = 3072       # F
    span: int = 256                # buckets per direction: the relative table has R = 2 * span rows
    max_distance: int = 512        # distances are clamped to +-(max_distance - 1)
    norm_eps: float = 1e-7
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    pooler_dropout: float = 0.0
    head_dropout: float = 0.1
    init_std: float = 0.02
    pad_id: int = 0

    @property
    def head_width(self) -> int:   # d
        return self.width // self.heads

    @classmethod
    def from_json(cls, path: str | Path) -> "EncoderConfig":
        """Read a Hugging Face `config.json`.

        Errors: `InputError` naming the file and the field, for a file that is not a JSON object, a field of the
        wrong type or range, and anything that is not v3-shaped.
        """
        fields = read_json(path, "a Hugging Face folder with config.json and model.safetensors")
        _check_v3(fields, path)
        number = _NumberReader(fields, path)
        length = number.whole("max_position_embeddings", 512)
        max_distance = number.whole("max_relative_positions", -1, lowest=-1)
        hidden_dropout = number.rate("hidden_dropout_prob", 0.1)
        config = cls(
            vocab_size=number.whole("vocab_size"),
            width=number.whole("hidden_size"),
            heads=number.whole("num_attention_heads"),
            layers=number.whole("num_hidden_layers"),
            feed_forward=number.whole("intermediate_size"),
            span=number.whole("position_buckets", lowest=4),
            max_distance=max_distance if max_distance > 0 else length,
            norm_eps=number.real("layer_norm_eps", 1e-7),
            hidden_dropout=hidden_dropout,
            attention_dropout=number.rate("attention_probs_dropout_prob", 0.1),
            pooler_dropout=number.rate("pooler_dropout", 0.0),
            head_dropout=number.rate("cls_dropout", hidden_dropout),
            init_std=number.real("initializer_range", 0.02),
            pad_id=number.whole("pad_token_id", 0, lowest=0),
        )
        config._check_sizes(path, number.whole("attention_head_size", config.head_width))
        return config

    def _check_sizes(self, path: str | Path, head_width: int) -> None:
        """The relations between sizes that no single field shows."""
        if self.width % self.heads:
            raise InputError(file=path, found=f"hidden_size {self.width} with num_attention_heads {self.heads}",
                             expected="a width that is a multiple of the heads")
        if head_width != self.head_width:
            raise InputError(file=path, found=f"attention_head_size is {head_width}",
                             expected=f"hidden_size / num_attention_heads ({self.width} / {self.heads})")
        if self.max_distance - 1 <= self.span // 2:
            raise InputError(file=path, found=f"position_buckets {self.span} with max_distance {self.max_distance}",
                             expected="max_distance - 1 > position_buckets / 2, or there is no logarithmic region")
        if self.pad_id >= self.vocab_size:
            raise InputError(file=path, found=f"pad_token_id {self.pad_id}",
                             expected=f"an id below vocab_size {self.vocab_size}")

    def to_json(self) -> dict:
        """The same as the fields of a Hugging Face `config.json` for a three-way sequence classifier."""
        return {
            "architectures": ["DebertaV2ForSequenceClassification"],
            "model_type": "deberta-v2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.feed_forward,
            "position_buckets": self.span,
            "max_relative_positions": self.max_distance,
            "max_position_embeddings": self.max_distance,
            "layer_norm_eps": self.norm_eps,
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "pooler_dropout": self.pooler_dropout,
            "cls_dropout": self.head_dropout,
            "initializer_range": self.init_std,
            "pad_token_id": self.pad_id,
            "pooler_hidden_size": self.width,
            "hidden_act": "gelu",
            "pooler_hidden_act": "gelu",
            "relative_attention": True,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
            "id2label": {str(i): label for i, label in enumerate(LABELS)},
            "label2id": {label: i for i, label in enumerate(LABELS)},
            "problem_type": "single_label_classification",
            "dtype": "float32",
        }


def _check_v3(fields: dict, path: str | Path) -> None:
    """Refuse, by name, a configuration that is a different architecture from v3."""
    for name, wanted in V3_FACTS.items():
        found = fields.get(name, ABSENT_MEANS[name])
        if name == "pos_att_type":     # "p2c|c2p" in Microsoft's files, ["p2c", "c2p"] in newer ones
            parts = found.split("|") if isinstance(found, str) else found
            same = isinstance(parts, list | set) and {str(part).strip().lower() for part in parts} == wanted
        else:
            same = type(found) is type(wanted) and found == wanted
        if not same:
            said = shown(found) if name in fields else "nothing"
            raise InputError(file=path, found=f"{name} is {said}",
                             expected=f"{' and '.join(sorted(wanted)) if isinstance(wanted, set) else repr(wanted)}, "
                                      "as DeBERTa-v3 has it; minipref implements no other variant")
    for name, wanted in {"embedding_size": "hidden_size", "pooler_hidden_size": "hidden_size"}.items():
        if name in fields and fields[name] != fields.get(wanted):
            raise InputError(file=path, found=f"{name} is {shown(fields[name])}",
                             expected=f"the same as {wanted} ({shown(fields.get(wanted))})")


class _NumberReader:
    """Numbers out of a JSON object, each checked for type and range, each error naming its field."""

    REQUIRED = object()

    def __init__(self, fields: dict, path: str | Path):
        self.fields, self.path = fields, path

    def _get(self, name: str, default: object, fits, expected: str):
        value = self.fields.get(name)
        if value is None and default is not self.REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            found = f"{name} is {shown(value)}" if name in self.fields else f"no field {name}"
            raise InputError(file=self.path, found=found, expected=expected)
        return value

    def whole(self, name: str, default: object = REQUIRED, lowest: int = 1) -> int:
        return self._get(name, default, lambda v: isinstance(v, int) and lowest <= v <= LARGEST,
                         f"a whole number from {lowest} to {LARGEST}")

    def real(self, name: str, default: object = REQUIRED) -> float:
        return float(self._get(name, default, lambda v: 0 < v < 1, "a number between 0 and 1"))

    def rate(self, name: str, default: object = REQUIRED) -> float:
        return float(self._get(name, default, lambda v: 0 <= v < 1, "a dropout rate, from 0 to below 1"))


# --- training ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """The figures of a fine-tuning run that change its result. `RECIPES` has three sets, each with its sources."""

    epochs: int
    batch_size: int            # rows in one pass forward and backward, over all processes
    eval_batch_size: int
    lr: float                  # at the peak
    warmup: float              # steps; below 1, a share of all steps
    weight_decay: float
    adam_beta2: float          # how long the mean square of a gradient remembers: 1 / (1 - beta2) steps
    adam_eps: float
    clip: float                # the joint norm of all gradients is scaled down to this
    head_dropout: float
    patience: int              # evaluations without a better log loss before the run stops; 0: never
    evals_per_epoch: int
    max_length: int            # tokens of the whole sequence
    accumulate: int = 1        # passes per optimizer step
    valid_fraction: float = 0.1
    field_loss: float = 0.0    # the weight of `FieldHead`'s cross-entropy; 0: no such head
    swap: bool = True          # show half of the rows, drawn anew each epoch, with A and B exchanged

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps in a pass over `rows` training rows; the last pass and the last step may be smaller."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.accumulate)

    def warmup_steps(self, total_steps: int) -> int:
        """Whole steps of warmup; never more than a tenth of the run, or the peak would not be reached in time."""
        steps = round(self.warmup * total_steps) if self.warmup < 1 else round(self.warmup)
        return min(steps, max(1, total_steps // 10))


MNLI = "Microsoft's mnli.sh for v3-small"
RECIPES: dict[str, dict[str, tuple[int | float, str]]] = {   # recipe -> figure -> (value, where it comes from)
    "seed": {
        "epochs": (20, "the recipe this project started from"),
        "batch_size": (8, "the recipe this project started from"),
        "eval_batch_size": (32, "the recipe this project started from"),
        "lr": (1.6e-5, f"{MNLI}: 4.5e-5 at batch 64, times sqrt(8 / 64)"),
        "warmup": (0.08, f"{MNLI}: 1,500 of 18,408 steps"),
        "weight_decay": (0.01, f"{MNLI}; none on biases and LayerNorms"),
        "adam_beta2": (0.999, "torch's and transformers' default"),
        "adam_eps": (1e-6, MNLI),
        "clip": (1.0, MNLI),
        "head_dropout": (0.5, "the recipe this project started from"),
        "patience": (2, "the recipe this project started from"),
        "evals_per_epoch": (1, "the recipe this project started from"),
        "max_length": (512, "the longest the encoder was pretrained on"),
        "field_loss": (0.0, "the recipe this project started from"),
    },
    "microsoft": {
        "epochs": (3, MNLI),
        "batch_size": (64, MNLI),
        "eval_batch_size": (64, "has no influence on the result beyond rounding"),
        "lr": (4.5e-5, MNLI),
        "warmup": (1500, MNLI),
        "weight_decay": (0.01, f"{MNLI}; none on biases and LayerNorms"),
        "adam_beta2": (0.999, "torch's and transformers' default"),
        "adam_eps": (1e-6, MNLI),
        "clip": (1.0, MNLI),
        "head_dropout": (0.2, MNLI),
        "patience": (0, "the published recipe runs to its end"),
        "evals_per_epoch": (2, "so that the best of six states is kept"),
        "max_length": (512, "the longest the encoder was pretrained on"),
        "field_loss": (0.0, MNLI),
    },
    "tiny": {
        "epochs": (2, "trials in docs/experiments.md"),
        "batch_size": (32, "trials in docs/experiments.md"),
        "eval_batch_size": (128, "has no influence on the result beyond rounding"),
        "lr": (5e-4, "trials in docs/experiments.md"),
        "warmup": (0.05, "docs/training.md, with and without each"),
        "weight_decay": (0.01, f"{MNLI}; none on biases and LayerNorms"),
        "adam_beta2": (0.98, "v3's pretraining; trials in docs/experiments.md"),
        "adam_eps": (1e-6, MNLI),
        "clip": (1.0, MNLI),
        "head_dropout": (0.0, "trials in docs/experiments.md"),
        "patience": (2, "an epoch's evaluations"),
        "evals_per_epoch": (2, "to see it learn"),
        "max_length": (256, "no pair of the sample is longer"),
        "field_loss": (1.0, "trials in docs/experiments.md"),
    },
}


def recipe(name: str) -> TrainConfig:
    """A recipe's figures, without their sources."""
    return TrainConfig(**{figure: value for figure, (value, _) in RECIPES[name].items()})
