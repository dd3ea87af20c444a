"""The encoder's configuration, read from a Hugging Face `config.json`.

What is unusual here: DeBERTa-v2/v3 code usually has a switch for every variant (`if "c2p" in pos_att_type ...`).
minipref implements only the released v3, so `from_json` *checks* these switches once and the model has none. A file of
another variant is an error that names the field; sizes (hidden size, layers, heads, buckets) may differ.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from minipref.runtime import InputError, read_json, short_repr

LABELS = ("A", "B", "tie")

# Field of config.json -> the only value v3 has for it. An absent field has its value in `ABSENT_MEANS`.
V3_FACTS = {
    "model_type": "deberta-v2",         # v3 has v2's architecture and another pretraining
    "relative_attention": True,
    "share_att_key": True,              # positions go through the layer's own query and key projections
    "norm_rel_ebd": "layer_norm",       # the relative embeddings are LayerNorm'ed before they are projected
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,     # no absolute positions at the input
    "type_vocab_size": 0,               # no segment embeddings
    "conv_kernel_size": 0,              # v2-xlarge and xxlarge add a convolution, v3 does not
    "hidden_act": "gelu",               # the exact one, with erf
    "pooler_hidden_act": "gelu",
}
ABSENT_MEANS = {  # transformers' defaults: the writer of the file relied on them
    "model_type": "deberta-v2", "relative_attention": False, "share_att_key": False, "norm_rel_ebd": "none",
    "pos_att_type": [], "position_biased_input": True, "type_vocab_size": 0, "conv_kernel_size": 0,
    "hidden_act": "gelu", "pooler_hidden_act": "gelu",
}
LARGEST = 1 << 22          # upper limit of any size; mDeBERTa's vocabulary has 250,101 ids


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a DeBERTa-v3 encoder, under config.json's own names. The defaults are v3-small's."""

    vocab_size: int = 128_100            # V
    hidden_size: int = 768               # D
    num_attention_heads: int = 12        # H, each of d = D / H
    num_hidden_layers: int = 6           # N
    intermediate_size: int = 3072        # F
    position_buckets: int = 256          # per direction: the relative table has R = 2 * position_buckets rows
    max_distance: int = 512              # max_relative_positions; where that is -1, max_position_embeddings
    layer_norm_eps: float = 1e-7
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooler_dropout: float = 0.0
    cls_dropout: float = 0.1             # before the classifier
    initializer_range: float = 0.02
    pad_token_id: int = 0

    @property
    def head_size(self) -> int:          # d
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path: str | Path) -> "EncoderConfig":
        """Read a Hugging Face `config.json`.

        Errors: `InputError` naming the file and the field, for a file that is not a JSON object, a field of the
        wrong type or range, and any variant other than v3.
        """
        fields = read_json(path, "a Hugging Face folder with config.json and model.safetensors")
        _check_v3(fields, path)
        read = _FieldReader(fields, path)
        hidden_dropout = read.rate("hidden_dropout_prob", 0.1)
        positions = read.integer("max_position_embeddings", 512)
        max_distance = read.integer("max_relative_positions", -1, lowest=-1)
        config = cls(
            **{name: read.integer(name) for name in ("vocab_size", "hidden_size", "num_attention_heads",
                                                     "num_hidden_layers", "intermediate_size")},
            position_buckets=read.integer("position_buckets", lowest=4),
            max_distance=max_distance if max_distance > 0 else positions,
            layer_norm_eps=read.fraction("layer_norm_eps", 1e-7),
            hidden_dropout_prob=hidden_dropout,
            attention_probs_dropout_prob=read.rate("attention_probs_dropout_prob", 0.1),
            pooler_dropout=read.rate("pooler_dropout", 0.0),
            cls_dropout=read.rate("cls_dropout", hidden_dropout),
            initializer_range=read.fraction("initializer_range", 0.02),
            pad_token_id=read.integer("pad_token_id", 0, lowest=0),
        )
        config._check_sizes(path, read.integer("attention_head_size", config.head_size))
        return config

    def _check_sizes(self, path: str | Path, head_size: int) -> None:
        """Check the relations between sizes."""
        if self.hidden_size % self.num_attention_heads:
            raise InputError(file=path, found=f"hidden_size {self.hidden_size} with num_attention_heads "
                             f"{self.num_attention_heads}", expected="a multiple of num_attention_heads")
        if head_size != self.head_size:
            raise InputError(file=path, found=f"attention_head_size is {head_size}", expected="hidden_size / "
                             f"num_attention_heads ({self.hidden_size} / {self.num_attention_heads})")
        if self.max_distance - 1 <= self.position_buckets // 2:
            raise InputError(file=path,
                             found=f"position_buckets {self.position_buckets} with max_distance {self.max_distance}",
                             expected="max_distance - 1 > position_buckets / 2, or there is no logarithmic region")
        if self.pad_token_id >= self.vocab_size:
            raise InputError(file=path, found=f"pad_token_id {self.pad_token_id}",
                             expected=f"an id below vocab_size {self.vocab_size}")

    def to_json(self) -> dict:
        """The fields of a Hugging Face `config.json` for a three-way sequence classifier."""
        sizes = asdict(self)
        max_distance = sizes.pop("max_distance")
        return {
            "architectures": ["DebertaV2ForSequenceClassification"],
            **V3_FACTS,
            **sizes,
            "max_relative_positions": max_distance,
            "max_position_embeddings": max_distance,
            "pooler_hidden_size": self.hidden_size,
            "id2label": {str(i): label for i, label in enumerate(LABELS)},
            "label2id": {label: i for i, label in enumerate(LABELS)},
            "problem_type": "single_label_classification",
            "dtype": "float32",
        }


