"""Whole trainings, against a loop written out plainly, without `verify`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import pipework
from pipework import Runner
from tests.end_to_end.case import crossed, squared
from tests.end_to_end.cases import CASES
from tests.gloo import GlooPool
from tests.models import WIDTH, linear, numbers, trunk
from tests.run.pipes import equal, gradients
from tests.split.equality import before

LAYERS, ROWS, STEPS = 8, 6, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def language_model() -> nn.Module:
    @trunk(embed=nn.Embedding(17, WIDTH), layers=nn.ModuleList(Block() for _ in range(LAYERS)), head=linear(WIDTH, 17))
    def model(self: Any, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(17, (ROWS, 5 + step % 2), generator=generator) for step in range(STEPS)]
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


def plainly(model: nn.Module, microbatches: int, backwards: list[int]) -> list[Tensor]:
    """AdamW with clipping; gradients are added in the order in which the microbatches go backward."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 0.01), []
    for x, y in batches():
        each, values = [], []
        for tokens, aim in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            model.zero_grad()
            loss = crossed(model(tokens), aim)
            (loss / microbatches).backward()
            values.append(loss.detach())
            each.append(gradients(model))
        for name, parameter in model.named_parameters():
            first, *others = (each[number][name] for number in backwards)
            for gradient in others:
                first = first + gradient
            parameter.grad = first
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(torch.stack(values).sum() / microbatches)
    return losses


