"""Reading and writing config.json: v3 is read, anything else is refused with the name of the field."""

import dataclasses
import json
from argparse import Namespace

import pytest
from helpers import SMALL, reference_config, resized

from minipref import runtime
from minipref.config import V3_FACTS, EncoderConfig
from minipref.recipes import RECIPES, TrainConfig, default_recipe, recipe
from minipref.run import setup
from minipref.runtime import InputError

# Written as Microsoft's files are: p2c|c2p in one string, -1 for 'as many as positions', and no field that only
# transformers knows.
PUBLISHED = {
    "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 512,
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1, "position_biased_input": False,
    "num_attention_heads": 12, "num_hidden_layers": 6, "type_vocab_size": 0, "vocab_size": 128100,
}
MISSING = object()


@pytest.fixture
def read(tmp_path):
    """Read the published fields with some changed or missing."""
    def read_changed(**changes) -> EncoderConfig:
        fields = {name: value for name, value in (PUBLISHED | changes).items() if value is not MISSING}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return EncoderConfig.from_json(path)
    return read_changed


def test_the_published_configuration_is_v3_small(read):
    assert read() == EncoderConfig()


def test_the_published_file_is_v3_small(reference_dir):
    assert EncoderConfig.from_json(reference_dir / "deberta-v3-small" / "config.json") == EncoderConfig()


def test_every_size_has_its_own_field(read):
    config = read(vocab_size=111, hidden_size=60, num_attention_heads=5, num_hidden_layers=7, intermediate_size=88,
                  position_buckets=32, max_relative_positions=99, layer_norm_eps=1e-6, hidden_dropout_prob=0.01,
                  attention_probs_dropout_prob=0.02, pooler_dropout=0.03, cls_dropout=0.04, initializer_range=0.05,
                  pad_token_id=6)
    assert config == EncoderConfig(vocab_size=111, hidden_size=60, num_attention_heads=5, num_hidden_layers=7,
                                   intermediate_size=88, position_buckets=32, max_distance=99, layer_norm_eps=1e-6,
                                   hidden_dropout_prob=0.01, attention_probs_dropout_prob=0.02, pooler_dropout=0.03,
                                   cls_dropout=0.04, initializer_range=0.05, pad_token_id=6)
    assert config.head_size == 12


def test_the_largest_distance_is_the_number_of_positions_unless_it_is_given(read):
    assert read(max_relative_positions=-1, max_position_embeddings=1024).max_distance == 1024
    assert read(max_relative_positions=MISSING, max_position_embeddings=MISSING).max_distance == 512
    assert read(max_relative_positions=300, max_position_embeddings=1024).max_distance == 300


def test_the_classifier_drops_out_as_the_hidden_layers_do_unless_it_is_given(read):
    assert read(hidden_dropout_prob=0.3).cls_dropout == 0.3
    assert read(hidden_dropout_prob=0.3, cls_dropout=0.0).cls_dropout == 0.0
    assert read(hidden_dropout_prob=0.3, cls_dropout=None).cls_dropout == 0.3


@pytest.mark.parametrize("written", ["p2c|c2p", "c2p|p2c", " P2C | c2p ", ["p2c", "c2p"], ["c2p", "p2c"]])
def test_both_position_terms_are_read_however_they_are_written(read, written):
    assert read(pos_att_type=written) == EncoderConfig()


@pytest.mark.parametrize("field, wrong", [
    ("model_type", "deberta"), ("relative_attention", False), ("share_att_key", False), ("norm_rel_ebd", "none"),
    ("pos_att_type", "c2p"), ("pos_att_type", "p2c"), ("pos_att_type", "p2c|c2p|p2p"), ("pos_att_type", 3),
    ("pos_att_type", []), ("position_biased_input", True), ("type_vocab_size", 2), ("conv_kernel_size", 3),
    ("hidden_act", "relu"), ("hidden_act", "gelu_new"), ("pooler_hidden_act", "tanh"), ("relative_attention", 1),
    ("position_biased_input", 0), ("embedding_size", 384), ("pooler_hidden_size", 384), ("attention_head_size", 32),
])
def test_what_is_not_v3_is_refused_by_name(read, field, wrong):
    with pytest.raises(InputError, match=f"config.json: {field} is "):
        read(**{field: wrong})


@pytest.mark.parametrize("field", sorted(set(V3_FACTS) - {"model_type", "hidden_act", "pooler_hidden_act",
                                                          "type_vocab_size", "conv_kernel_size"}))
def test_an_absent_field_means_what_transformers_takes_it_for(read, field):
    with pytest.raises(InputError, match=f"{field} is absent; expected"):
        read(**{field: MISSING})


@pytest.mark.parametrize("field", ["model_type", "hidden_act", "pooler_hidden_act", "type_vocab_size",
                                   "conv_kernel_size", "layer_norm_eps", "initializer_range", "hidden_dropout_prob",
                                   "attention_probs_dropout_prob"])
def test_an_absent_field_whose_default_is_v3s_is_no_error(read, field):
    assert read(**{field: MISSING}) == EncoderConfig()


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
                                   "intermediate_size", "position_buckets"])
@pytest.mark.parametrize("wrong", [MISSING, None, 0, -3, 2.5, "12", True, [6], 2**31])
def test_a_size_that_is_no_whole_positive_number_is_refused_by_name(read, field, wrong):
    with pytest.raises(InputError, match=field):
        read(**{field: wrong})


