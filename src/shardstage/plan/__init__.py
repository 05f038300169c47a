"""Who does what: the one plan file.

Owns ``Plan``, its TOML form, ``check`` and ``explain``. In goes a shorthand, a file or a search result; out comes the only decision
that anyone reads. It refuses to know how a plan is executed, and runs without torch.

    request = parse_request("dp=2,tp=2")        what was typed
    plan    = complete(request, graph, num_ranks=4, global_batch=16, sequence=256)
    notes   = check(plan, graph, num_ranks=4)   raises PlanError; what is allowed but odd comes back as text
    text    = explain(plan, graph)
    save_plan(plan, "plan.toml"); load_plan("plan.toml") == plan
"""

from shardstage.plan.check import check, check_samples
from shardstage.plan.complete import complete
from shardstage.plan.explain import explain
from shardstage.plan.file import load_plan, plan_from_toml, plan_to_toml, save_plan
from shardstage.plan.plan import (
    GradientDtype,
    Offload,
    Plan,
    Precision,
    ScheduleName,
    StageRange,
)
from shardstage.plan.shorthand import (
    Request,
    decision_named,
    format_request,
    named_decisions,
    parse_request,
    shorthand,
)

__all__ = [
    "GradientDtype",
    "Offload",
    "Plan",
    "Precision",
    "Request",
    "ScheduleName",
    "StageRange",
    "check",
    "check_samples",
    "complete",
    "decision_named",
    "explain",
    "format_request",
    "load_plan",
    "named_decisions",
    "parse_request",
    "plan_from_toml",
    "plan_to_toml",
    "save_plan",
    "shorthand",
]
