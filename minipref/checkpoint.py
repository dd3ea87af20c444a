"""Load and save Hugging Face checkpoints. The table below *is* the documentation of the file format.

Nothing is skipped silently. Every tensor of the body must be present with the right shape. Tensors of the pre-training
heads or of another task's head are skipped and counted. Any other tensor is an error that names it.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minipref.config import LABELS, EncoderConfig
from minipref.model import Encoder, PreferenceModel, init_weights
from minipref.runtime import InputError, atomic_write, check_folder, read_json, short_repr, write_json

# minipref's name -> Hugging Face's name; `{}` is the layer's number. Each name stands for a .weight and a .bias (only a
# .weight for the two embeddings): 6 tensors outside the layers and 16 in each, 102 for v3-small's six layers.
BODY_NAMES = {
    "word_embeddings": "embeddings.word_embeddings",
    "word_norm": "embeddings.LayerNorm",
    "rel_embeddings": "encoder.rel_embeddings",
    "rel_norm": "encoder.LayerNorm",
    "layers.{}.attention.q_proj": "encoder.layer.{}.attention.self.query_proj",
    "layers.{}.attention.k_proj": "encoder.layer.{}.attention.self.key_proj",
    "layers.{}.attention.v_proj": "encoder.layer.{}.attention.self.value_proj",
    "layers.{}.attention.out_proj": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attn_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.ff_in": "encoder.layer.{}.intermediate.dense",
    "layers.{}.ff_out": "encoder.layer.{}.output.dense",
    "layers.{}.ff_norm": "encoder.layer.{}.output.LayerNorm",
}
BODY_PREFIX = "deberta."               # in a classifier's file; optional in an encoder's file
HEAD_NAMES = {"pooler": "pooler.dense", "classifier": "classifier"}

TASK_HEADS = ("pooler.", "classifier.", "qa_outputs.")     # of transformers' classes for DeBERTa-v3

# Class names in other files: one of these words, with fillers around it ('winner_model_a', 'A is better').
CLASS_WORDS = {"a": 0, "1": 0, "b": 1, "2": 1} | dict.fromkeys(
    ("tie", "tied", "draw", "equal", "same", "both", "bothbad", "bad", "good", "neither"), 2)     # 'both bad' is a tie
FILLERS = {"winner", "win", "wins", "won", "is", "better", "best", "prefer", "preferred", "chosen", "model", "response",
           "answer", "assistant", "option", "candidate", "completion", "output"}

PRETRAINING_HEADS = ("lm_predictions.", "mask_predictions.", "cls.")
LEFTOVERS = {  # unused tensors in some published files: name -> meaning
    "embeddings.position_ids": "a counter 0, 1, 2, ...",
    "embeddings.position_embeddings.weight": "absolute positions, used in pretraining only",
    "embeddings.word_embeddings._weight": "GDES's E_delta (arXiv 2111.09543), already added to the word embeddings",
}


@dataclass
class LoadReport:
    """What was done with every tensor of a checkpoint; `str()` gives one line."""

    loaded: int = 0
    body: int = 0
    heads_skipped: list[str] = field(default_factory=list)      # of the pre-training heads
    leftovers_skipped: list[str] = field(default_factory=list)
    classifier_skipped: list[str] = field(default_factory=list)   # for `load_encoder`, or another task's head
    new: list[str] = field(default_factory=list)
    other_task: str = ""           # the task of the file's head, if it is not A, B and tie
    note: str = ""                 # how the classes were interpreted, if their names are ambiguous

    def __str__(self) -> str:
        parts = [f"loaded {self.loaded} of {self.body} body tensors"]
        if self.heads_skipped:
            parts.append(f"skipped {len(self.heads_skipped)} tensors of the pre-training heads")
        if self.leftovers_skipped:
            parts.append(f"skipped {', '.join(self.leftovers_skipped)}")
        if self.classifier_skipped:
            parts.append(f"skipped {len(self.classifier_skipped)} tensors of the classification head")
        if self.new:
            why = f" (the file's head is for: {self.other_task})" if self.other_task else ""
            parts.append(f"new: {', '.join(self.new)}{why}")
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)


def load_encoder(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a Hugging Face folder (config.json and model.safetensors), in eval mode.

    The folder may hold an encoder, a pre-training checkpoint or a model with any task's head. `encoder.load_report`
    lists the tensors that were loaded and skipped.
    Errors: `InputError` for a folder, a config.json or a tensor that is missing, damaged or not DeBERTa-v3's.
    """
    check_folder(folder, "a Hugging Face folder with config.json and model.safetensors")
    folder = Path(folder)
    config = EncoderConfig.from_json(folder / "config.json")
    with _open_checkpoint(folder) as checkpoint:
        report, body, report.classifier_skipped = _sort_tensors(checkpoint, config)
        with torch.device("meta"):
            encoder = Encoder(config)
        _fill(encoder, {name: checkpoint.read(source) for name, source in body.items()}, dtype, device)
    encoder.load_report = report
    return encoder.eval()


