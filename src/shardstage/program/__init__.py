"""What will run, written down: one Program, read by the verifier, the simulator, the engine and the report.

Owns the instructions of every rank, how a plan becomes them (``lower``) and the proof that they fit together (``verify``). In go a
ModelGraph and a Plan, out comes a Program. It refuses to execute anything, and runs without torch.
"""

from shardstage.program.instruction import Instruction
from shardstage.program.lower import lower
from shardstage.program.program import Program
from shardstage.program.verify import verify

__all__ = ["Instruction", "Program", "lower", "verify"]
