"""What every configuration trains: the same model, weights, batches and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["Step", "Workload", "load_weights", "make_optimizer", "mean_loss", "save_weights"]

Step = Callable[[int], float]
"""Trains on the global batch of a step, and returns the mean loss of its tokens, on the ranks that know it (else nan)."""

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of the model and of a batch; ``folder`` holds the first weights as ``save_pretrained`` writes them.

    The head costs about as much as two layers, so that six layers make two and four equal pipeline stages.
    """

    folder: Path
    num_layers: int = 6
    hidden: int = 384
    num_heads: int = 6
    intermediate: int = 1024
    vocabulary: int = 8192
    sequence: int = 256
    global_batch: int = 16
    microbatch: int = 1  # of pipelines; all others take their share at once

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=False,
            use_cache=False,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids and the ids that follow them, ``[global_batch, sequence]`` each, drawn by Zipf's law from ``step``."""
        generator = torch.Generator().manual_seed(step)
        weights = 1 / torch.arange(1, self.vocabulary + 1)
        count = self.global_batch * (self.sequence + 1)
        ids = torch.multinomial(weights, count, replacement=True, generator=generator)
        ids = ids.view(self.global_batch, self.sequence + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def save_weights(workload: Workload) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(workload.config()).save_pretrained(workload.folder)


def load_weights(workload: Workload) -> LlamaForCausalLM:
    """The unmodified model in float32, ready to train."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(workload.folder, dtype=torch.float32)
    model.train()
    return model


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices and not norms: the peers' optimizer, and the same as ours."""
    held = list(parameters)
    groups = [
        {"params": [p for p in held if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in held if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens given: ``logits [b, s, vocabulary]``, ``labels [b, s]``."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