def _check_v3(fields: dict, path: str | Path) -> None:
    """Errors: `InputError` naming the first field whose value is not v3's."""
    for name, wanted in V3_FACTS.items():
        found = fields.get(name, ABSENT_MEANS[name])
        if name == "pos_att_type":     # "p2c|c2p" in Microsoft's files, ["p2c", "c2p"] in newer ones
            parts = found.split("|") if isinstance(found, str) else found
            same = isinstance(parts, list) and {str(part).strip().lower() for part in parts} == set(wanted)
        else:
            same = type(found) is type(wanted) and found == wanted
        if not same:
            raise InputError(file=path, found=f"{name} is {short_repr(found) if name in fields else 'absent'}",
                             expected=f"{' and '.join(wanted) if isinstance(wanted, list) else repr(wanted)}, as in "
                                      "DeBERTa-v3; minipref implements no other variant")
    for name in ("embedding_size", "pooler_hidden_size"):
        if name in fields and fields[name] != fields.get("hidden_size"):
            raise InputError(file=path, found=f"{name} is {short_repr(fields[name])}",
                             expected=f"the same as hidden_size ({short_repr(fields.get('hidden_size'))})")


class _FieldReader:
    """Reads numbers from a JSON object and checks their type and range; errors name the field."""

    REQUIRED = object()

    def __init__(self, fields: dict, path: str | Path):
        self.fields, self.path = fields, path

    def _get(self, name: str, default: object, fits, expected: str):
        value = self.fields.get(name)
        if value is None and default is not self.REQUIRED:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            found = f"{name} is {short_repr(value)}" if name in self.fields else f"no field {name}"
            raise InputError(file=self.path, found=found, expected=expected)
        return value

    def integer(self, name: str, default: object = REQUIRED, lowest: int = 1) -> int:
        return self._get(name, default, lambda v: isinstance(v, int) and lowest <= v <= LARGEST,
                         f"a whole number from {lowest} to {LARGEST}")

    def fraction(self, name: str, default: object = REQUIRED) -> float:
        return float(self._get(name, default, lambda v: 0 < v < 1, "a number between 0 and 1"))

    def rate(self, name: str, default: object = REQUIRED) -> float:
        return float(self._get(name, default, lambda v: 0 <= v < 1, "a dropout rate, from 0 to below 1"))
