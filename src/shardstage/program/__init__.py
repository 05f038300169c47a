"""What will run, written down: one Program, read by the verifier, the simulator, the engine and the report.

Owns the instructions of every rank, how a plan becomes them (``lower``), their text (``format_program``, ``parse_program``) and the proof
that they fit together (``verify``). In go a ModelGraph and a Plan, out comes a Program. It refuses to execute anything, and runs without
torch.
"""

from shardstage.program.instruction import Instruction
from shardstage.program.lower import lower
from shardstage.program.program import Collective, ParameterUse, Program, Row, TensorType
from shardstage.program.stage_graphs import StageGraphs
from shardstage.program.text import format_program, parse_program
from shardstage.program.verify import verify

__all__ = [
    "Collective",
    "Instruction",
    "ParameterUse",
    "Program",
    "Row",
    "StageGraphs",
    "TensorType",
    "format_program",
    "lower",
    "parse_program",
    "verify",
]
