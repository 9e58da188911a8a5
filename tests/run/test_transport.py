"""Transports by themselves: order, layouts, failure."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipework import MismatchError, TransportError
from pipework.run.processes import ProcessTransport
from pipework.run.transport import Threads, Transport
from pipework.split.cut import Wire
from tests.gloo import GlooPool
from tests.models import numbers

CPU = torch.device("cpu")


def wire(tensor: Tensor) -> Wire:
    return Wire(0, tuple(tensor.shape), tensor.stride(), tensor.dtype, False)


def sent(end: Transport, number: int, to: int, channel: int = 0) -> None:
    tensor = torch.tensor([float(number)])
    end.send([tensor], [wire(tensor)], to, channel)


ROW = [wire(torch.tensor([0.0]))]


def test_a_receive_gets_the_message_of_its_place_in_whatever_order_they_are_waited_for() -> None:
    first, second = Threads(2).ends
    arrivals = [second.receive(ROW, 0, channel, CPU) for channel in (0, 1, 0, 0, 1)]
    for number, channel in enumerate((1, 0, 0, 1, 0)):
        sent(first, number, 1, channel)
    found = {place: arrivals[place]()[0].item() for place in (3, 4, 2, 0, 1)}
    assert [found[place] for place in range(5)] == [1, 0, 2, 4, 3]


def test_ways_do_not_mix() -> None:
    a, b, c = Threads(3).ends
    for end, number, to in ((a, 1, 2), (b, 2, 2), (c, 3, 0), (a, 4, 1)):
        sent(end, number, to)
    assert [end.receive(ROW, source, 0, CPU)()[0].item() for end, source in ((b, 0), (a, 2), (c, 1), (c, 0))] == [
        4,
        3,
        2,
        1,
    ]


def test_many_messages_between_threads_stay_in_order() -> None:
    ends = Threads(2).ends

    def talk(rank: int) -> list[float]:
        found = []
        for number in range(200):
            sent(ends[rank], number, 1 - rank, number % 3)
            found.append(ends[rank].receive(ROW, 1 - rank, number % 3, CPU)()[0].item())
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, range(2))) == [list(map(float, range(200)))] * 2


def test_a_failure_wakes_whoever_waits_and_is_forgotten_in_the_next_step() -> None:
    threads = Threads(3)
    cause = ValueError("a bad number")
    caught: list[BaseException] = []

    def wait(source: int) -> None:
        try:
            threads.ends[0].receive(ROW, source, 0, CPU)()
        except TransportError as error:
            caught.append(error)

    waiting = [threading.Thread(target=wait, args=(source,)) for source in (1, 2)]
    for thread in waiting:
        thread.start()
    threads.ends[2].fail(cause)
    threads.ends[1].fail(RuntimeError("only heard of it"))
    for thread in waiting:
        thread.join(timeout=20)
    assert len(caught) == 2
    assert all(error.__cause__ is cause and "rank 2 failed" in str(error) for error in caught)
    assert "ValueError: a bad number" in str(caught[0])
    sent(threads.ends[1], 7, 0)
    threads.begin()
    sent(threads.ends[1], 8, 0)
    assert threads.ends[0].receive(ROW, 1, 0, CPU)()[0].item() == 8


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(6)])
def test_what_was_not_announced_is_not_sent(other: Tensor) -> None:
    end = Threads(2).ends[0]
    with pytest.raises(MismatchError, match=r"was about to be sent as \(2, 3\), torch.float32"):
        end.send([other], [wire(torch.zeros(2, 3))], 1, 0)


def test_threads_exchange_and_share() -> None:
    ends = Threads(3).ends

    def talk(rank: int) -> tuple[list[Any], Tensor]:
        return ends[rank].exchange({"rank": rank}), ends[rank].share(torch.tensor(float(rank)), 1)

    with ThreadPoolExecutor(3) as pool:
        for told, shared in pool.map(talk, range(3)):
            assert told == [{"rank": rank} for rank in range(3)]
            assert shared.item() == 1


def layouts() -> list[Tensor]:
    """Tensors of every layout and dtype that a model may hand on."""
    base = numbers(4, 6)
    return [
        base,
        base.t(),
        base[:, ::2],
        base[1:3, 2:],
        base.expand(3, 4, 6),
        base[:, :1].expand(4, 5),
        base[0, 0],
        base[:0],
        base[:, :0].t(),
        base.as_strided((3, 4), (1, 2)),  # elements overlap
        base.view(1, 2, 2, 6).contiguous(memory_format=torch.channels_last),
        base > 0,
        (base * 9).to(torch.int64).t(),
        (base * 9).to(torch.uint8),
        base.to(torch.bfloat16),
        base.to(torch.float16)[::2],
        base.double(),
        torch.complex(base, -base),
        torch.complex(base, -base).conj(),
        torch.complex(base, -base).conj().imag,  # has the negative bit
        torch.complex(base.double(), base.double()).t()[::2],
    ]


def exchange_layouts(group: dist.ProcessGroup, rank: int) -> list[str]:
    end = ProcessTransport(group, CPU)
    wanted = layouts()
    wires = [wire(tensor) for tensor in wanted]
    if rank == 0:
        before = [tensor.clone() for tensor in wanted]
        end.send(wanted, wires, 1, 3)()
        return [str(t.shape) for t, b in zip(wanted, before, strict=True) if not torch.equal(t, b)]
    found = end.receive(wires, 0, 3, CPU)()
    wrong = []
    for one, other in zip(found, wanted, strict=True):
        if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()) or not torch.equal(
            one, other
        ):
            wrong.append(f"{one.dtype} {one.shape} {one.stride()} {one} {other}")
    return wrong


def test_every_layout_arrives_as_it_was_sent(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(exchange_layouts) == [[], []]


def send_in_another_layout(group: dist.ProcessGroup, rank: int) -> list[float]:
    """A kernel may lay its result out otherwise than the one in the capture did: the receiver's view is what counts."""
    end = ProcessTransport(group, CPU)
    announced, tensor = torch.empty(6, 4).t(), numbers(4, 6)
    if rank == 0:
        end.send([tensor], [wire(announced)], 1, 0)()
        return []
    (found,) = end.receive([wire(announced)], 0, 0, CPU)()
    assert found.stride() == announced.stride()
    return (found - tensor).abs().flatten().tolist()


