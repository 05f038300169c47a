"""Samples, and the batches that each rank takes from them.

Owns:    reading text, tokenizers, packing into sequences, the global order of samples, shares of a batch.
In:      files or folders (or any indexable of dicts of tensors), a tokenizer's name, global batch, seed.
Out:     ``Microbatch``: plain CPU tensors ``[b, S]`` with the ids and the global positions of their samples.
Refuses to know: meshes, ranks, process groups, devices and models. A share of a batch is a ``range`` of
         positions in the global batch; who owns which share is the plan's decision, so the order of samples
         is the same for every mesh.

    files ─read─▶ documents ─encode─▶ tokens ─cut─▶ samples ─shuffle─▶ global batch ─share─▶ microbatches
"""

from shardstage.data.batches import Microbatch, RankBatches
from shardstage.data.config import DataConfig, Objective, Split
from shardstage.data.packed_text import PackedText
from shardstage.data.random_samples import RandomSamples, TensorSpec
from shardstage.data.sampler import BatchSampler, shares
from shardstage.data.source import IndexedSource, SampleSource, as_source
from shardstage.data.tokenizer import ByteTokenizer, PretrainedTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BatchSampler",
    "ByteTokenizer",
    "DataConfig",
    "IndexedSource",
    "Microbatch",
    "Objective",
    "PackedText",
    "PretrainedTokenizer",
    "RandomSamples",
    "RankBatches",
    "SampleSource",
    "Split",
    "TensorSpec",
    "Tokenizer",
    "as_source",
    "load_tokenizer",
    "shares",
]
