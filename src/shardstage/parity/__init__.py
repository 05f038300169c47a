"""The proof that a plan computes what one device would have computed.

Owns the reference (the unmodified model on one process in float64), the tolerance with its derivation, the comparison by every rank of its
own shards, and the diagnosis of a failure. In goes a TrainJob, out comes a ``Verdict``. It refuses to know how a plan was found, and
executes one only through the Engine.

    verdict = prove_job(job)
    verdict.is_equal, verdict.text()
"""

from shardstage.parity.faults import FAULTS, Fault
from shardstage.parity.prove import prove_job
from shardstage.parity.verdict import Row, Verdict

__all__ = ["FAULTS", "Fault", "Row", "Verdict", "prove_job"]
