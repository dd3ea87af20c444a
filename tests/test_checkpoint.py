"""Checkpoints in the Hugging Face layout: exact round trips, and nothing is skipped silently."""

import json

import pytest
import torch
from helpers import SMALL, large_model, padded_batch, reference_model, relative, resized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spm import trained_tokenizer

from minipref import load_classifier, load_encoder, save_classifier
from minipref.checkpoint import BODY_NAMES, encoder_tensors
from minipref.explain.__main__ import load_model
from minipref.predictor import load_judge
from minipref.runtime import InputError, write_json


@pytest.fixture
def model():
    return large_model(SMALL, seed=4)


@pytest.fixture
def saved(model, tmp_path):
    """The folder of a saved classifier."""
    save_classifier(model, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change) -> None:
    """Change the tensors of a saved model with a function from {name: tensor} to {name: tensor}."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def drop(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def add(**tensors):
    return lambda before: before | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


# Round trips.

def test_a_classifier_survives_being_saved_and_loaded_bit_for_bit(model, saved):
    loaded = load_classifier(saved)
    assert loaded.config == model.config
    wanted = dict(model.named_parameters())
    assert wanted.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert parameter.is_contiguous()
    assert not loaded.training
    assert str(loaded.load_report) == "loaded 38 of 38 body tensors"


def test_the_encoder_of_a_classifiers_folder_says_that_it_left_the_head_out(model, saved):
    encoder = load_encoder(saved)
    ids, attention_mask = padded_batch(SMALL, [9, 5])
    assert torch.equal(encoder(ids, attention_mask)[attention_mask], model.encoder(ids, attention_mask)[attention_mask])
    assert not encoder.training
    assert encoder.load_report.classifier_skipped == ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight",
                                                      "classifier.bias"]
    assert str(encoder.load_report) == "loaded 38 of 38 body tensors; skipped 4 tensors of the classification head"


def test_transformers_loads_what_we_save_and_answers_the_same(model, saved):
    pytest.importorskip("transformers")
    from transformers import AutoModelForSequenceClassification
    theirs, info = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float32,
                                                                      output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, attention_mask = padded_batch(SMALL, [20, 9])
    logits = theirs.eval()(ids, attention_mask=attention_mask.long()).logits
    assert relative(model(ids, attention_mask), logits) < 1e-5
    assert theirs.config.id2label == {0: "A", 1: "B", 2: "tie"}


def test_we_load_what_transformers_saves_and_answer_the_same(model, tmp_path):
    pytest.importorskip("transformers")
    theirs = reference_model(model)
    theirs.save_pretrained(tmp_path)
    ids, attention_mask = padded_batch(SMALL, [20, 9])
    loaded = load_classifier(tmp_path)
    assert loaded.config == model.config
    assert relative(loaded(ids, attention_mask), theirs(ids, attention_mask=attention_mask.long()).logits) < 1e-5


def test_we_load_the_bare_encoder_that_transformers_saves(model, tmp_path):
    pytest.importorskip("transformers")
    reference_model(model).deberta.save_pretrained(tmp_path)
    ids, attention_mask = padded_batch(SMALL, [20, 9])
    encoder = load_encoder(tmp_path)
    assert torch.equal(encoder(ids, attention_mask), model.encoder(ids, attention_mask))
    assert str(encoder.load_report) == "loaded 38 of 38 body tensors"


def test_the_rename_table_covers_every_parameter_once(model):
    assert len(set(BODY_NAMES.values())) == len(BODY_NAMES)
    tensors = encoder_tensors(model.encoder)
    assert len(tensors) == len(list(model.encoder.parameters()))
    assert len({id(t) for t in tensors.values()}) == len(tensors)
    assert all(name.startswith("deberta.") for name in tensors)


def test_the_saved_file_is_float32_and_says_it_is_from_torch(model, tmp_path):
    save_classifier(model.double(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(name).dtype == torch.float32 for name in file.keys())  # noqa: SIM118


def test_saving_over_a_model_replaces_it(model, saved):
    with torch.no_grad():
        model.classifier.bias += 1
    save_classifier(model, saved)
    assert torch.equal(load_classifier(saved).classifier.bias, model.classifier.bias)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_old_model_whole(model, saved, monkeypatch):
    before = load_classifier(saved).classifier.bias.clone()

    def half_a_file(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("minipref.checkpoint.save_file", half_a_file)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(OSError, match="disk full"):
        save_classifier(model, saved)
    assert torch.equal(load_classifier(saved).classifier.bias, before)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


# Precision and device.

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_become_float32(model, saved, dtype):
    rewrite(saved, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    for name, parameter in load_classifier(saved).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).to(dtype).float()), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_is_loaded_in_the_precision_that_is_asked_for(model, saved, dtype):
    for load, wanted in ((load_classifier, model), (load_encoder, model.encoder)):
        loaded = load(saved, dtype=dtype, device="cpu")
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, wanted.get_parameter(name).to(dtype)), name


def test_training_a_loaded_model_does_not_write_into_its_file(saved):
    before = (saved / "model.safetensors").read_bytes()
    model = load_classifier(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (saved / "model.safetensors").read_bytes() == before


# What a file may hold beyond the model.

def test_a_file_without_head_gets_a_fresh_one_and_says_so(saved):
    rewrite(saved, drop("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"))
    torch.manual_seed(1)
    first = load_classifier(saved)
    torch.manual_seed(1)
    second = load_classifier(saved)
    assert str(first.load_report) == "loaded 38 of 38 body tensors; new: pooler, classifier"
    for part in (first.pooler, first.classifier):
        assert (part.bias == 0).all()
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert torch.equal(first.pooler.weight, second.pooler.weight), "the seed decides"
    assert not torch.equal(first.pooler.weight, load_classifier(saved).pooler.weight)


def test_a_file_with_only_a_pooler_gets_a_fresh_classifier(model, saved):
    rewrite(saved, drop("classifier.weight", "classifier.bias"))
    loaded = load_classifier(saved)
    assert loaded.load_report.new == ["classifier"]
    assert torch.equal(loaded.pooler.weight, model.pooler.weight)


# Heads of others.

def write_config(folder, **changes) -> None:
    """Change fields of a saved model's config.json; None removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def id2label(*names) -> dict:
    return {str(row): name for row, name in reversed(list(enumerate(names)))}


