"""First values: the model's own rule, the same bits on every rank, never more than one whole tensor at a time."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardstage.errors import CheckpointError, ConfigError
from shardstage.graph.source import ModelSource, load_model
from shardstage.graph.tasks import batch_task
from shardstage.layout import Placement, Replicate, Shard, balanced_sizes
from shardstage.runtime.weights import initial_buffers, initial_weights, initialised_model, local_part

FAMILIES = ("llama-tiny", "gpt2-tiny", "bert-tiny", "t5-tiny", "vit-tiny", "mixtral-tiny")


class Odd(nn.Module):
    """Every way to give a parameter its first value; sizes on both sides of what a skeleton keeps real."""

    def __init__(self) -> None:
        super().__init__()
        self.by_rule = nn.Linear(300, 400)
        self.orthogonal = nn.Linear(300, 300, bias=False)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.truncated = nn.Linear(300, 300, bias=False)
        nn.init.trunc_normal_(self.truncated.weight, std=0.02)
        self.recurrent = nn.LSTM(200, 100)
        self.norm = nn.BatchNorm2d(4)
        self.padded = nn.Embedding(1000, 80, padding_idx=3)
        self.drawn = nn.Parameter(torch.randn(2048, 1024) * 0.02)
        self.copied = nn.Parameter(self.drawn[:512].detach().clone())
        self.small = nn.Parameter(torch.randn(3))
        self.patched = nn.Linear(300, 300)
        with torch.no_grad():
            self.patched.weight.copy_(torch.eye(300))
            self.patched.weight[0].mul_(5)
            self.patched.weight[:, 2].uniform_(1, 2)
        self.tied = nn.Linear(80, 1000, bias=False)
        self.tied.weight = self.padded.weight
        self.register_buffer("mask", torch.tril(torch.ones(300, 300)))


def source_of(factory: Callable[[], nn.Module]) -> ModelSource:
    task = batch_task(lambda model, batch: model(**batch), {})
    return ModelSource(name="test", factory=factory, task=task)


@pytest.fixture(scope="module")
def odd() -> nn.Module:
    return initialised_model(source_of(Odd), seed=1)


def by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_values_follow_the_rule_of_an_unmodified_model(name: str) -> None:
    source = load_model(name, tokenizer_vocab=1000)
    ours, theirs = initialised_model(source, seed=3), source.factory()
    assert list(by_name(ours)) == list(by_name(theirs))
    for fqn, value in by_name(ours).items():
        expected = by_name(theirs)[fqn]
        if expected.numel() > 1:
            spread, noise = expected.std(), 6 * expected.std() / expected.numel() ** 0.5
            assert abs(value.std() - spread) <= noise, fqn
            assert abs(value.mean() - expected.mean()) <= 2 * noise + 1e-9, fqn
    for (fqn, buffer), (_, expected_buffer) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, expected_buffer), fqn


def test_every_way_to_make_a_value_is_followed(odd: nn.Module) -> None:
    weights = by_name(odd)
    identity = weights["orthogonal.weight"] @ weights["orthogonal.weight"].T
    assert torch.allclose(identity, torch.eye(300), atol=1e-5)
    assert weights["truncated.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["by_rule.weight"].abs().max() <= 300**-0.5
    assert weights["drawn"].std().item() == pytest.approx(0.02, rel=0.01)
    assert torch.equal(weights["copied"], weights["drawn"][:512])
    assert weights["padded.weight"][3].count_nonzero() == 0
    assert weights["tied.weight"] is weights["padded.weight"]
    patched = torch.eye(300)
    patched[0].mul_(5)
    patched[:, 2] = weights["patched.weight"][:, 2]
    assert torch.equal(weights["patched.weight"], patched)
    assert 1 <= patched[:, 2].min() < patched[:, 2].max() <= 2
    assert torch.equal(odd.get_buffer("mask"), torch.tril(torch.ones(300, 300)))


def test_a_whole_model_runs(odd: nn.Module) -> None:
    recurrent = odd.get_submodule("recurrent")
    output, _ = recurrent(torch.zeros(3, 2, 200))
    assert output.shape == (3, 2, 100)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_value_depends_on_the_seed_alone(odd: nn.Module, seed: int) -> None:
    torch.manual_seed(99)
    wanted = dict.fromkeys(reversed(by_name(odd)), Replicate())
    values = dict(
        initial_weights(source_of(Odd), {k: wanted[k] for k in list(wanted)[::2]}, tp_rank=0, seed=seed)
    )
    drawn = [fqn for fqn in values if by_name(odd)[fqn].std() > 0 and fqn not in ("patched.weight",)]
    assert len(drawn) > 5
    for fqn in drawn:
        assert torch.equal(values[fqn], by_name(odd)[fqn]) == (seed == 1), fqn


def test_making_weights_leaves_the_random_states_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dict(
        initial_weights(
            source_of(Odd), {"by_rule.weight": Replicate(), "small": Replicate()}, tp_rank=0, seed=1
        )
    )
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("tp_rank", range(3))
def test_a_shard_is_its_part_of_the_whole(odd: nn.Module, tp_rank: int) -> None:
    rows = Shard(dim=0, sections=(balanced_sizes(400, 3),))
    fused = Shard(dim=1, sections=((100, 50, 50), (60, 40, 0)))
    wanted: Mapping[str, Placement] = {
        "by_rule.weight": rows,
        "by_rule.bias": rows,
        "orthogonal.weight": fused,
    }
    shards = dict(initial_weights(source_of(Odd), wanted, tp_rank=tp_rank, seed=1))
    for fqn, shard in shards.items():
        placement = wanted[fqn]
        assert isinstance(placement, Shard)
        whole = by_name(odd)[fqn]
        parts = [whole.narrow(placement.dim, a, b - a) for a, b in placement.intervals(tp_rank)]
        assert torch.equal(shard, torch.cat(parts, placement.dim))
        assert shard.untyped_storage().nbytes() == shard.numel() * 4


def test_higher_precision_holds_the_same_values(odd: nn.Module) -> None:
    wide = dict(
        initial_weights(
            source_of(Odd), {"by_rule.weight": Replicate()}, tp_rank=0, seed=1, dtype=torch.float64
        )
    )
    assert torch.equal(wide["by_rule.weight"], by_name(odd)["by_rule.weight"].double())
    whole = initialised_model(source_of(Odd), seed=1, dtype=torch.float64)
    assert torch.equal(by_name(whole)["by_rule.weight"], wide["by_rule.weight"])


def test_without_buffers_no_model_is_built() -> None:
    """Each stage of a rank built the whole model's skeleton once more, to find that it has no buffers."""

    def never() -> torch.nn.Module:
        raise AssertionError("built")

    assert dict(initial_buffers(source_of(never), ())) == {}


