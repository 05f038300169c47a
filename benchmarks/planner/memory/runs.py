"""The published runs, beside the project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import Shape

__all__ = ["DATA", "rows", "shape_of"]

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "published-runs"


def rows(group: str) -> Iterator[dict[str, Any]]:
    for line in (DATA / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["group"] == group:
            yield row


def shape_of(model: dict[str, Any]) -> Shape:
    heads = model["heads"]
    return Shape(
        layers=model["layers"],
        hidden=model["hidden"],
        ffn_hidden=model["ffn_hidden"],
        heads=heads,
        kv_heads=model["kv_heads"] or heads,
        head_dim=model["head_dim"] or model["hidden"] // heads,
        vocab=model["vocab"],
        mlp_mats=model["mlp_mats"],
        is_tied=bool(model["tied_embeddings"]),
    )
