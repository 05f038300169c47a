"""What the ranks of ``test_process_group`` do: each case is called on every rank, in the order of ``cases_for``.

A case compares with gloo or with what arithmetic says, and raises on the rank where they differ.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardstage.errors import ProgramError, RankFailedError
from shardstage.runtime.process_group import (
    BACKEND,
    ShardstageProcessGroup,
    allocate_shared,
    register_backend,
)
from shardstage.runtime.shared_memory import SharedMemoryOptions

SMALL_SLOTS = SharedMemoryOptions(slot_bytes=12288, part_bytes=1024, num_parts=4)
Case = Callable[[], None]


def run_rank(rank: int, size: int, port: int, folder: Path) -> None:
    """One rank: every case in order, up to the first that fails here; outcomes go to ``folder``."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    register_backend()
    register_backend()  # again is harmless
    outcomes = {}
    dist.init_process_group(
        BACKEND,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
        pg_options=SMALL_SLOTS,
    )
    try:
        for case in cases_for(size):
            outcomes[case.__name__] = "began"
            case()
            outcomes[case.__name__] = "passed"
    except BaseException:
        outcomes[case.__name__] = traceback.format_exc()
        raise
    finally:
        (folder / f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()
    os._exit(0)  # what autograd still holds of the group would abort an interpreter that shuts down with it


def cases_for(size: int) -> list[Case]:
    """Everything on three ranks; on two, what takes another path there: no sum of more than two, a group of all."""
    if size == 3:
        return [*_MANY_RANKS, *_ANY_RANKS, a_dead_rank_is_named]
    return [*_ANY_RANKS, a_rank_that_left_is_named]


def world() -> ShardstageProcessGroup:
    group = dist.group.WORLD
    assert isinstance(group, ShardstageProcessGroup)
    return group


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return (torch.randn(numel, generator=generator) * 50).to(dtype)


def everyones(numel: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [values(rank, numel, dtype) for rank in range(dist.get_world_size())]


def rank_order_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def the_group_shares_memory() -> None:
    assert world().segments is not None
    assert dist.get_backend() == BACKEND
    dist.barrier()


def all_reduce_equals_gloo_for_every_dtype_and_size() -> None:
    gloo = dist.new_group(backend="gloo")
    for dtype in (torch.int64, torch.uint8, torch.float64, torch.float32):
        for numel in (7, 1, 0, 1000, 20011, 3 * 12288):
            for operator in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                ours = values(dist.get_rank(), numel).abs().to(dtype)
                theirs = ours.clone()
                dist.all_reduce(ours, operator)
                dist.all_reduce(theirs, operator, group=gloo)
                # gloo adds 3 numbers in another order: 2 roundings of at most eps * (|a| + |b| + |c|)
                tolerance = 0 if dtype in (torch.int64, torch.uint8) else 6 * torch.finfo(dtype).eps
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    scalar = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(scalar)
    assert scalar.shape == () and scalar.item() == sum(range(1, dist.get_world_size() + 1))


def all_reduce_is_the_sum_in_rank_order_with_the_same_bits_on_all_ranks() -> None:
    for numel in (5, 3000, 40001):
        tensor = values(dist.get_rank(), numel)
        dist.all_reduce(tensor)
        equal(tensor, rank_order_sum(everyones(numel)))


def bfloat16_sums_are_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for numel in (9, 30001):
            tensor = values(dist.get_rank(), numel, dtype)
            dist.all_reduce(tensor)
            exact = rank_order_sum([part.float() for part in everyones(numel, dtype)])
            equal(tensor, exact.to(dtype))


def average_and_bitwise_reductions() -> None:
    size = dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        tensor = values(dist.get_rank(), 50, dtype)
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        equal(tensor, (rank_order_sum([part.float() for part in everyones(50, dtype)]) / size).to(dtype))
    bits = torch.tensor([1 << dist.get_rank()])
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    assert bits.item() == (1 << size) - 1


def a_tensor_with_gaps_is_reduced_in_place() -> None:
    whole = torch.full((6, 4), float(dist.get_rank() + 1))
    dist.all_reduce(whole[:, ::2])
    total = sum(range(1, dist.get_world_size() + 1))
    equal(whole[:, 0], torch.full((6,), float(total)))
    equal(whole[:, 1], torch.full((6,), float(dist.get_rank() + 1)))


def a_collective_is_no_in_place_operation_to_autograd() -> None:
    weight = torch.ones(3, requires_grad=True)
    product = weight * 2
    square = product * product  # saves product
    dist.broadcast(product, 0)
    dist.broadcast(weight, 0)  # a leaf that requires gradients
    square.sum().backward()
    equal(weight.grad, torch.full((3,), 8.0))


def all_gather_of_equal_and_uneven_tensors() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for sizes in ([3 + 5000 * r for r in range(size)], [0] * (size - 1) + [2], [4000] * size):
        outputs = [torch.zeros(numel) for numel in sizes]
        dist.all_gather(outputs, values(rank, sizes[rank]))
        for peer, output in enumerate(outputs):
            equal(output, values(peer, sizes[peer]))
    for numel in (5, 0, 9001):
        output = torch.zeros(size * numel)
        world().all_gather_single(output, values(rank, numel)).wait()
        equal(output, torch.cat(everyones(numel)))


def reduce_scatter_of_equal_and_uneven_tensors() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for sizes in ([3 + 5000 * r for r in range(size)], [0] * (size - 1) + [2], [4000] * size):
        output = torch.zeros(sizes[rank])
        whole = everyones(sum(sizes))
        dist.reduce_scatter(output, list(torch.split(whole[rank], sizes)))
        equal(output, torch.split(rank_order_sum(whole), sizes)[rank])
    for numel in (5, 0, 9001):
        output = torch.zeros(numel)
        options = dist.ReduceScatterOptions()
        world().reduce_scatter_single(output, values(rank, size * numel), options).wait()
        equal(output, rank_order_sum(everyones(size * numel))[rank * numel : (rank + 1) * numel])


def broadcast_gather_scatter_and_reduce_know_their_root() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    root = size - 1
    for numel in (5, 20001):
        tensor = values(rank, numel)
        dist.broadcast(tensor, root)
        equal(tensor, values(root, numel))
        gathered = [torch.zeros(numel) for _ in range(size)] if rank == root else None
        dist.gather(values(rank, numel), gathered, dst=root)
        for peer, output in enumerate(gathered or []):
            equal(output, values(peer, numel))
        output = torch.zeros(numel)
        dist.scatter(output, everyones(numel) if rank == root else None, src=root)
        equal(output, values(rank, numel))
        tensor = values(rank, numel)
        dist.reduce(tensor, root)
        equal(tensor, rank_order_sum(everyones(numel)) if rank == root else values(rank, numel))


def all_to_all_of_even_and_uneven_runs() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for scale in (1, 700):
        rows = [[scale * (2 * sender + receiver) for receiver in range(size)] for sender in range(size)]
        sent = [values(sender, 3 * sum(rows[sender])).view(-1, 3) for sender in range(size)]
        received = [rows[sender][rank] for sender in range(size)]
        output = torch.zeros(sum(received), 3)
        dist.all_to_all_single(output, sent[rank], received, rows[rank])
        equal(output, torch.cat([torch.split(sent[s], rows[s])[rank] for s in range(size)]))
    output = torch.zeros(size, dtype=torch.int64)
    dist.all_to_all_single(output, torch.arange(size) + 10 * rank)
    assert output.tolist() == [10 * peer + rank for peer in range(size)]


def objects_travel() -> None:
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"rank": dist.get_rank()})
    assert gathered == [{"rank": rank} for rank in range(dist.get_world_size())]
    told: list[object] = ["plan" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, 0)
    assert told == ["plan"]


