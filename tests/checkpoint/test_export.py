"""An exported folder is the trained model to ``transformers``: equal logits, ties and settings included."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from shardstage.checkpoint import StateEntry, export_hf, save
from shardstage.checkpoint.export import check_export_folder
from shardstage.checkpoint.safetensors_file import StoredTensor, write_safetensors
from shardstage.errors import CheckpointError
from shardstage.graph.source import ModelSource, load_model, source_of_model
from shardstage.graph.tasks import batch_task
from shardstage.layout import Shard, balanced_sizes

CLASSES = {
    "llama-tiny": transformers.AutoModelForCausalLM,
    "gpt2-tiny": transformers.AutoModelForCausalLM,
    "mixtral-tiny": transformers.AutoModelForCausalLM,
    "bert-tiny": transformers.AutoModelForMaskedLM,
    "t5-tiny": transformers.AutoModelForSeq2SeqLM,
    "vit-tiny": transformers.AutoModelForImageClassification,
}


def save_model(folder: Path, model: nn.Module, *, num_ranks: int = 3) -> None:
    """A checkpoint of the model's parameters, each once, cut unevenly along dim 0, as ranks would have written it."""
    entries = []
    for fqn, parameter in model.named_parameters():
        placement = Shard(dim=0, sections=(balanced_sizes(parameter.shape[0], num_ranks),))
        for rank, part in enumerate(parameter.detach().split(placement.sizes())):
            entries.append(
                StateEntry(
                    key=f"model.{fqn}",
                    tensor=part.contiguous(),
                    global_shape=tuple(parameter.shape),
                    placement=placement,
                    tp_rank=rank,
                )
            )
    save(folder, 7, entries, {})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with values that no initialisation gives, and the folder of its checkpoint."""

    source: ModelSource
    model: nn.Module
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """By the name of a built-in model; saved once for all tests, which only read it."""

    @cache
    def train(name: str) -> Trained:
        source = load_model(name)
        model = source.factory().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        folder = tmp_path_factory.mktemp(name)
        save_model(folder, model)
        return Trained(source=source, model=model, folder=folder)

    return train


def logits(source: ModelSource, model: nn.Module) -> Tensor:
    batch = source.task.random_batch(2, 16 if source.task.has_sequence else None)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if source.task.objective == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_it_with_equal_logits(
    trained: Callable[[str], Trained], tmp_path: Path, name: str
) -> None:
    saved = trained(name)
    out = export_hf(saved.folder, saved.source, tmp_path / "out")
    loaded, report = CLASSES[name].from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is type(saved.model)
    assert torch.equal(logits(saved.source, loaded), logits(saved.source, saved.model))


def test_tied_weights_are_written_once_under_the_name_that_transformers_gives(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    saved = trained("gpt2-tiny")
    out = export_hf(saved.folder, saved.source, tmp_path / "out")
    saved.model.save_pretrained(tmp_path / "theirs")
    ours = load_file(out / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text()) == json.loads((tmp_path / "theirs" / file).read_text())


def test_a_large_model_is_written_in_several_files(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    saved = trained("llama-tiny")
    out = export_hf(saved.folder, saved.source, tmp_path / "out", step=7, max_shard_bytes=2**20)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert all((out / file).stat().st_size < 2**20 + 2**14 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(saved.source, loaded), logits(saved.source, saved.model))


def test_weights_can_be_written_in_another_dtype(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    saved = trained("llama-tiny")
    out = export_hf(saved.folder, saved.source, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(out / "model.safetensors")
    assert all(
        torch.equal(stored[fqn], value.to(torch.bfloat16)) for fqn, value in saved.model.state_dict().items()
    )


@pytest.mark.parametrize("is_file", [False, True])
def test_a_tokenizer_goes_along(trained: Callable[[str], Trained], tmp_path: Path, is_file: bool) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "vocab.txt").write_text("a\n")
    (tokenizer / "weights.bin").write_text("not this")
    saved = trained("bert-tiny")
    given = tokenizer / "tokenizer.json" if is_file else tokenizer
    out = export_hf(saved.folder, saved.source, tmp_path / "out", tokenizer=given)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    }


def test_a_folder_that_holds_something_is_never_replaced(tmp_path: Path) -> None:
    check_export_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_export_folder(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="exists already, and an export replaces nothing") as caught:
        check_export_folder(tmp_path)
    assert caught.value.hint == f"{tmp_path}-2"


def test_an_empty_folder_is_filled(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    saved = trained("bert-tiny")
    (tmp_path / "out").mkdir()
    assert (export_hf(saved.folder, saved.source, tmp_path / "out") / "config.json").is_file()


def test_a_full_disk_leaves_no_half_export(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained("bert-tiny")
    usual = Path.open

    def open_full(path: Path, mode: str = "r", **kwargs: object) -> object:
        return usual(Path("/dev/full") if path.suffix == ".safetensors" else path, mode, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(CheckpointError, match=r"cannot be exported .*No space left on device"):
        export_hf(saved.folder, saved.source, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_another_model_is_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    saved = trained("bert-tiny")
    with pytest.raises(
        CheckpointError, match=r"of another model: it has no model.embed_tokens.weight of shape"
    ):
        export_hf(saved.folder, load_model("llama-tiny"), tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"it has no bert.embeddings.word_embeddings.weight of shape \(300, 128\)"
    ):
        export_hf(saved.folder, load_model("bert-tiny", tokenizer_vocab=300), tmp_path / "out")


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    save_model(tmp_path / "checkpoints", model)
    source = source_of_model(model, task=batch_task(lambda model, batch: model(**batch), {}))
    with pytest.raises(CheckpointError, match="Linear is no Hugging Face model"):
        export_hf(tmp_path / "checkpoints", source, tmp_path / "out")


def test_a_file_written_one_tensor_at_a_time_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2),
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3),
        "half": torch.randn(5).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(4, 3).t(),
    }
    stored = [StoredTensor(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", stored, iter(tensors.values()))
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )


def test_a_dtype_that_such_files_lack_is_refused(tmp_path: Path) -> None:
    complex_tensor = StoredTensor(name="c", shape=(1,), dtype=torch.complex64)
    with pytest.raises(CheckpointError, match=r"no torch.complex64"):
        write_safetensors(tmp_path / "x.safetensors", [complex_tensor], [])
