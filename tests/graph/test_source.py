"""Models are found by name, config or factory, and know what they are trained to do."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import transformers

from shardstage.errors import ConfigError
from shardstage.graph.skeleton import build_skeleton
from shardstage.graph.source import BUILT_IN, load_model
from shardstage.graph.tasks import image_task

FACTORIES = """
import torch
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import image_task

class Tokens(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40))

def images():
    return torch.nn.Linear(8, 10)

def told() -> ModelSource:
    task = image_task(image_size=(2, 2), num_channels=2, num_classes=10)
    return ModelSource(name="told", factory=images, task=task)

prepared = told()
number = 3

def nothing():
    return None

def broken():
    raise ValueError("no such size")
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "factories.py"
    path.write_text(FACTORIES, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_model_can_be_built(name: str) -> None:
    source = load_model(name)
    skeleton = build_skeleton(source.factory)
    assert type(skeleton).__name__ == BUILT_IN[name][1]
    assert type(skeleton).__module__.startswith("transformers.")
    assert source.vocab_size == (None if name == "vit-tiny" else 260)


def test_the_small_llama_is_worth_a_benchmark() -> None:
    skeleton = build_skeleton(load_model("llama-small").factory)
    assert 20e6 < sum(p.numel() for p in skeleton.parameters()) < 40e6


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("llama-tiny", "causal"),
        ("bert-tiny", "masked"),
        ("t5-tiny", "seq2seq"),
        ("vit-tiny", "images"),
    ],
)
def test_a_class_of_transformers_implies_its_task(name: str, objective: str) -> None:
    assert load_model(name).task.objective == objective


def test_a_t5_that_names_no_first_token_of_its_decoder_starts_with_padding(tmp_path: Path) -> None:
    """transformers' own T5Config() has no ``decoder_start_token_id``: ``plan`` ended in an AttributeError."""
    entries = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    assert load_model(str(tmp_path)).task.objective == "seq2seq"


def test_dropout_is_the_model_s_own() -> None:
    assert load_model("gpt2-tiny").hf_config.resid_pdrop == 0.1
    assert load_model("bert-tiny").hf_config.hidden_dropout_prob == 0.1


def test_the_vocabulary_is_the_tokenizer_s() -> None:
    source = load_model("llama-tiny", tokenizer_vocab=1000)
    assert source.vocab_size == 1000
    assert build_skeleton(source.factory).lm_head.weight.shape == (1000, 128)


def test_positions_limit_the_sequence() -> None:
    assert load_model("gpt2-tiny").max_sequence == 1024
    assert load_model("t5-tiny").max_sequence is None


def test_a_folder_and_its_config_name_the_same_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=99
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    for spec in (tmp_path, tmp_path / "config.json"):
        source = load_model(str(spec))
        assert (source.vocab_size, source.task.objective) == (99, "causal")
        assert len(build_skeleton(source.factory).model.layers) == 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "llama"}, "names no class of transformers to build"),
        ({"model_type": "llama", "architectures": ["Unheard"]}, "names no class of transformers to build"),
        ({"model_type": "unheard", "architectures": ["X"]}, "is not the config of a model that transformers"),
        ({"hidden_size": 3}, "is not the config of a model that transformers"),
        (
            {"model_type": "llama", "architectures": ["LlamaModel"]},
            "nothing says what LlamaModel is trained to do",
        ),
        (
            {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
            "nothing says what WhisperForConditionalGeneration is trained to do",
        ),
    ],
)
def test_a_config_that_names_no_model_is_refused(
    entries: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_model(str(tmp_path))


def test_a_factory_in_a_file_is_found(factories: Path) -> None:
    source = load_model(f"{factories}:Tokens")
    assert (source.vocab_size, source.task.objective) == (40, "causal")
    assert load_model(f"{factories}:told").name == "told"
    assert load_model(f"{factories}:prepared").task.objective == "images"


def test_a_factory_in_a_package_is_found() -> None:
    task = image_task(image_size=(8, 8), num_channels=3, num_classes=10)
    assert load_model("tests.graph.families:ResNet", task=task).task is task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images", "nothing says what Linear is trained to do"),
        ("nothing", "made a NoneType, which is no model"),
        ("number", "has no factory 'number'"),
        ("absent", "has no factory 'absent'"),
        ("broken", r"broken raised ValueError: no such size\n  at .*\.py:\d+: raise ValueError"),
    ],
)
def test_a_factory_that_makes_no_model_is_refused(name: str, message: str, factories: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(f"{factories}:{name}")


@pytest.mark.parametrize("spec", ["no.such.package:factory", "no_such_file.py:factory"])
def test_a_factory_that_cannot_be_imported_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_model(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def make(:\n", r"is no Python: invalid syntax\n  at .*model\.py:1: def make\(:"),
        (
            "size = 3\nraise RuntimeError('no GPU')\n",
            r"raised RuntimeError when it was imported: no GPU\n  at .*model\.py:2: raise",
        ),
    ],
)
def test_a_file_that_fails_names_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(f"{tmp_path}/model.py:make")
    assert caught.value.hint == f"python {tmp_path}/model.py"


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"model 'llama-huge' is not known.*llama-tiny.*vit-tiny") as caught:
        load_model("llama-huge")
    assert caught.value.hint == "--model llama-tiny"


def test_a_missing_transformers_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="comes from transformers, which is not installed") as caught:
        load_model("llama-tiny")
    assert caught.value.hint == 'pip install "shardstage[hf]"'


@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny", "vit-tiny"])
def test_a_source_travels_to_other_ranks(name: str) -> None:
    source = pickle.loads(pickle.dumps(load_model(name)))
    batch = source.task.random_batch(1, 4)
    assert source.task.loss(source.factory(), batch).dim() == 0
