"""``ModelSource``: where a model comes from and what it is trained to do; ``load_model`` finds one by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn

from shardstage.errors import ConfigError, ShardstageError
from shardstage.graph.skeleton import build_skeleton
from shardstage.graph.tasks import Task, causal_task, image_task, masked_task, seq2seq_task

__all__ = ["BUILT_IN", "ModelSource", "import_object", "load_model", "source_of_model"]

_IMAGE_SIZE = 224  # of ImageNet, for a model that reads images of any size
BYTE_VOCABULARY = 260  # what a tokenizer of bytes needs: 256 and four special tokens


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be built anywhere: ``factory()`` makes it anew, with weights of its own initialisation.

    ``vocab_size`` and ``max_sequence`` are None where the model has no such limit; ``hf_config`` is the ``transformers``
    config where there is one.
    """

    name: str
    factory: Callable[[], nn.Module]
    task: Task
    vocab_size: int | None = None
    hf_config: Any = None
    max_sequence: int | None = None


# Small sizes of unmodified transformers classes: (class of config, class of model, sizes). The vocabulary is the tokenizer's.
_TINY_ATTENTION = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
BUILT_IN: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama-tiny": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_TINY_ATTENTION, "intermediate_size": 344, "num_hidden_layers": 8},
    ),
    "llama-small": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
        },
    ),
    "gpt2-tiny": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 128, "n_layer": 6, "n_head": 4}),
    "bert-tiny": (
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
    ),
    "mixtral-tiny": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_TINY_ATTENTION, "intermediate_size": 256, "num_hidden_layers": 4, "num_local_experts": 4},
    ),
    "t5-tiny": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 4,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "vit-tiny": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "num_labels": 10,
        },
    ),
}


def load_model(spec: str, *, task: Task | None = None, tokenizer_vocab: int | None = None) -> ModelSource:
    """The model that ``spec`` names: a built-in name, a Hugging Face folder or config.json, or ``module:factory``.

    ``tokenizer_vocab`` sizes the embedding of the built-in ones; ``task`` replaces the one that the model's class implies.
    Raises ConfigError for an unknown name, a missing library or a factory that makes no model.
    """
    if spec in BUILT_IN:
        return _built_in(spec, task, tokenizer_vocab or BYTE_VOCABULARY)
    path = Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        return _from_config_file(spec, path, task)
    place, _, name = spec.rpartition(":")
    if place and name and not path.exists():
        return _from_factory(spec, task)
    raise ConfigError(
        f"model {spec!r} is not known: neither a built-in name ({', '.join(BUILT_IN)}), a folder with a config.json, "
        "such a file, nor module:factory",
        hint=f"--model {path}:factory" if path.suffix == ".py" else "--model llama-tiny",
    )


def source_of_model(model: nn.Module, *, task: Task | None = None, name: str = "") -> ModelSource:
    """A source for a model that exists already; its factory returns that very model.

    Raises ConfigError where no task is given and the model's class does not imply one.
    """
    config = getattr(model, "config", None)
    return ModelSource(
        name=name or type(model).__name__,
        factory=lambda: model,
        task=task or _task_of(model),
        vocab_size=getattr(config, "vocab_size", None),
        hf_config=config,
        max_sequence=_max_sequence(config),
    )


def _built_in(name: str, task: Task | None, vocab_size: int) -> ModelSource:
    config_class, model_class, sizes = BUILT_IN[name]
    transformers = _transformers()
    vocabulary = {} if name.startswith("vit") else {"vocab_size": vocab_size, **_SPECIAL_TOKENS}
    config = getattr(transformers, config_class)(**sizes, **vocabulary)
    return _from_config(name, config, model_class, task)


# The byte tokenizer's.
_SPECIAL_TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def _from_config_file(spec: str, path: Path, task: Task | None) -> ModelSource:
    transformers = _transformers()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        config = transformers.AutoConfig.for_model(**entries)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the config of a model that transformers {transformers.__version__} knows: {error}",
            hint="--model llama-tiny",
        ) from error
    architectures = entries.get("architectures") or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise ConfigError(
            f"{path} names no class of transformers to build: architectures = {architectures}",
            hint='"architectures": ["LlamaForCausalLM"]',
        )
    return _from_config(spec, config, architectures[0], task)


def _from_config(name: str, config: Any, model_class: str, task: Task | None) -> ModelSource:
    return ModelSource(
        name=name,
        factory=partial(_build_transformers, config, model_class),
        task=task or _task_of_class(model_class, config),
        vocab_size=getattr(config, "vocab_size", None),
        hf_config=config,
        max_sequence=_max_sequence(config),
    )


def _build_transformers(config: Any, model_class: str) -> nn.Module:
    model: nn.Module = getattr(_transformers(), model_class)(config)
    return model