def test_a_tensor_in_another_layout_is_laid_out_as_announced(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(send_in_another_layout)[1] == [0.0] * 24


def order_on_processes(group: dist.ProcessGroup, rank: int) -> list[float]:
    end = ProcessTransport(group, CPU)
    if rank == 0:
        waits = []
        for number, channel in enumerate((1, 0, 0, 1, 0)):
            tensor = torch.tensor([float(number)])
            waits.append(end.send([tensor], [wire(tensor)], 1, channel))
        for wait in reversed(waits):
            wait()
        return []
    arrivals = [end.receive(ROW, 0, channel, CPU) for channel in (0, 1, 0, 0, 1)]
    found = {place: arrivals[place]()[0].item() for place in (3, 4, 2, 0, 1)}
    return [found[place] for place in range(5)]


def test_processes_keep_the_order_of_each_channel(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(order_on_processes)[1] == [1, 0, 2, 4, 3]


def exchange_and_share(group: dist.ProcessGroup, rank: int) -> tuple[Any, float, str]:
    end = ProcessTransport(group, CPU)
    told = end.exchange({"rank": rank, "tensor": torch.tensor(rank)})
    shared = end.share(torch.tensor(float(rank)), 2)
    try:
        end.send([torch.zeros(2)], ROW, (rank + 1) % 3, 0)
    except MismatchError as error:
        return [each["rank"] for each in told], shared.item(), error.what
    return [], 0.0, "sent"


def test_processes_exchange_share_and_refuse(gloo_pool: GlooPool) -> None:
    for told, shared, refused in gloo_pool.run(exchange_and_share, ranks=3):
        assert told == [0, 1, 2]
        assert shared == 2
        assert "was about to be sent as (1,)" in refused
