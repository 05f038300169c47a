"""Holds the predicted forward and backward of one layer against Korthikanti et al. 2022, table 4: a GPT of 22 billion on 8 A100s.

Usage: python benchmarks/planner/elsewhere/layers.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from published import job_of, profile_of, rows
from software import MEGATRON_2022


def main() -> None:
    print(
        "| layer | forward, measured | predicted | backward, measured | predicted | both |\n|---|---|---|---|---|---|"
    )
    for row in rows("korthikanti-2022-layer"):
        if (
            row["plan"]["recompute"] == "selective"
        ):  # theirs computes the core of attention again, ours all but products
            continue
        job = job_of(row, MEGATRON_2022)
        layer, measured = profile_of(job).units[2], row["measured"]
        forward_ms = 1e3 * (layer.forward_s + layer.tp_forward_s)
        assert isinstance(job.recompute, str)
        again_s = layer.kept[job.recompute].recompute_s
        backward_ms = 1e3 * (layer.backward_s + layer.tp_backward_s + again_s)
        error = (forward_ms + backward_ms) / measured["layer_total_ms"] - 1
        print(
            f"| {row['id'].removeprefix('korthikanti-t4-layer22B-')} | {measured['layer_forward_ms']} ms | {forward_ms:.1f} ms "
            f"| {measured['layer_backward_ms']} ms | {backward_ms:.1f} ms | {100 * error:+.1f} % |"
        )


if __name__ == "__main__":
    main()
