"""Gradients arrive as they left: laid out as they were made, and not at all where none was made."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipework import Pipe, pipe_split, pipeline
from pipework.run.layouts import Layouts
from pipework.run.transport import Tensors
from pipework.split.cut import Wire
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import equal, gradients, runner_of

# Per step and microbatch: whether the loss reads both outputs, the first only, or both with an expanded gradient.
CHANGING = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, 0], [2, 2, 2, 2], [0, 2, 1, 0]]
SETTLING = [[1, 1, 1, 1], [2, 1, 0, 1], [0, 2, 0, 1], [0, 0, 0, 2]]  # processes keep a layout once it is a plain one


def model() -> nn.Module:
    @trunk(one=linear(), two=linear(), three=linear(), scale=nn.Parameter(numbers(WIDTH)))
    def made(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        a, c = self.one(x), self.two(x) * self.scale
        pipe_split()
        return self.three((a.t() @ x).tanh()), c * self.scale

    return made


def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    first, second = output
    code = int(target[0])
    return first.pow(2).mean() + (0 if code == 1 else second.sum() if code == 2 else second.pow(3).mean())


def watched(made: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """The strides of the gradients of what the first stage's modules return, as they come."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("one", "two"):
        made.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: (
                out.register_hook(lambda g: seen.append((name, g.stride()))) if out.requires_grad else None,
                out,
            )[1]
        )
    return seen


def trained(group: dist.ProcessGroup | None, rank: int, steps: list[list[int]]) -> None:
    plain = model()
    reference = copy.deepcopy(plain)
    pipe: Pipe = pipeline(plain, (numbers(2, WIDTH),))
    wanted, seen = watched(reference), watched(plain)
    runner = runner_of(pipe, group=group, loss=loss)
    x = numbers(8, WIDTH)
    for step, codes in enumerate(steps):
        plain.zero_grad(), reference.zero_grad(), seen.clear(), wanted.clear()
        target = torch.tensor(codes).repeat_interleave(2)
        runner.step(x, target=target)
        for part, aim in zip(x.chunk(4), target.chunk(4), strict=True):
            (loss(reference(part), aim) / 4).backward()
        own = dict(runner.named_parameters())
        theirs: dict[str, Any] = {name: g for name, g in gradients(reference).items() if name in own}
        assert equal({name: g for name, g in gradients(plain).items() if name in own}, theirs), step
        if group is None or rank == 0:
            assert sorted(seen) == sorted(wanted), step


def test_threads_hand_over_what_was_made() -> None:
    trained(None, 0, CHANGING)


def test_processes_receive_what_was_made(gloo_pool: GlooPool) -> None:
    gloo_pool.run(trained, SETTLING)


@st.composite
def messages(draw: st.DrawFn) -> list[list[Tensor | None]]:
    """What one transfer holds, step by step."""
    shapes = draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=0, max_size=3))

    def tensor(shape: list[int]) -> Tensor | None:
        order = draw(st.permutations(range(len(shape))))
        full = numbers(*[shape[i] for i in order]) if shape else torch.tensor(1.5)
        turned = full.permute([order.index(i) for i in range(len(shape))])
        kind = draw(st.sampled_from(["there", "there", "expanded", "missing"]))
        wide = torch.tensor(0.5).expand(shape)
        return {"there": turned, "expanded": wide, "missing": None}[kind]

    return [[tensor(shape) for shape in shapes] for _ in range(draw(st.integers(1, 4)))]


@given(messages())
def test_both_ends_agree_and_describe_only_until_they_do(steps: list[list[Tensor | None]]) -> None:
    shapes = [[t.shape for t in column if t is not None] for column in zip(*steps, strict=True)]
    if not all(shapes):
        return
    wires = [Wire(i, tuple(found[0]), (0,) * len(found[0]), torch.float32, True) for i, found in enumerate(shapes)]
    one, other = Layouts(wires, torch.device("cpu")), Layouts(wires, torch.device("cpu"))
    for step in steps:
        sent: list[tuple[Tensors, list[Wire]]] = []
        settled = one.settled
        one.send(step, lambda tensors, told, sent=sent: (sent.append((tensors, list(told))), lambda: None)[1])()
        assert len(sent) == (1 if settled else 2)

        def receive(told: Any, sent: Any = sent) -> Any:
            tensors, theirs = sent.pop(0)
            assert list(told) == theirs
            return lambda: [
                torch.empty_strided(w.shape, w.stride, dtype=w.dtype).copy_(t)
                if 0 not in w.stride
                else t  # as it is in memory
                for t, w in zip(tensors, told, strict=True)
            ]

        came = other.receive(receive)()
        assert one.settled == other.settled
        for gradient, found in zip(step, came, strict=True):
            if gradient is None:
                assert found is None or (settled and not found.any())
            else:
                assert found is not None
                assert torch.equal(found, gradient)
                assert settled or found.stride() == gradient.stride()