def coalesced_collectives() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sizes = (4, 0, 5001)
    outputs = [torch.zeros(size * numel) for numel in sizes]
    world().allgather_into_tensor_coalesced(outputs, [values(rank, numel) for numel in sizes]).wait()
    for numel, output in zip(sizes, outputs, strict=True):
        equal(output, torch.cat(everyones(numel)))
    reduced = [torch.zeros(numel) for numel in sizes]
    inputs = [values(rank, size * numel) for numel in sizes]
    world().reduce_scatter_tensor_coalesced(reduced, inputs, dist.ReduceScatterOptions()).wait()
    for numel, output in zip(sizes, reduced, strict=True):
        equal(output, rank_order_sum(everyones(size * numel))[rank * numel : (rank + 1) * numel])
    tensors = [values(rank, numel) for numel in sizes]
    work = world().allreduce_coalesced(tensors)
    assert work.is_completed() and work.get_future().value()[2] is tensors[2]
    equal(tensors[2], rank_order_sum(everyones(5001)))


def functional_collectives() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    total = functional.all_reduce(values(rank, 6), "sum", world())
    equal(total + 0, rank_order_sum(everyones(6)))
    gathered = functional.all_gather_tensor(values(rank, 6).view(2, 3), 0, world())
    equal(gathered + 0, torch.cat(everyones(6)).view(-1, 3))
    part = functional.reduce_scatter_tensor(values(rank, 2 * size), "sum", 0, world())
    equal(part + 0, rank_order_sum(everyones(2 * size))[2 * rank : 2 * rank + 2])
    sent = torch.full((size,), float(rank), requires_grad=True)
    swapped = functional.all_to_all_single_autograd(sent, None, None, world())
    (swapped * torch.arange(size)).sum().backward()
    equal(swapped.detach() + 0, torch.arange(float(size)))
    equal(sent.grad, torch.full((size,), float(rank)))


