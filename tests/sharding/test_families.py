"""Sharded over any number of ranks, a model computes what one device does: the loss and every gradient, to 1e-10."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.sharding.cases import FAMILIES, UNEVEN, case
from tests.sharding.lockstep import assert_same, run_sharded, run_whole

from shardstage.layout import Shard
from shardstage.sharding import Sharding, localize, shard

MESHES = (
    pytest.param(2, False, id="two ranks"),
    pytest.param(3, True, id="three ranks, sequence parallel"),
    pytest.param(4, False, id="four ranks"),
    pytest.param(4, True, id="four ranks, sequence parallel"),
)

# With sequence parallel, an all_reduce becomes a reduce_scatter, and a sum_gradient an all_gather.
COMMUNICATION = {
    "llama": "two reductions a layer, one of the embedding, one in the loss: of 21 parameters, 16 are cut",
    "gpt2": "two reductions a layer, one of the embedding, one in the loss: of 28 parameters, 13 are cut",
    "bert": "two reductions a layer, one of the embedding, one in the loss: of 42 parameters, 22 are cut",
    "t5": "five reductions a layer, two of the embedding, one in the loss: of 47 parameters, 33 are cut",
    "vit": "two reductions a layer, none of the embedding, one in the loss: of 40 parameters, 22 are cut",
    "mixtral": "two reductions a layer, one of the embedding, one in the loss: of 21 parameters, 14 are cut",
    "resnet": "no reductions a layer, none of the embedding, one in the loss: of 31 parameters, 2 are cut",
    "unet": "no reductions a layer, none of the embedding, none in the loss: of 46 parameters, 0 are cut",
    "lstm": "no reductions a layer, one of the embedding, one in the loss: of 11 parameters, 3 are cut",
}
NUMBERS = ("none", "one", "two", "three", "four", "five")


@pytest.mark.parametrize(("num_ranks", "is_sequence_parallel"), MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same_on_several_ranks(
    family: str, num_ranks: int, is_sequence_parallel: bool
) -> None:
    given = case(family)
    sharding = shard(given.graph, num_ranks=num_ranks, is_sequence_parallel=is_sequence_parallel)
    assert_same(run_sharded(sharding, given.state, given.batch), given.whole)


@pytest.mark.parametrize(("num_ranks", "is_sequence_parallel"), MESHES)
@pytest.mark.parametrize("model", UNEVEN)
def test_a_model_that_no_number_of_ranks_divides_computes_the_same(
    model: str, num_ranks: int, is_sequence_parallel: bool
) -> None:
    given = case(model)
    sharding = shard(given.graph, num_ranks=num_ranks, is_sequence_parallel=is_sequence_parallel)
    assert_same(run_sharded(sharding, given.state, given.batch), given.whole)


@pytest.mark.parametrize("family", ["llama", "resnet", "unet"])
def test_one_rank_runs_the_graph_itself_where_nothing_is_random(family: str) -> None:
    given = case(family)
    assert localize(shard(given.graph, num_ranks=1), 0).ops == given.graph.ops
    assert_same(given.whole, run_whole(given.graph, given.state, given.batch))


@pytest.mark.parametrize("family", COMMUNICATION)
def test_regions_talk_once_in_each_direction(family: str) -> None:
    assert described(shard(case(family).graph, num_ranks=2)) == COMMUNICATION[family]


def described(sharding: Sharding) -> str:
    """The sentence of the table above; regions are what a layer has, of two layers."""
    counts = Counter(op.target.removeprefix("shardstage.") for op in localize(sharding, 0).ops)
    lookups, losses = counts["embedding"], counts["cross_entropy"]
    regions = counts["all_reduce"] - lookups
    cut = sum(isinstance(placement, Shard) for placement in sharding.parameters.values())
    per_layer = "no" if regions == 0 else NUMBERS[regions // 2]
    return (
        f"{per_layer} reductions a layer, {NUMBERS[lookups]} of the embedding, {NUMBERS[losses]} in the loss: "
        f"of {len(sharding.parameters)} parameters, {cut} are cut"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_sequence_parallel_replaces_each_reduction_by_its_halves(family: str) -> None:
    plain, sequence = (
        Counter(
            op.target.removeprefix("shardstage.")
            for op in localize(shard(case(family).graph, num_ranks=2, is_sequence_parallel=sp), 0).ops
        )
        for sp in (False, True)
    )
    assert sequence["reduce_scatter"] == plain["all_reduce"]
    assert sequence["all_gather"] + sequence["sum_gradient"] == plain["sum_gradient"]
    assert sequence["all_reduce"] == 0