@pytest.mark.parametrize("names", [
    ("A", "B", "tie"), ("tie", "model_a", "model_b"), ("winner_tie", "winner_model_b", "winner_model_a"),
    ("b", "draw", "a"), ("response_a", "both", "response_b"), ("Tie (bothbad)", "Model A", "Model B"),
    ("B_WINS", "A_WINS", "TIE"), ("chosen_b", "neither", "chosen_a"), ("ResponseB", "ResponseA", "BothBad"),
    ("model_2", "model_1", "tie"), ("B is better", "both good", "A is better"),
], ids=",".join)
def test_a_preference_head_has_its_classes_in_whatever_order_the_file_names_them(model, saved, names):
    places = [next(row for row, name in enumerate(names) if name.lower().replace("1", "a").replace("2", "b")
                   .replace("is better", "").replace("_wins", "").strip().endswith(letter)) for letter in "ab"]
    places.append(3 - sum(places))
    wanted = {name: getattr(model.classifier, name).detach().clone() for name in ("weight", "bias")}

    def shuffled(tensors):
        for name, tensor in wanted.items():
            tensors[f"classifier.{name}"][places] = tensor
        return tensors

    rewrite(saved, shuffled)
    write_config(saved, id2label=id2label(*names), architectures=["MyPreferenceModel"])
    loaded = load_classifier(saved)
    assert all(torch.equal(getattr(loaded.classifier, name), tensor) for name, tensor in wanted.items())
    assert not loaded.load_report.new and not loaded.load_report.note
    save_classifier(loaded, saved)
    assert json.loads((saved / "config.json").read_text())["id2label"] == {"0": "A", "1": "B", "2": "tie"}
    assert torch.equal(load_classifier(saved).classifier.weight, wanted["weight"])


@pytest.mark.parametrize("changes", [{"id2label": id2label("LABEL_0", "LABEL_1", "LABEL_2")}, {"id2label": None},
                                     {"id2label": None, "architectures": None, "problem_type": None}], ids=str)