def load_classifier(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
                    ) -> PreferenceModel:
    """Encoder, pooler and head of a Hugging Face folder, in eval mode.

    If the file has no `pooler.*` or `classifier.*` (the published one has neither), or has another task's head, they
    are initialised from torch's global generator, N(0, initializer_range): seed it first. `model.load_report` names
    them. The classes A, B and tie are identified by their names in config.json and may have any order.
    Errors: as `load_encoder`; also for a head whose shapes contradict config.json.
    """
    check_folder(folder, "a Hugging Face folder with config.json and model.safetensors")
    folder = Path(folder)
    config = EncoderConfig.from_json(folder / "config.json")
    with _open_checkpoint(folder) as checkpoint:
        report, body, head = _sort_tensors(checkpoint, config)
        with torch.device("meta"):
            model = PreferenceModel(config)
        tensors = {f"encoder.{name}": checkpoint.read(source) for name, source in body.items()}
        order = _class_order(read_json(folder / "config.json", "a configuration"), head, checkpoint, report)
        for part, theirs in HEAD_NAMES.items():
            if order and any(name.startswith(f"{theirs}.") for name in head):
                sources = {f"{part}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
                _check_shapes(checkpoint, sources, model)
                tensors |= {name: checkpoint.read(source) for name, source in sources.items()}
            else:
                report.new.append(part)
                fresh = getattr(model, part).to_empty(device="cpu")
                init_weights(fresh, config.initializer_range)
                tensors |= {f"{part}.{name}": value for name, value in fresh.state_dict().items()}
        if order and "classifier" not in report.new:
            tensors |= {name: tensors[name][order] for name in ("classifier.weight", "classifier.bias")}
        _fill(model, tensors, dtype, device)
    model.load_report = report
    return model.eval()


def grow_embeddings(model: PreferenceModel, vocab_size: int) -> None:
    """Append word embeddings, initialised as in DeBERTa, up to `vocab_size`; v3 already has 99 unused ones."""
    encoder, old = model.encoder, model.encoder.word_embeddings
    if vocab_size > old.num_embeddings:
        encoder.config = replace(encoder.config, vocab_size=vocab_size)
        encoder.word_embeddings = nn.Embedding(vocab_size, old.embedding_dim, old.padding_idx).to(old.weight)
        with torch.no_grad():
            encoder.word_embeddings.weight.normal_(std=encoder.config.initializer_range)
            encoder.word_embeddings.weight[:old.num_embeddings] = old.weight


def save_classifier(model: PreferenceModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `AutoModelForSequenceClassification.from_pretrained` loads.

    The file is float32 in the Hugging Face layout; each file is replaced whole or not at all.
    """
    tensors = encoder_tensors(model.encoder)
    tensors |= {f"{hf}.{kind}": model.get_parameter(f"{name}.{kind}")
                for name, hf in HEAD_NAMES.items() for kind in ("weight", "bias")}
    write_checkpoint(tensors, model.config.to_json(), folder)


def write_checkpoint(tensors: dict[str, Tensor], config_fields: dict, folder: str | Path,
                     dtype: torch.dtype = torch.float32) -> None:
    """Write tensors under their Hugging Face names; config.json comes last, as the mark of a complete checkpoint."""
    folder = Path(folder)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", config_fields)


def encoder_tensors(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's parameters under their Hugging Face names, with the prefix."""
    return {BODY_PREFIX + hf: encoder.get_parameter(name) for name, hf in _body_names(encoder.config).items()}


def _body_names(config: EncoderConfig) -> dict[str, str]:
    """The rename table written out: minipref's parameter name -> Hugging Face's, in the model's order."""
    names = {}
    for ours, theirs in BODY_NAMES.items():
        kinds = ("weight",) if ours in ("word_embeddings", "rel_embeddings") else ("weight", "bias")
        for layer in range(config.num_hidden_layers) if "{}" in ours else (0,):
            names |= {f"{ours.format(layer)}.{kind}": f"{theirs.format(layer)}.{kind}" for kind in kinds}
    return names


def _sort_tensors(checkpoint: "_Checkpoint", config: EncoderConfig) -> tuple[LoadReport, dict, list]:
    """Classify each tensor of the file. Returns the report, {our name: file's name} of the body, and the names of a
    task head's tensors.

    Errors: `InputError` naming the tensor for a missing, misshapen or unknown one.
    """
    report = LoadReport()
    layers = config.num_hidden_layers
    if 16 * layers > len(checkpoint.shapes):      # checked here, before a module of a million layers is built
        raise InputError(file=checkpoint.path, found=f"{len(checkpoint.shapes)} tensors",
                         expected=f"at least {16 * layers:,}, for the {layers:,} layers of config.json")
    prefix = BODY_PREFIX if any(name.startswith(BODY_PREFIX) for name in checkpoint.shapes) else ""
    body = {ours: prefix + theirs for ours, theirs in _body_names(config).items()}
    with torch.device("meta"):
        _check_shapes(checkpoint, body, Encoder(config))
    head = []
    for name in sorted(checkpoint.shapes.keys() - set(body.values())):
        if name.startswith(TASK_HEADS):
            head.append(name)
        elif name.startswith(PRETRAINING_HEADS):
            report.heads_skipped.append(name)
        elif name.removeprefix(prefix) in LEFTOVERS:
            report.leftovers_skipped.append(name)
        else:
            raise InputError(file=checkpoint.path, found=f"tensor {name}, which DeBERTa-v3 with {layers} layers "
                             "does not have", expected="only the encoder's, the classifier's and the "
                             "pre-training heads' tensors")
    report.loaded = report.body = len(body)
    return report, body, head[::-1]        # pooler before classifier, weight before bias


def _check_shapes(checkpoint: "_Checkpoint", names: dict[str, str], module: nn.Module) -> None:
    """Errors: `InputError` for a tensor of {our name: file's name} that is missing or has the wrong shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for ours, theirs in names.items():
        if theirs not in checkpoint.shapes:
            raise InputError(file=checkpoint.path, found=f"no tensor {theirs}", expected=f"one of shape {shapes[ours]}")
        if checkpoint.shapes[theirs] != shapes[ours]:
            raise InputError(file=checkpoint.path, found=f"tensor {theirs} has shape {checkpoint.shapes[theirs]}",
                             expected=f"{shapes[ours]}, from config.json")


def _class_order(fields: dict, head: list[str], checkpoint: "_Checkpoint", report: LoadReport) -> list[int]:
    """The rows of A, B and tie in the file's classifier; empty for another task's head, which `report` then describes.

    transformers names classes LABEL_0, LABEL_1, ... by default. Three such classes of a sequence classifier are taken
    as A, B and tie, the order of Kaggle's columns.
    """
    if not any(name.startswith(("classifier.", "qa_outputs.")) for name in head):
        return [0, 1, 2]                   # there is no order to find
    given, problem, architecture = fields.get("id2label"), fields.get("problem_type"), fields.get("architectures")
    rows = (*checkpoint.shapes.get("classifier.weight", ()), 0)[0]
    if given is None:
        names = [f"LABEL_{row}" for row in range(rows)]
    elif isinstance(given, dict):
        names = [str(given.get(str(row))) for row in range(len(given))]
    else:
        names = [short_repr(given)]
    is_sequence = architecture is None or "ForSequenceClassification" in str(architecture)
    is_softmax = problem in (None, "single_label_classification")
    if (is_softmax and any(name.startswith("pooler.") for name in head)
            and all(re.fullmatch(r"(pooler\.dense|classifier)\.(weight|bias)", name) for name in head)):
        classes = [_class_of(name) for name in names]
        if len(classes) == len(LABELS) and set(classes) == {0, 1, 2}:
            return [classes.index(label) for label in range(len(LABELS))]
        if is_sequence and names == ["LABEL_0", "LABEL_1", "LABEL_2"]:
            report.note = f"its classes {', '.join(names)} were read as {', '.join(LABELS)}"
            return [0, 1, 2]
    names = names[:10] + ["..."] * (len(names) > 10)
    what = [", ".join(names), "" if is_sequence else str(architecture).strip("[]'"),
            "" if is_softmax else str(problem)]
    report.other_task = "; ".join(part for part in what if part) or ", ".join(head)
    report.classifier_skipped = head
    return []


def _class_of(name: str) -> int | None:
    """The class that a name means; None for an unknown word or for words of several classes."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name)} - FILLERS
    classes = {CLASS_WORDS.get(word) for word in words}
    return classes.pop() if len(classes) == 1 else None


def _fill(module: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a module on the meta device its parameters. float16 files are converted here, tensor by tensor."""
    module.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


class _Checkpoint:
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        self.files = [_open_safetensors(file) for file in files]
        self.home, self.shapes = {}, {}
        for file, opened in zip(files, self.files):
            for name in opened.keys():  # noqa: SIM118 - safe_open is not a dict
                tensor = opened.get_slice(name)
                if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16", "I64", "BOOL"):
                    raise InputError(file=file, found=f"tensor {name} is of type {tensor.get_dtype()}",
                                     expected="float32, float16 or bfloat16")
                self.shapes[name] = tuple(tensor.get_shape())
                self.home[name] = opened

    def __enter__(self) -> "_Checkpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.home.clear()
        self.files.clear()             # safetensors unmaps a file after its last reference is gone

    def read(self, name: str) -> Tensor:
        try:
            tensor = self.home[name].get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise InputError(file=self.path, found=f"tensor {name} cannot be read ({problem})",
                             expected="a complete file: fetch it again") from None
        if not tensor.is_floating_point():
            raise InputError(file=self.path, found=f"tensor {name} is of type {tensor.dtype}",
                             expected="float32, float16 or bfloat16")
        if not all(torch.isfinite(end) for end in tensor.aminmax()):     # aminmax propagates NaN
            raise InputError(file=self.path, found=f"tensor {name} holds NaN or infinity",
                             expected="finite weights; the file is damaged or its training diverged")
        return tensor


def _open_checkpoint(folder: Path) -> _Checkpoint:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return _Checkpoint(single, [single])
    try:
        names = sorted(set(read_json(index, "the index of the weights")["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(file=index, found="not an index of safetensors files",
                         expected='{"weight_map": {tensor: file}}') from None
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise InputError(file=index, found=f"file names {short_repr(names)}",
                         expected="names of files in the same folder")
    return _Checkpoint(index, [folder / name for name in names])


def _open_safetensors(path: Path):
    if not path.is_file():
        hint = " (there is a pytorch_model.bin: `make weights` converts it)" if (
            path.parent / "pytorch_model.bin").is_file() else ""
        raise InputError(file=path, found="no such file" + hint, expected="the weights, as safetensors")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as problem:
        raise InputError(file=path, found=f"not a complete safetensors file ({problem})",
                         expected="the file as it was written: fetch or save it again") from None
