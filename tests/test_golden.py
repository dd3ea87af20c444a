"""minipref against golden tensors computed by transformers, so that the comparison runs without transformers.

The files are written by `tests/golden/make_golden.py`. The weights are loaded from a checkpoint on disk like published
ones, so a wrong name, transpose or sign gives a wrong layer.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients_by_reference_name, relative, worst_gradient
from safetensors import safe_open
from safetensors.torch import save_file

from minipref.checkpoint import load_classifier

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = ("small_span", "v3_span")


@pytest.fixture(scope="module", params=CASES)
def plain(request, tmp_path_factory):
    """The tensors of transformers, and minipref's plain model with the same weights."""
    with safe_open(GOLDEN / f"{request.param}.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a dict
        config = json.loads(file.metadata()["config"])
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(starting_with("weight.", tensors), folder / "model.safetensors")
    model = load_classifier(folder, dtype=torch.float64)
    return SimpleNamespace(tensors=tensors, model=model, ids=tensors["ids"], attention_mask=tensors["is_token"],
                           labels=tensors["labels"])


@pytest.fixture
def golden(plain, form):
    """The same in every form of the model."""
    return SimpleNamespace(**vars(plain) | {"model": form(plain.model)})


def starting_with(prefix: str, tensors: dict) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def test_golden_embeddings_and_every_layer(golden):
    outputs = list(golden.model.encoder.hidden_states(golden.ids, golden.attention_mask))
    wanted = starting_with("layer.", golden.tensors)
    assert len(outputs) == len(wanted) == golden.model.config.num_hidden_layers + 1
    for number, output in enumerate(outputs):
        found = relative(output[golden.attention_mask], wanted[str(number)][golden.attention_mask])
        assert found < 1e-12, f"layer {number}"


def test_golden_logits_and_loss(golden):
    logits = golden.model(golden.ids, golden.attention_mask)
    assert relative(logits, golden.tensors["logits"]) < 1e-12
    assert relative(F.cross_entropy(logits, golden.labels), golden.tensors["loss"]) < 1e-12


def test_golden_gradient_of_the_loss_in_every_parameter(golden):
    F.cross_entropy(golden.model(golden.ids, golden.attention_mask), golden.labels).backward()
    wanted = starting_with("loss_gradient.", golden.tensors)
    worst, name = worst_gradient(gradients_by_reference_name(golden.model), wanted)
    assert worst < 1e-11, name


def test_golden_gradient_of_every_layers_output_in_every_parameter(golden):
    total = 0
    for h in golden.model.encoder.hidden_states(golden.ids, golden.attention_mask):
        weights = torch.cos(torch.arange(h.numel(), dtype=h.dtype)).view_as(h)
        total = total + (weights * h)[golden.attention_mask].sum()
    total.backward()
    wanted = starting_with("all_gradient.", golden.tensors)
    found = gradients_by_reference_name(golden.model)
    encoders = {name: gradient for name, gradient in found.items() if name.startswith("deberta.")}
    worst, name = worst_gradient(encoders, wanted)
    assert worst < 1e-11, name


def test_golden_values_in_float32(golden):
    model = copy.deepcopy(golden.model).float()
    for number, output in enumerate(model.encoder.hidden_states(golden.ids, golden.attention_mask)):
        wanted = golden.tensors[f"layer.{number}"]
        assert relative(output[golden.attention_mask], wanted[golden.attention_mask]) < 1e-5, f"layer {number}"
