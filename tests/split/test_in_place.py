"""Writes in place: on what a stage receives, through views, on values that others use before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipework import CutError, pipe_split, pipeline
from tests.models import linear, numbers, trunk
from tests.split.equality import after, before, check


def test_first_thing_on_the_received_value() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        x.mul_(3).add_(1)
        return self.two(x)

    check(model, (numbers(grad=True),), want=2)


def test_value_that_the_earlier_stage_goes_on_to_use_elsewhere() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        other = self.two(h + 1)
        pipe_split()
        h += other
        pipe_split()
        return self.three(h), other

    check(model, (numbers(grad=True),), want=3)


def test_written_in_stage_1_read_in_stages_1_and_3() -> None:
    @trunk(one=linear(), two=linear(), three=linear(), four=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        h.add_(0.5)
        y = self.two(h)
        pipe_split()
        y = self.three(y)
        pipe_split()
        return self.four(y) + h

    check(model, (numbers(grad=True),), want=4)


def test_written_in_every_stage() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x)
        total = torch.zeros_like(h)
        total += h
        pipe_split()
        h = self.two(h)
        total += h
        pipe_split()
        h = self.three(h)
        total += h
        return h, total

    check(model, (numbers(grad=True),), want=3)


def test_through_a_view_made_before_the_cut() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        row = x[1]
        pipe_split()
        row.mul_(2)
        return self.two(x)

    check(model, (numbers(grad=True),), want=2)


def test_through_a_view_of_a_view_and_back() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = self.one(x)
        turned = x.t()
        part = turned[2:5]
        pipe_split()
        part.add_(1)
        y = self.two(x)
        pipe_split()
        return self.three(y), turned

    check(model, (numbers(grad=True),), want=3)


def test_two_views_of_each_other_read_after_a_write() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = self.one(x)
        turned = x.t()
        part = turned[2:5]
        pipe_split()
        part.add_(1)
        y = self.two(x)
        pipe_split()
        return y.tanh(), turned, part * 2

    check(model, (numbers(grad=True),), want=3)


def test_base_written_and_the_view_read_later() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        left, right = x[:, :4], x.narrow(1, 4, 4)
        pipe_split()
        x.mul_(2)
        return self.two(torch.cat([right, left], -1)) + x

    check(model, (numbers(grad=True),), want=2, strides=False)


def test_assignment_to_an_index_and_a_mask() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        x = self.one(x)
        pipe_split()
        x[:, 0] = 0
        x[mask] = x[mask] * 2
        x[1:3, 2:] += 1
        return self.two(x)

    check(model, (numbers(grad=True), numbers() > 0), want=2)


def test_written_in_the_stage_that_made_it_after_a_view_left() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        view = x.view(-1)
        x.add_(1)
        pipe_split()
        return self.two(view.view(4, 8))

    check(model, (numbers(grad=True),), want=2)


def test_out_argument() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.one(x)
            store = torch.empty_like(x)
            pipe_split()
            torch.add(x, 1, out=store)
        return self.two(store)

    check(model, (numbers(),), want=2)


def test_by_a_closed_module() -> None:
    @trunk(one=linear(), act=nn.ReLU(inplace=True), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        kept = h * 1
        pipe_split()
        self.act(h)
        return self.two(h) + kept

    check(model, (numbers(grad=True),), want=2)


def test_by_closed_modules_in_three_stages() -> None:
    model = nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), nn.ELU(inplace=True), linear())
    check(model, (numbers(grad=True),), spec=before("1", "3"), want=3)
    check(model, (numbers(grad=True),), spec=after("1", "3"), want=3)


def test_on_the_input_in_a_late_stage() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        mask.mul_(2)
        return self.two(h) * mask

    check(model, (numbers(grad=True), numbers(seed=5)), want=2)


def test_on_the_input_which_later_stages_read() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        h = self.one(x + mask)
        pipe_split()
        mask.mul_(2)
        h = self.two(h) + mask
        pipe_split()
        return self.three(h) - mask

    check(model, (numbers(grad=True), numbers(seed=5)), want=3)


def test_on_the_input_in_the_first_stage_read_in_the_last() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x.mul_(2)
        h = self.one(x)
        pipe_split()
        h = self.two(h)
        pipe_split()
        return self.three(h) + x

    check(model, (numbers(),), want=3)


def test_on_a_view_of_the_input() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        half = x[:, :4]
        h = self.one(x * 2)
        pipe_split()
        half.zero_()
        return self.two(h) + x

    check(model, (numbers(),), want=2)


def test_same_tensor_passed_twice() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        h = self.one(x)
        pipe_split()
        return self.two(h) + y

    x = numbers()
    check(model, (x, x), want=2)


def test_functional_with_inplace_flag() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        F.relu(h, inplace=True)
        return self.two(h)

    check(model, (numbers(grad=True),), want=2)


def test_kv_cache_filled_stage_by_stage() -> None:
    @trunk(one=linear(), two=linear(), three=linear())
    def model(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        cache = x.new_zeros(3, *x.shape)
        x = self.one(x)
        cache[0] = x
        pipe_split()
        x = self.two(x + cache[0])
        cache[1] = x
        pipe_split()
        x = self.three(x + cache[:2].sum(0))
        cache[2].copy_(x)
        return x, cache

    check(model, (numbers(grad=True),), want=3)


def test_detached_alias() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        alias = h.detach()
        pipe_split()
        alias.clamp_(-0.5, 0.5)
        return self.two(h)

    check(model, (numbers(grad=True),), want=2)


def test_detached_alias_that_gets_a_gradient_by_a_write() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor, store: Tensor) -> Tensor:
        alias = store.detach()
        alias.add_(self.one(x))
        pipe_split()
        return self.two(alias) + store

    with pytest.raises(CutError, match="writes in place into memory"):
        pipeline(model, (numbers(grad=True), numbers(seed=5, grad=True)))


def test_data_attribute() -> None:
    @trunk(one=linear(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        h = self.one(x)
        pipe_split()
        h.data.clamp_(-0.5, 0.5)
        return self.two(h)

    check(model, (numbers(grad=True),), want=2)


def test_alias_that_no_view_operation_makes_is_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[:2], x[2:]

    @trunk(one=linear(), halves=Halves(), two=linear())
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.one(x)
        top, bottom = self.halves(x)
        pipe_split()
        top.mul_(2)
        return self.two(x) + bottom.sum()

    with pytest.raises(CutError, match="writes in place into memory"):
        pipeline(model, (numbers(),))


def test_closed_view_alone_is_no_alias_of_another_traveller() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.t()

    @trunk(one=linear(), turned=Turned(), two=linear(4))
    def model(self: nn.Module, x: Tensor) -> Tensor:
        x = self.turned(self.one(x))
        pipe_split()
        x.mul_(2)
        return self.two(x)

    check(model, (numbers(grad=True),), want=2)