def test_buffers_are_whole_and_in_the_model_s_own_dtype() -> None:
    buffers = dict(initial_buffers(source_of(Odd), ["mask", "norm.running_var", "norm.num_batches_tracked"]))
    assert torch.equal(buffers["mask"], torch.tril(torch.ones(300, 300)))
    assert torch.equal(buffers["norm.running_var"], torch.ones(4))
    assert buffers["norm.num_batches_tracked"].dtype == torch.int64


def test_a_model_that_exists_is_sliced_and_never_changed() -> None:
    model = Odd()
    before = {fqn: value.detach().clone() for fqn, value in by_name(model).items()}
    source = source_of(lambda: model)
    for value in dict(
        initial_weights(source, dict.fromkeys(before, Replicate()), tp_rank=0, seed=1)
    ).values():
        value.add_(1)
    for _, buffer in initial_buffers(source, ["norm.running_mean"]):
        buffer.add_(1)
    for parameter in initialised_model(source, seed=1).parameters():
        parameter.data.add_(1)
    assert all(torch.equal(value, before[fqn]) for fqn, value in by_name(model).items())
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


class Peeks(nn.Module):
    """Looks at its weights while it is built, so it needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 300)
        if self.layer.weight.sum().item() > 0:
            self.sign = 1


def test_a_model_that_looks_at_its_weights_is_built_whole_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = {"layer.weight": Replicate()}
    with caplog.at_level(logging.WARNING):
        first, second = (dict(initial_weights(source_of(Peeks), wanted, tp_rank=0, seed=1)) for _ in range(2))
    assert "cannot be built without its weights" in caplog.text
    assert torch.equal(first["layer.weight"], second["layer.weight"])


def test_a_parameter_that_nobody_initialises_is_zero_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def factory() -> nn.Module:
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(300, 300))
        return model

    with caplog.at_level(logging.WARNING):
        values = dict(initial_weights(source_of(factory), {"w": Replicate()}, tp_rank=0, seed=1))
    assert values["w"].count_nonzero() == 0
    assert "w is never initialised" in caplog.text


def test_a_name_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter or buffer 'nothing'; it has drawn, copied"):
        dict(initial_weights(source_of(Odd), {"nothing": Replicate()}, tp_rank=0, seed=1))


def test_a_placement_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"S\(0: 1/1\) does not fit a tensor of shape \(3, 2\)"):
        local_part(torch.zeros(3, 2), Shard(dim=0, sections=((1, 1),)), 0)


_PEAK = """
import sys, torch
from torch import nn
from shardstage.graph.source import ModelSource
from shardstage.graph.tasks import batch_task
from shardstage.layout import Shard, balanced_sizes
from shardstage.runtime.peak_memory import PeakMemory
from shardstage.runtime.weights import initial_weights

def shards(size, folder=None):
    factory = lambda: nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(12)))
    source = ModelSource(name="wide", factory=factory, task=batch_task(lambda m, b: m(**b), {}))
    wanted = {f"{i}.weight": Shard(dim=i % 2, sections=(balanced_sizes(size, 4),)) for i in range(12)}
    return dict(initial_weights(source, wanted, tp_rank=1, seed=0, folder=folder))