def train(
    stages: int, family: str, ranks: int, group: dist.ProcessGroup | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = language_model()
    tokens, _ = batches()[0]
    names = [f"layers.{LAYERS * stage // stages}" for stage in range(1, stages)]
    pipe = pipework.pipeline(model, (tokens[:2],), split_spec=before(*names))
    runner = Runner(pipe, pipework.schedules.FAMILIES[family].build(pipe.layout(ranks), 3), loss=crossed, group=group)
    optimizer, losses = torch.optim.AdamW(runner.parameters(), 0.01), []
    for x, y in batches():
        optimizer.zero_grad()
        losses.append(runner.step(x, target=y))
        runner.clip_grad_norm_(0.5)
        optimizer.step()
    return losses, runner.state_dict()


RUNS = [
    (2, "one_f_one_b", 2),
    (4, "gpipe", 4),
    (4, "interleaved_one_f_one_b", 2),
    (6, "looped_bfs", 3),
    (3, "one_f_one_b", 3),
]


def order_of(family: str) -> list[int]:
    """All of these go backward through the microbatches in one order on every stage."""
    return [2, 1, 0] if family == "looped_bfs" else [0, 1, 2]


@pytest.mark.parametrize(("stages", "family", "ranks"), RUNS)
@pytest.mark.parametrize("processes", [False, True])
def test_adamw_with_clipping_for_several_steps(
    gloo_pool: GlooPool, stages: int, family: str, ranks: int, processes: bool
) -> None:
    reference = language_model()
    wanted = plainly(reference, 3, order_of(family))
    run = stages, family, ranks
    ends = gloo_pool.run(train_on, *run, ranks=ranks) if processes else [train(*run)]
    union: dict[str, Tensor] = {}
    for losses, state in ends:
        assert [float(loss) for loss in losses] == [float(loss) for loss in wanted]
        union |= state
    state = reference.state_dict()
    assert equal({name: union[name] for name in state}, dict(state))
    assert not torch.equal(state["head.weight"], language_model().state_dict()["head.weight"])


def train_on(
    group: dist.ProcessGroup, rank: int, stages: int, family: str, ranks: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    return train(stages, family, ranks, group)


def test_optimizer_state_goes_from_one_cut_to_another() -> None:
    """A step each as 2, 4, 3 stages and 1 stage are four steps of the unsplit model."""
    reference = language_model()
    plainly(reference, 3, [0, 1, 2])
    model = language_model()
    kept: dict[str, Any] = {}
    for stages, some in zip((2, 4, 3, 1), ([batch] for batch in batches()), strict=True):
        names = [f"layers.{LAYERS * stage // stages}" for stage in range(1, stages)]
        pipe = pipework.pipeline(model, (some[0][0][:2],), split_spec=before(*names))
        runner = Runner(pipe, pipework.schedules.gpipe(pipe.layout(stages), 3), loss=crossed)
        named = dict(runner.named_parameters())
        optimizer = torch.optim.AdamW(named.values(), 0.01)
        for name, state in kept.items():
            optimizer.state[named[name]] = state
        for x, y in some:
            optimizer.zero_grad()
            runner.step(x, target=y)
            runner.clip_grad_norm_(0.5)
            optimizer.step()
        kept = {name: copy.deepcopy(optimizer.state[p]) for name, p in named.items()}
        weights = runner.state_dict()
        model = language_model()
        model.load_state_dict(weights)
    assert equal(dict(model.state_dict()), dict(reference.state_dict()))


# ---------------------------------------------------------------------- dropout


def dropped() -> nn.Module:
    """The same model for every cut: dropout in closed blocks, and drawn by the trunk's own modules."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.drop = linear(), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.drop(self.lin(x)).relu(), 0.2, self.training) + x

    @trunk(layers=nn.ModuleList(Drops() for _ in range(8)), late=nn.Dropout(0.5))
    def model(self: Any, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, self.training)
        for layer in self.layers:
            x = self.late(layer(x))
        return F.dropout(x, 0.1, self.training)

    return model


def two_steps(stages: int, family: str, ranks: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The losses of two steps on one batch, and all gradients of the first at this process, by name."""
    torch.manual_seed(11)
    model = dropped()
    names = [f"layers.{8 * stage // stages}" for stage in range(1, stages)]
    pipe = pipework.pipeline(model, (numbers(2, WIDTH),), split_spec=before(*names))
    runner = Runner(pipe, pipework.schedules.FAMILIES[family].build(pipe.layout(ranks), 4), loss=squared, group=group)
    generator = torch.get_rng_state()
    losses = [runner.step(numbers(8, WIDTH), target=numbers(8, WIDTH, seed=5)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), generator)
    return losses


def two_steps_on(group: dist.ProcessGroup, rank: int, stages: int, family: str, ranks: int) -> list[Tensor]:
    return two_steps(stages, family, ranks, group)


def test_dropout_does_not_depend_on_cut_ranks_schedule_or_transport(gloo_pool: GlooPool) -> None:
    first, second = two_steps(2, "one_f_one_b", 2)
    assert first != second  # other masks in each step
    for stages, family, ranks in (
        (2, "gpipe", 2),
        (4, "looped_bfs", 2),
        (4, "one_f_one_b", 4),
        (8, "interleaved_one_f_one_b", 4),
    ):
        assert two_steps(stages, family, ranks) == [first, second], (stages, family)
    for stages, family, ranks in ((3, "one_f_one_b", 3), (4, "interleaved_one_f_one_b", 2)):
        assert gloo_pool.run(two_steps_on, stages, family, ranks, ranks=ranks) == [[first, second]] * ranks


def with_evaluation(group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The losses of two steps with an evaluation between them, which is that of the model without dropout."""
    torch.manual_seed(11)
    model = dropped()
    x, y = numbers(8, WIDTH), numbers(8, WIDTH, seed=5)
    pipe = pipework.pipeline(model, (x[:2],), split_spec=before("layers.4"))
    runner = Runner(pipe, pipework.schedules.one_f_one_b(pipe.layout(2), 4), loss=squared, group=group)
    losses = [runner.step(x, target=y)]
    pipe.eval()
    evaluated = runner.evaluate(x)
    assert evaluated.output is None or torch.equal(evaluated.output, torch.cat([model(part) for part in x.chunk(4)]))
    pipe.train()
    return [*losses, runner.step(x, target=y)]


def with_evaluation_on(group: dist.ProcessGroup, rank: int) -> list[Tensor]:
    return with_evaluation(group)


def test_eval_mode_in_the_middle_switches_dropout_off_and_on_again(gloo_pool: GlooPool) -> None:
    wanted = two_steps(2, "one_f_one_b", 2)
    assert with_evaluation() == wanted
    assert gloo_pool.run(with_evaluation_on) == [wanted] * 2


def test_seed_and_steps_continue_a_run() -> None:
    _, second = two_steps(2, "one_f_one_b", 2)
    torch.manual_seed(99)
    pipe = pipework.pipeline(dropped(), (numbers(2, WIDTH),), split_spec=before("layers.4"))
    runner = Runner(pipe, pipework.schedules.gpipe(pipe.layout(2), 4), loss=squared)
    assert runner.seed == 99
    other = runner.step(numbers(8, WIDTH), target=numbers(8, WIDTH, seed=5))
    runner.seed, runner.steps = 11, 1
    assert torch.equal(runner.step(numbers(8, WIDTH), target=numbers(8, WIDTH, seed=5)), second)
    assert not torch.equal(other, second)


def test_microbatches_have_masks_of_their_own() -> None:
    case = CASES["dropout"](2, 4)
    rows = case.args[0][:1].expand(4, WIDTH).contiguous()
    pipe = pipework.pipeline(case.model, (rows[:1],))
    runner = Runner(pipe, pipework.schedules.gpipe(pipe.layout(2), 4), loss=squared)
    runner.keep_outputs = True
    runner.step(rows, target=case.target)
    assert len({tuple(row.tolist()) for row in runner.outputs}) == 4
    pipe.eval()
    evaluated = runner.evaluate(rows)
    assert evaluated.output.shape == rows.shape