def messages_with_tags_arrive_in_any_order_of_receives() -> None:
    rank = dist.get_rank()
    if rank == 0:
        works = [dist.isend(values(tag, 3 * tag), 1, tag=tag) for tag in (1, 2, 3)]
        works += [dist.isend(torch.full((2,), float(n)), 1, tag=9) for n in range(3)]
        for work in works:
            work.wait()
    elif rank == 1:
        for tag in (3, 1, 2):
            tensor = torch.zeros(3 * tag)
            dist.recv(tensor, 0, tag=tag)
            equal(tensor, values(tag, 3 * tag))
        received = [torch.zeros(2) for _ in range(3)]
        works = [dist.irecv(tensor, 0, tag=9) for tensor in received]
        for work in reversed(works):
            work.wait()
        assert [tensor[0].item() for tensor in received] == [0, 1, 2]
    dist.barrier()


def long_messages_cross_without_a_deadlock() -> None:
    """Five times what a pair holds, both ways, sends first, then in the opposite order of tags."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numel = 5 * 1024
    after, before = (rank + 1) % size, (rank - 1) % size
    sends = [dist.isend(values(rank + tag, numel), after, tag=tag) for tag in (1, 2)]
    for tag in (2, 1):
        tensor = torch.zeros(numel)
        dist.irecv(tensor, before, tag=tag).wait()
        equal(tensor, values(before + tag, numel))
    for send in sends:
        send.wait()


def a_send_goes_on_while_its_rank_waits_in_a_collective() -> None:
    rank, numel = dist.get_rank(), 20 * 1024
    pair = dist.new_group([0, 1])
    send = None
    if rank == 0:
        send = dist.isend(values(7, numel), 1)
        assert not send.is_completed(), "80 KiB do not fit into 4 parts of 1 KiB"
    if rank == 1:
        tensor = torch.zeros(numel)
        dist.recv(tensor, 0)
        equal(tensor, values(7, numel))
    if rank < 2:
        dist.barrier(pair)  # rank 0 comes here at once
    if send is not None:
        send.wait()


def receiving_from_any_rank_says_from_which() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        tensor, sources = torch.zeros(1), set()
        for _ in range(size - 1):
            source = dist.recv(tensor)
            assert tensor.item() == source
            sources.add(source)
        assert sources == set(range(1, size))
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    dist.barrier()


def batched_sends_and_receives() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor = torch.zeros(3)
    operations = [
        dist.P2POp(dist.isend, torch.full((3,), float(rank)), (rank + 1) % size),
        dist.P2POp(dist.irecv, tensor, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    equal(tensor, torch.full((3,), float((rank - 1) % size)))


def shared_tensors_are_reduced_where_they_lie() -> None:
    rank = dist.get_rank()
    buffer = allocate_shared(30011, torch.float32)
    assert not buffer.any()
    for part in (buffer, buffer[100:20000], buffer[7:8], buffer[5:5]):
        part.copy_(values(rank, part.numel()))
        dist.all_reduce(part)
        equal(part, rank_order_sum(everyones(part.numel())))
    low = allocate_shared(1001, torch.bfloat16)
    low.copy_(values(rank, 1001))
    dist.all_reduce(low)
    equal(low, rank_order_sum([part.float() for part in everyones(1001, torch.bfloat16)]).bfloat16())


def shared_tensors_are_gathered_and_scattered_where_they_lie() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    numel = 5003
    mine = slice(rank * numel, (rank + 1) * numel)
    for tensor in (None, values(rank, numel)):  # my part of the output itself, or another tensor
        output = allocate_shared(size * numel, torch.float32)
        output[mine] = values(rank, numel)
        world().all_gather_single(output, output[mine] if tensor is None else tensor)
        equal(output, torch.cat(everyones(numel)))
    source, private = allocate_shared(numel, torch.float32), torch.zeros(size * numel)
    source.copy_(values(rank, numel))
    world().all_gather_single(private, source)
    equal(private, torch.cat(everyones(numel)))
    for output in (None, torch.zeros(numel)):
        whole = allocate_shared(size * numel, torch.float32)
        whole.copy_(values(rank, size * numel))
        target = whole[mine] if output is None else output
        world().reduce_scatter_single(target, whole, dist.ReduceScatterOptions())
        equal(target, rank_order_sum(everyones(size * numel))[mine])


def a_mix_of_shared_and_private_tensors_still_works() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for numel in (11, 20001):
        shared = allocate_shared(size * numel, torch.float32)
        tensor = shared if rank == 0 else torch.zeros(size * numel)
        tensor.copy_(values(rank, size * numel))
        dist.all_reduce(tensor)
        equal(tensor, rank_order_sum(everyones(size * numel)))
        part = tensor[:numel]
        part.copy_(values(rank, numel))
        output = torch.zeros(size * numel) if rank == 0 else shared
        world().all_gather_single(output, part)
        equal(output, torch.cat(everyones(numel)))
        tensor.copy_(values(rank, size * numel))
        reduced = torch.zeros(numel)
        world().reduce_scatter_single(reduced, tensor, dist.ReduceScatterOptions())
        equal(reduced, rank_order_sum(everyones(size * numel))[rank * numel : (rank + 1) * numel])
    mine = shared[rank : rank + 1]  # shared, but at another offset on every rank
    mine.fill_(1)
    dist.all_reduce(mine)
    assert mine.item() == size


def a_shared_tensor_has_one_size() -> None:
    with pytest.raises(ProgramError, match="same size on every rank"):
        allocate_shared(4 + dist.get_rank(), torch.float32)


def sub_groups_have_their_own_segments() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, (first + 1) % size]) for first in range(size if size > 2 else 1)]
    for first, pair in enumerate(pairs):
        members = {first, (first + 1) % size}
        if rank in members:
            tensor = torch.tensor([2.0**rank])
            dist.all_reduce(tensor, group=pair)
            assert tensor.item() == sum(2.0**member for member in members)
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=mesh.get_group("tp"))
    dist.all_reduce(tensor, group=mesh.get_group("dp"))  # a group of one
    equal(tensor, torch.full((3,), float(size)))


def a_group_that_may_not_share_memory_uses_gloo() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    enabled = rank > 0  # one rank that cannot share is enough
    options = SharedMemoryOptions(enabled=enabled)
    group = dist.new_group(pg_options=options, timeout=timedelta(seconds=30))
    assert isinstance(group, ShardstageProcessGroup) and group.segments is None
    tensor = values(rank, 100)
    dist.all_reduce(tensor, group=group, async_op=True).wait()
    torch.testing.assert_close(tensor, rank_order_sum(everyones(100)))
    sizes = [3 + peer for peer in range(size)]
    outputs = [torch.zeros(numel) for numel in sizes]
    dist.all_gather(outputs, values(rank, sizes[rank]), group=group)
    for peer, output in enumerate(outputs):
        equal(output, values(peer, sizes[peer]))
    output = torch.zeros(sizes[rank])
    whole = everyones(sum(sizes))
    dist.reduce_scatter(output, list(torch.split(whole[rank], sizes)), group=group)
    torch.testing.assert_close(output, torch.split(rank_order_sum(whole), sizes)[rank])
    gathered = torch.zeros(size * 4)
    group.all_gather_single(gathered, values(rank, 4)).wait()
    equal(gathered, torch.cat(everyones(4)))
    part = torch.zeros(4)
    group.reduce_scatter_single(part, values(rank, size * 4), dist.ReduceScatterOptions()).wait()
    torch.testing.assert_close(part, rank_order_sum(everyones(size * 4))[4 * rank : 4 * rank + 4])
    swapped = torch.zeros(size, dtype=torch.int64)
    dist.all_to_all_single(swapped, torch.arange(size) + 10 * rank, group=group)
    assert swapped.tolist() == [10 * peer + rank for peer in range(size)]
    received = torch.zeros(2)
    send = dist.isend(torch.full((2,), float(rank)), (rank + 1) % size, group=group)
    dist.recv(received, (rank - 1) % size, group=group)
    send.wait()
    equal(received, torch.full((2,), float((rank - 1) % size)))
    assert allocate_shared(3, torch.float32, group).tolist() == [0, 0, 0]
    dist.barrier(group)


def different_calls_are_an_error_on_every_rank() -> None:
    with pytest.raises(ProgramError, match="the sequences differ"):
        dist.all_reduce(torch.zeros(3 + dist.get_rank()))
    with pytest.raises(ProgramError, match="the sequences differ"):
        if dist.get_rank() == 0:
            dist.barrier()
        else:
            dist.all_reduce(torch.zeros(3))
    dist.barrier()


def a_reduction_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"BAND of torch\.float32 tensors does not exist"):
        dist.all_reduce(torch.zeros(3), dist.ReduceOp.BAND)
    with pytest.raises(ProgramError, match=r"are not \d ranks times"):
        world().all_gather_single(torch.zeros(7), torch.zeros(1))


def messages_of_another_size_are_refused() -> None:
    pair = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.send(torch.zeros(3), 1, group=pair)
    elif dist.get_rank() == 1:
        with pytest.raises(ProgramError, match="sent 12 bytes with tag 0 to a receive of 8 bytes"):
            dist.recv(torch.zeros(2), 0, group=pair)
    dist.barrier()


def a_rank_that_does_not_come_is_named() -> None:
    last = dist.get_world_size() - 1
    group = dist.new_group(timeout=timedelta(seconds=0.3))
    if dist.get_rank() == 0:
        with pytest.raises(RankFailedError, match=rf"rank {last} \(pid \d+\) did not arrive within 0.3 s"):
            dist.recv(torch.zeros(1), last, group=group)
        with pytest.raises(RankFailedError, match=rf"rank {last} \(pid \d+\) did not arrive within 0.3 s"):
            dist.barrier(group)
    dist.barrier()


def every_call_can_be_recorded() -> None:
    calls: list[tuple[str, int]] = []
    group = world()
    group.record = lambda kind, where, num_bytes: calls.append((kind, num_bytes))
    dist.all_reduce(torch.zeros(3))
    dist.barrier()
    group.record = None
    dist.barrier()
    assert calls == [("all_reduce", 12), ("barrier", 0)]


def fully_sharded_training_equals_one_rank() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    single = nn.Sequential(nn.Linear(7, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    sharded = copy.deepcopy(single)
    mesh = init_device_mesh("cpu", (size,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (single, sharded)]
    batch = values(0, 7 * size * 2).double().view(-1, 7) / 50
    for _ in range(2):
        for model, optimizer, rows in zip(
            (single, sharded), optimizers, (batch, batch[2 * rank : 2 * rank + 2]), strict=True
        ):
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            optimizer.step()
    for expected, parameter in zip(single.parameters(), sharded.parameters(), strict=True):
        # fp64, sums of at most 50 terms: far below 1e-12
        torch.testing.assert_close(parameter.full_tensor(), expected, rtol=1e-12, atol=1e-13)


def a_dead_rank_is_named() -> None:
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RankFailedError, match=rf"rank {last} \(pid \d+\) is dead, while group rank"):
        dist.all_reduce(torch.zeros(3))


def a_rank_that_left_is_named() -> None:
    pair = dist.new_group([0, 1])
    assert isinstance(pair, ShardstageProcessGroup)
    if dist.get_rank() == 0:
        pair.shutdown()
    else:
        with pytest.raises(
            RankFailedError, match=r"rank 0 \(pid \d+\) has left the group, while group rank 1 of 2"
        ):
            dist.barrier(pair)
    dist.barrier()


_MANY_RANKS: tuple[Case, ...] = (
    a_collective_is_no_in_place_operation_to_autograd,
    objects_travel,
    functional_collectives,
    messages_with_tags_arrive_in_any_order_of_receives,
    a_send_goes_on_while_its_rank_waits_in_a_collective,
    receiving_from_any_rank_says_from_which,
    a_shared_tensor_has_one_size,
    a_group_that_may_not_share_memory_uses_gloo,
    a_reduction_that_does_not_exist_is_refused,
    messages_of_another_size_are_refused,
    a_rank_that_does_not_come_is_named,
    every_call_can_be_recorded,
)
_ANY_RANKS: tuple[Case, ...] = (
    the_group_shares_memory,
    all_reduce_equals_gloo_for_every_dtype_and_size,
    all_reduce_is_the_sum_in_rank_order_with_the_same_bits_on_all_ranks,
    bfloat16_sums_are_rounded_once,
    average_and_bitwise_reductions,
    a_tensor_with_gaps_is_reduced_in_place,
    all_gather_of_equal_and_uneven_tensors,
    reduce_scatter_of_equal_and_uneven_tensors,
    broadcast_gather_scatter_and_reduce_know_their_root,
    all_to_all_of_even_and_uneven_runs,
    coalesced_collectives,
    long_messages_cross_without_a_deadlock,
    batched_sends_and_receives,
    shared_tensors_are_reduced_where_they_lie,
    shared_tensors_are_gathered_and_scattered_where_they_lie,
    a_mix_of_shared_and_private_tensors_still_works,
    sub_groups_have_their_own_segments,
    different_calls_are_an_error_on_every_rank,
    fully_sharded_training_equals_one_rank,
)