shards(300)  # torch imports what it needs
peak = PeakMemory(torch.device("cpu"))
peak.begin(kept_bytes=0)
held = shards(2048, sys.argv[1] or None)
peak.observe()
print(peak.peak_bytes)
"""


@pytest.mark.parametrize("is_streamed", [False, True], ids=["drawn", "streamed"])
def test_a_rank_holds_its_shard_and_one_tensor(tmp_path: Path, is_streamed: bool) -> None:
    """12 matrices of 16 MiB, a quarter of each: 48 MiB of shards and 16 MiB of one tensor, of 192 MiB in all."""
    if is_streamed:
        save_file({f"{i}.weight": torch.zeros(2048, 2048) for i in range(12)}, tmp_path / "model.safetensors")
    ended = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path) if is_streamed else ""],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(
                2**20
            ),  # glibc gives large tensors back at once: residents are alive
        },
    )
    assert ended.returncode == 0, ended.stderr
    shards_bytes, tensor_bytes, slack_bytes = 48 * 2**20, 16 * 2**20, 4 * 2**20
    assert shards_bytes <= int(ended.stdout) < shards_bytes + tensor_bytes + slack_bytes


class Tied(nn.Module):
    """A base model and a head that shares its embedding, named as Hugging Face names them."""

    base_model_prefix = "model"

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(10, 6)
        self.model.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(num_layers))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.model.embed.weight


def stored(prefix: str = "model.") -> dict[str, Tensor]:
    names = ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "embed.weight")
    shapes = ((6, 6), (6,), (6, 6), (6,), (10, 6))
    return {f"{prefix}{name}": torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}


def streamed(folder: Path, factory: Callable[[], nn.Module] = Tied) -> dict[str, Tensor]:
    wanted = dict.fromkeys(by_name(factory()), Replicate())
    return dict(initial_weights(source_of(factory), wanted, tp_rank=0, seed=0, folder=folder))


@pytest.mark.parametrize("prefix", ["model.", "", "head"])
def test_files_are_read_under_tied_names_and_without_the_base_prefix(tmp_path: Path, prefix: str) -> None:
    tensors = stored("model." if prefix == "head" else prefix)
    embedding = tensors["embed.weight" if prefix == "" else "model.embed.weight"]
    if prefix == "head":
        tensors["head.weight"] = tensors.pop("model.embed.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    values = streamed(tmp_path)
    assert torch.equal(values["head.weight"], embedding)
    assert torch.equal(values["model.embed.weight"], embedding)
    assert torch.equal(
        values["model.layers.1.weight"], tensors[f"{prefix.replace('head', 'model.')}layers.1.weight"]
    )


def test_shards_are_read_from_several_files_in_the_wanted_dtype(tmp_path: Path) -> None:
    tensors = stored()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t.to(torch.bfloat16) for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    fused = Shard(dim=1, sections=((2, 1, 0), (1, 1, 1)))
    wanted: Mapping[str, Placement] = {
        "model.layers.0.weight": fused,
        "head.weight": Shard(dim=0, sections=((4, 3, 3),)),
    }
    values = dict(
        initial_weights(source_of(Tied), wanted, tp_rank=1, seed=0, dtype=torch.float64, folder=tmp_path)
    )
    rounded = {name: tensor.to(torch.bfloat16).double() for name, tensor in tensors.items()}
    assert torch.equal(values["model.layers.0.weight"], rounded["model.layers.0.weight"][:, [2, 4]])
    assert torch.equal(values["head.weight"], rounded["model.embed.weight"][4:7])


def faults() -> Iterator[tuple[dict[str, Tensor], str]]:
    whole = stored()
    yield {n: t for n, t in whole.items() if "1.bias" not in n}, r"no tensor for 1 of .*: model.layers.1.bias"
    yield {**whole, "model.layers.2.weight": torch.zeros(6, 6)}, r"no place for: model.layers.2.weight"
    yield {**whole, "model.embed.bias": torch.zeros(6)}, r"no place for: model.embed.bias"
    yield (
        {**whole, "model.embed.weight": torch.zeros(11, 6)},
        r"has shape \(11, 6\), the model wants \(10, 6\)",
    )


@pytest.mark.parametrize(("tensors", "message"), list(faults()), ids=["missing", "layer", "bias", "shape"])
def test_files_of_another_model_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        streamed(tmp_path)
    assert caught.value.hint


def test_another_task_s_head_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({**stored(), "pooler.dense.weight": torch.zeros(6, 6)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert len(streamed(tmp_path)) == 6
    assert "left out: pooler.dense.weight" in caplog.text


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match="no safetensors files" if content is None else "cannot be read"
    ):
        streamed(tmp_path)


def test_a_hugging_face_folder_gives_its_own_weights(tmp_path: Path) -> None:
    source = load_model("gpt2-tiny")
    model = source.factory()
    model.save_pretrained(tmp_path)
    again = initialised_model(replace(source), seed=0, folder=tmp_path)
    assert all(torch.equal(value, by_name(again)[fqn]) for fqn, value in by_name(model).items())
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