def _from_factory(spec: str, task: Task | None) -> ModelSource:
    """``module:factory`` where ``factory()`` makes a module, is annotated to make a ModelSource, or is one."""
    place, _, name = spec.rpartition(":")
    made = import_object(spec, what="model")
    if isinstance(made, ModelSource):
        return made
    if not callable(made):
        raise ConfigError(f"{place} has no factory {name!r}", hint=f"def {name}() -> torch.nn.Module: ...")
    if getattr(made, "__annotations__", {}).get("return") in (ModelSource, "ModelSource"):
        source: ModelSource = made()
        return source
    skeleton = _skeleton(spec, made)
    config = getattr(skeleton, "config", None)
    return ModelSource(
        name=spec,
        factory=made,
        task=task or _task_of(skeleton),
        vocab_size=getattr(config, "vocab_size", None) or _embedded_tokens(skeleton),
        hf_config=config,
        max_sequence=_max_sequence(config),
    )


def _skeleton(spec: str, made: Callable[[], nn.Module]) -> nn.Module:
    """The factory's model; ``ConfigError`` with the factory's own line for whatever it raises."""
    try:
        return build_skeleton(made)
    except ShardstageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = inspect.getsourcefile(made)
        at = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        raise ConfigError(
            f"the factory {spec} raised {type(error).__name__}: {error}\n  at {at.filename}:{at.lineno}: {at.line}",
            hint="a factory takes nothing and returns the model, as it would without shardstage",
        ) from error


def import_object(spec: str, *, what: str) -> Any:
    """What ``module:name`` or ``file.py:name`` names, None where the module has no such name; ``what`` is it in an error's words.

    Raises ConfigError where the module cannot be imported.
    """
    place, _, name = spec.rpartition(":")
    return getattr(_import(place, spec, what), name, None)


def _import(place: str, spec: str, what: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser()
        found = importlib.util.spec_from_file_location(path.stem, path)
        if found is None or found.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"the {what} {spec!r} cannot be imported: {error}", hint="path/to/file.py:name"
        ) from error
    except SyntaxError as error:
        raise ConfigError(
            f"the {what} {spec!r} is no Python: {error.msg}\n  at {error.filename}:{error.lineno}: {(error.text or '').strip()}",
            hint=f"python {place}",
        ) from error
    except Exception as error:  # whatever the module's own lines raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the {what} {spec!r} raised {type(error).__name__} when it was imported: {error}\n  at {at.filename}:{at.lineno}: {at.line}",
            hint=f"python -c 'import {place}'" if not place.endswith(".py") else f"python {place}",
        ) from error


def _task_of(model: nn.Module) -> Task:
    """A transformers class says by its name what it is for; a plain module that embeds tokens is taken to predict the next one."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "model_type"):
        return _task_of_class(type(model).__name__, config)
    tokens = _embedded_tokens(model)
    if tokens is None:
        raise ConfigError(
            f"nothing says what {type(model).__name__} is trained to do",
            hint=_OWN_TASK,
        )
    return causal_task(tokens)


def _task_of_class(model_class: str, config: Any) -> Task:
    if model_class.endswith(("ForCausalLM", "LMHeadModel")):
        return causal_task(config.vocab_size)
    if model_class.endswith("ForMaskedLM"):
        return masked_task(config.vocab_size)
    is_seq2seq = getattr(config, "is_encoder_decoder", False) and _reads_tokens(model_class)
    if model_class.endswith("ForConditionalGeneration") and is_seq2seq:
        start_id, pad_id = (
            getattr(config, name, None) or 0 for name in ("decoder_start_token_id", "pad_token_id")
        )  # T5's configuration has no first
        return seq2seq_task(config.vocab_size, start_id=start_id, pad_id=pad_id)
    if model_class.endswith("ForImageClassification"):
        size = getattr(config, "image_size", _IMAGE_SIZE)
        return image_task(
            image_size=(size, size) if isinstance(size, int) else tuple(size),
            num_channels=config.num_channels,
            num_classes=config.num_labels,
        )
    raise ConfigError(f"nothing says what {model_class} is trained to do", hint=_OWN_TASK)


_OWN_TASK: Final = (
    "--model mine.py:source of a function def source() -> ModelSource: "
    "return ModelSource(name=..., factory=..., task=batch_task(loss, example_batch))"
)


def _reads_tokens(model_class: str) -> bool:
    """Whether a class of transformers reads tokens first, not sounds, say."""
    return getattr(getattr(_transformers(), model_class, None), "main_input_name", "input_ids") == "input_ids"


def _embedded_tokens(model: nn.Module) -> int | None:
    sizes = (module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    return next(sizes, None)


def _max_sequence(config: Any) -> int | None:
    """The longest sequence that the model has positions for; of rotary positions, what it was made for."""
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and getattr(config, "model_type", "") != "t5":
            return limit
    return None


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "this model comes from transformers, which is not installed", hint='pip install "shardstage[hf]"'
        ) from error
