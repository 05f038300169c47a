"""The state of a run on disk: saved whole or not at all, readable by any plan, exportable to Hugging Face.

Owns the files of a checkpoint: global tensors by the model's own names, written and read by boxes through
``torch.distributed.checkpoint``, beside a small JSON of whatever else the run must remember. In go ``StateEntry``s (which part of which
global tensor lies in this memory) or a folder; out come a folder, filled memory, or a Hugging Face folder. It refuses to know engines,
optimizers and plans: a rank says what it holds, and nothing here asks why.
"""

from shardstage.checkpoint.entry import StateEntry
from shardstage.checkpoint.export import export_hf
from shardstage.checkpoint.folder import latest
from shardstage.checkpoint.load import load
from shardstage.checkpoint.save import save

__all__ = ["StateEntry", "export_hf", "latest", "load", "save"]