def test_three_classes_without_names_are_taken_for_a_b_and_tie_and_the_report_says_so(model, saved, changes):
    write_config(saved, **changes)
    loaded = load_classifier(saved)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert str(loaded.load_report).endswith("; its classes LABEL_0, LABEL_1, LABEL_2 were read as A, B, tie")


OTHER_HEADS = {   # name: (changes of config.json, rows of the classifier, whether there is a pooler, what it is for)
    "NLI": ({"id2label": id2label("entailment", "neutral", "contradiction")}, 3, True,
            "entailment, neutral, contradiction"),
    "another three": ({"id2label": id2label("A", "B", "C")}, 3, True, "A, B, C"),
    "two ties": ({"id2label": id2label("a", "tie", "draw")}, 3, True, "a, tie, draw"),
    "opposites": ({"id2label": id2label("rejected_a", "rejected_b", "tie")}, 3, True, "rejected_a, rejected_b, tie"),
    "stars": ({"id2label": id2label("1", "2", "3")}, 3, True, "1, 2, 3"),
    "reward": ({"id2label": id2label("LABEL_0")}, 1, True, "LABEL_0"),
    "zero-shot": ({"id2label": None}, 2, True, "LABEL_0, LABEL_1"),
    "seven": ({"id2label": id2label(*"abcdefg")}, 7, True, "a, b, c, d, e, f, g"),
    "many": ({"id2label": id2label(*map(str, range(77)))}, 77, True, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."),
    "NER": ({"id2label": id2label("LABEL_0", "LABEL_1", "LABEL_2"),
             "architectures": ["DebertaV2ForTokenClassification"]}, 3, False,
            "LABEL_0, LABEL_1, LABEL_2; DebertaV2ForTokenClassification"),
    "NER, without its class": ({"id2label": id2label("O", "B", "I"), "architectures": None}, 3, False, "O, B, I"),
    "choices": ({"id2label": None, "architectures": ["DebertaV2ForMultipleChoice"]}, 1, True,
                "LABEL_0; DebertaV2ForMultipleChoice"),
    "several labels": ({"id2label": None, "problem_type": "multi_label_classification"}, 3, True,
                       "LABEL_0, LABEL_1, LABEL_2; multi_label_classification"),
    "questions": ({"id2label": None, "architectures": ["DebertaV2ForQuestionAnswering"]}, 0, False,
                  "DebertaV2ForQuestionAnswering"),
    "names of no form": ({"id2label": [1]}, 3, True, "[1]"),
}


@pytest.fixture(params=OTHER_HEADS)
def other(request, saved):
    """The folder of the same encoder with another task's head, and the description of the task."""
    changes, rows, pooler, what = OTHER_HEADS[request.param]
    head = ["pooler.dense.weight", "pooler.dense.bias"] * (not pooler)
    part, size = "classifier" if rows else "qa_outputs", rows or 2
    new = {f"{part}.weight": torch.ones(size, 24), f"{part}.bias": torch.ones(size)}
    rewrite(saved, drop(*head, "classifier.weight", "classifier.bias"))
    rewrite(saved, lambda tensors: tensors | new)
    write_config(saved, **changes)
    return saved, what


def test_another_tasks_head_is_left_out_and_named_and_training_begins_with_a_fresh_one(model, other):
    folder, what = other
    encoder, classifier = load_encoder(folder), load_classifier(folder)
    assert torch.equal(encoder.layers[1].ff_out.weight, model.encoder.layers[1].ff_out.weight)
    assert torch.equal(classifier.encoder.layers[1].ff_out.weight, encoder.layers[1].ff_out.weight)
    for part in (classifier.pooler, classifier.classifier):
        assert (part.bias == 0).all() and part.weight.std() < 0.03
    report = classifier.load_report
    assert str(report).endswith(
        f" tensors of the classification head; new: pooler, classifier (the file's head is for: {what})")
    assert report.classifier_skipped == encoder.load_report.classifier_skipped
    assert len(report.classifier_skipped) in (2, 4)


def test_another_tasks_head_is_refused_where_a_preference_is_asked_for(other):
    folder, what = other
    write_json(folder / "minipref.json", {"format": 1, "max_length": 64, "shares": [1, 2, 2], "temperature": 1.0})
    trained_tokenizer().save(folder)
    with pytest.raises(InputError) as refused:
        load_judge(folder)
    assert f"{folder}: a head for: {what}; expected a head for A, B, tie" in str(refused.value)
    (folder / "minipref.json").unlink()
    with pytest.raises(InputError) as refused:
        load_model(str(folder))
    assert f"{folder}: a head for: {what}; expected a head for A, B, tie" in str(refused.value)


def test_a_token_classifier_with_our_names_is_another_tasks_head(saved):
    rewrite(saved, drop("pooler.dense.weight", "pooler.dense.bias"))
    assert load_classifier(saved).load_report.new == ["pooler", "classifier"]


def test_transformers_and_we_agree_on_a_head_in_another_order(model, tmp_path):
    pytest.importorskip("transformers")
    theirs = reference_model(model)
    theirs.config.id2label = {0: "tie", 1: "model_b", 2: "model_a"}
    theirs.save_pretrained(tmp_path)
    ids, attention_mask = padded_batch(SMALL, [20, 9])
    logits = theirs(ids, attention_mask=attention_mask.long()).logits[:, [2, 1, 0]]
    assert relative(load_classifier(tmp_path)(ids, attention_mask), logits) < 1e-5


def test_pretraining_heads_are_left_out_and_counted(saved):
    rewrite(saved, add(lm_predictions__lm_head__bias=torch.zeros(60), mask_predictions__dense__weight=torch.zeros(3, 3),
                       cls__predictions__bias=torch.zeros(60)))
    report = load_encoder(saved).load_report
    assert report.heads_skipped == ["cls.predictions.bias", "lm_predictions.lm_head.bias",
                                    "mask_predictions.dense.weight"]
    assert "skipped 3 tensors of the pre-training heads" in str(report)


def test_known_leftovers_are_skipped_and_named(saved):
    rewrite(saved, add(deberta__embeddings__position_ids=torch.arange(24)[None],
                       deberta__embeddings__position_embeddings__weight=torch.zeros(24, 24),
                       deberta__embeddings__word_embeddings___weight=torch.zeros(60, 24)))
    report = load_classifier(saved).load_report
    assert len(report.leftovers_skipped) == 3
    assert "deberta.embeddings.position_embeddings.weight" in str(report)


def test_leftovers_of_a_file_without_prefix_are_known_too(saved):
    rewrite(saved, lambda tensors: {name.removeprefix("deberta."): t for name, t in tensors.items()}
            | {"embeddings.position_ids": torch.arange(24)[None]})
    assert load_classifier(saved).load_report.leftovers_skipped == ["embeddings.position_ids"]


# What it may not.

@pytest.mark.parametrize("name", ["deberta.embeddings.word_embeddings.weight", "deberta.encoder.LayerNorm.bias",
                                  "deberta.encoder.layer.1.output.dense.bias", "classifier.bias",
                                  "pooler.dense.weight"])
def test_a_missing_tensor_is_named(saved, name):
    rewrite(saved, drop(name))
    with pytest.raises(InputError, match=f"model.safetensors: no tensor {name}; expected one of shape"):
        load_classifier(saved)


@pytest.mark.parametrize("name", ["deberta.encoder.rel_embeddings.weight", "classifier.weight",
                                  "deberta.encoder.layer.0.intermediate.dense.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(model, saved, name):
    rewrite(saved, lambda tensors: tensors | {name: tensors[name][:-1].contiguous()})
    shape = tuple(load_file(saved / "model.safetensors")[name].shape)
    with pytest.raises(InputError) as error:
        load_classifier(saved)
    assert f"tensor {name} has shape {shape}; expected ({shape[0] + 1}, {shape[1]})" in str(error.value)


def test_a_classifier_of_two_classes_is_refused(saved):
    two = {"classifier.weight": torch.zeros(2, 24), "classifier.bias": torch.zeros(2)}
    rewrite(saved, lambda tensors: tensors | two)
    with pytest.raises(InputError, match=r"classifier.weight has shape \(2, 24\); expected \(3, 24\)"):
        load_classifier(saved)


@pytest.mark.parametrize("name", ["deberta.encoder.layer.2.output.dense.weight", "deberta.encoder.conv.conv.weight",
                                  "deberta.encoder.layer.0.attention.self.pos_key_proj.weight", "something.else"])
def test_an_unknown_tensor_is_named(saved, name):
    rewrite(saved, lambda tensors: tensors | {name: torch.zeros(2)})
    with pytest.raises(InputError, match=f"tensor {name}, which DeBERTa-v3 with 2 layers does not have"):
        load_encoder(saved)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(saved, poison):
    name = "deberta.encoder.layer.0.output.dense.weight"

    def spoil(tensors):
        tensors[name][3, 2] = poison
        return tensors

    rewrite(saved, spoil)
    with pytest.raises(InputError, match=f"tensor {name} holds NaN or infinity"):
        load_classifier(saved)


def test_weights_of_whole_numbers_are_refused_by_name(saved):
    name = "deberta.encoder.LayerNorm.weight"
    rewrite(saved, lambda tensors: tensors | {name: torch.ones(24, dtype=torch.int64)})
    with pytest.raises(InputError, match=f"tensor {name} is of type torch.int64; expected float32"):
        load_encoder(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_files_are_refused_by_name(saved, dtype):
    name = "deberta.encoder.LayerNorm.weight"
    rewrite(saved, lambda tensors: tensors | {name: torch.ones(24).to(dtype)})
    with pytest.raises(InputError, match=f"tensor {name} is of type"):
        load_encoder(saved)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 200, b"<html>not found</html>" * 40])
def test_a_file_that_is_no_safetensors_is_one_line_of_error(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a complete safetensors file") as error:
        load_classifier(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_an_error_and_not_half_a_model(saved, keep):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:int(keep * len(content))])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_classifier(saved)


def test_an_empty_folder_says_what_is_missing(tmp_path, model, saved):
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_encoder(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file; expected the weights"):
        load_classifier(saved)


def test_a_folder_with_the_published_bin_says_how_to_convert_it(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(InputError, match="make weights"):
        load_encoder(saved)


# Files in several pieces.

@pytest.fixture
def sharded(saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    halves = {f"model-0000{i + 1}-of-00002.safetensors": dict(sorted(tensors.items())[i::2]) for i in range(2)}
    for file, half in halves.items():
        save_file(half, saved / file)
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    return saved


def test_a_checkpoint_in_several_files_is_the_same_model(model, sharded):
    loaded = load_classifier(sharded)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in loaded.named_parameters())


def test_a_missing_piece_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: no such file"):
        load_classifier(sharded)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}',
                                   '{"weight_map": {"a": 3}}',
                                   '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": ["b"]}}',
                                   '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "b", "c": 1}}'])
def test_an_index_that_is_none_is_one_line_of_error(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: "):
        load_classifier(sharded)


def test_the_single_file_wins_over_an_index(model, sharded):
    save_classifier(model, sharded)
    (sharded / "model.safetensors.index.json").write_text("nonsense")
    assert torch.equal(load_classifier(sharded).classifier.weight, model.classifier.weight)


def test_sizes_come_from_the_configuration_and_a_wrong_one_is_found_out(model, saved):
    for field, wrong in (("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 12), ("vocab_size", 61),
                         ("position_buckets", 10), ("intermediate_size", 41)):
        config = SMALL.to_json() | {field: wrong}
        if field == "hidden_size":
            config["pooler_hidden_size"] = wrong
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"model\.safetensors: "):
            load_classifier(saved)


def test_any_v3_shaped_classifier_goes_in_and_out(tmp_path):
    for number, sizes in enumerate(({"num_hidden_layers": 1, "num_attention_heads": 1},
                                    {"hidden_size": 36, "num_attention_heads": 3, "position_buckets": 5},
                                    {"vocab_size": 9, "intermediate_size": 1}, {"pad_token_id": 7})):
        model = large_model(resized(SMALL, **sizes))
        save_classifier(model, tmp_path / str(number))
        loaded = load_classifier(tmp_path / str(number))
        assert loaded.config == model.config
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in loaded.named_parameters())