@pytest.mark.parametrize("field, wrong", [
    ("hidden_dropout_prob", 1.0), ("hidden_dropout_prob", -0.1), ("attention_probs_dropout_prob", "0.1"),
    ("cls_dropout", 1), ("pooler_dropout", 2), ("layer_norm_eps", 0), ("layer_norm_eps", 1), ("layer_norm_eps", True),
    ("initializer_range", -0.02), ("pad_token_id", -1), ("max_relative_positions", -2), ("position_buckets", 3),
    ("max_position_embeddings", 0),
])
def test_a_number_out_of_range_is_refused_by_name(read, field, wrong):
    with pytest.raises(InputError, match=f"{field} is .*expected"):
        read(**{field: wrong})


def test_the_ends_of_the_ranges_are_accepted(read):
    config = read(hidden_dropout_prob=0, attention_probs_dropout_prob=0.0, position_buckets=4, pad_token_id=0,
                  max_relative_positions=4)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)
    assert (config.position_buckets, config.max_distance) == (4, 4)


@pytest.mark.parametrize("changes, says", [
    ({"hidden_size": 100, "num_attention_heads": 12}, "multiple of num_attention_heads"),
    ({"position_buckets": 256, "max_relative_positions": 129}, "no logarithmic region"),
    ({"vocab_size": 10, "pad_token_id": 10}, "below vocab_size"),
])
def test_sizes_that_do_not_fit_each_other_are_refused(read, changes, says):
    with pytest.raises(InputError, match=says):
        read(**changes)


def test_the_smallest_logarithmic_region_is_accepted(read):
    assert read(position_buckets=256, max_relative_positions=130).max_distance == 130


@pytest.mark.parametrize("text, says", [
    ("", "expected a JSON object"), ("{", "expected a JSON object"), ("[1]", "a JSON list"), ("3", "a JSON int"),
    ("null", "a JSON NoneType"), ("[" * 100_000, "expected a JSON object"), (b"\xff\xfe{}", "expected a JSON object"),
    (b"{\"a\": \"\xff\"}", "expected a JSON object"), ('{"hidden_size": NaN}', "model_type|relative_attention"),
])
def test_a_file_that_is_no_json_object_is_one_line_of_error(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=says) as error:
        EncoderConfig.from_json(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_no_file_says_what_folder_is_wanted(tmp_path):
    with pytest.raises(InputError, match="no such file; expected a Hugging Face folder"):
        EncoderConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("config", [EncoderConfig(), SMALL,
                                    resized(SMALL, cls_dropout=0.2, layer_norm_eps=1e-5, pad_token_id=3)])
def test_a_configuration_survives_being_written_and_read(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert EncoderConfig.from_json(path) == config


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    pytest.importorskip("transformers")
    config = resized(SMALL, cls_dropout=0.2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.15,
                     initializer_range=0.03)
    theirs = reference_config(config)
    assert theirs.hidden_size == config.hidden_size
    assert theirs.cls_dropout == 0.2
    assert theirs.num_labels == 3
    assert theirs.id2label == {0: "A", 1: "B", 2: "tie"}
    theirs.save_pretrained(tmp_path)
    assert EncoderConfig.from_json(tmp_path / "config.json") == config


# Recipes.

@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete_and_every_value_names_its_source(name):
    assert isinstance(recipe(name), TrainConfig)
    assert all(source for _, source in RECIPES[name].values())


@pytest.mark.parametrize("warmup, total, wanted", [
    (0.0, 100, 0), (0.08, 1000, 80), (0.5, 1000, 500), (1, 1000, 1), (50, 1000, 50), (1500, 18408, 1500),
    (1500, 1000, 1500), (0.1, 5, 0), (3, 5, 3),
])
def test_warmup_is_steps_or_a_fraction_of_them(warmup, total, wanted):
    assert dataclasses.replace(recipe("tiny"), warmup=warmup).warmup_steps(total) == wanted
    assert setup.warmup(Namespace(warmup=warmup), dataclasses.replace(recipe("tiny"), warmup=warmup), total) == (
        wanted, " (so the learning rate does not reach its peak)" if wanted > total else "")


@pytest.mark.parametrize("name, total, wanted, note", [
    ("microsoft", 18408, 1500, ""), ("microsoft", 15000, 1500, ""),
    ("microsoft", 1000, 100, " (a tenth at most; the recipe has 1,500)"),
    ("microsoft", 5, 1, " (a tenth at most; the recipe has 1,500)"),
    ("baseline", 19, 1, " (a tenth at most; the recipe has 2)"), ("baseline", 1000, 80, ""), ("tiny", 56, 3, ""),
])
def test_a_recipes_warmup_is_at_most_a_tenth_of_the_run_and_says_so(name, total, wanted, note):
    assert setup.warmup(Namespace(), recipe(name), total) == (wanted, note)


@pytest.mark.parametrize("hidden_size, wanted", [(32, "tiny"), (192, "tiny"), (383, "tiny"), (384, "baseline"),
                                                 (768, "baseline"), (1024, "baseline")])
def test_the_default_recipe_follows_the_encoders_size_whatever_its_folder_is_called(tmp_path, hidden_size, wanted):
    for name in ("minipref-tiny", "deberta-v3-small"):
        config = EncoderConfig(hidden_size=hidden_size, num_attention_heads=1)
        runtime.write_json(tmp_path / name / "config.json", config.to_json())
        assert default_recipe(tmp_path / name) == wanted
