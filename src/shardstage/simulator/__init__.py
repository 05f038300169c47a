"""When each rank of a Program would do what, and how much memory it would hold, without a device.

Owns the simulation (streams of ranks, links, collectives, shared cores), the prices that it asks for, memory by instruction, a replay of
the caching allocator and the questions "what if". In go a Program and prices, out comes a predicted Timeline, the type that the engine
measures. It refuses to know the runtime, and runs without torch.
"""

from shardstage.simulator.allocator import Allocation, Replay, replay
from shardstage.simulator.change import Change, parse_change
from shardstage.simulator.holdings import Holdings, RankHolding, StageHolding
from shardstage.simulator.measured import MeasuredPrices, measured_prices
from shardstage.simulator.memory import Holder
from shardstage.simulator.planned import PlannedPrices, planned_prices
from shardstage.simulator.prices import Prices, PriceTable, Wire
from shardstage.simulator.simulate import peak_bytes, peak_holders, reserved, simulate, step_time
from shardstage.simulator.what_if import WhatIf, changed_plan, what_if

__all__ = [
    "Allocation",
    "Change",
    "Holder",
    "Holdings",
    "MeasuredPrices",
    "PlannedPrices",
    "PriceTable",
    "Prices",
    "RankHolding",
    "Replay",
    "StageHolding",
    "WhatIf",
    "Wire",
    "changed_plan",
    "measured_prices",
    "parse_change",
    "peak_bytes",
    "peak_holders",
    "planned_prices",
    "replay",
    "reserved",
    "simulate",
    "step_time",
    "what_if",
]
