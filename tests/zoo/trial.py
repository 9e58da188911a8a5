"""One model of the zoo: made tiny, run by itself, cut, compared as a local pipe, and trained on ranks."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import pipework
from pipework.errors import PipeworkError
from tests.split.equality import State, assert_names, assert_same, outcome, same
from tests.zoo import blocks, configs, inputs
from tests.zoo.catalogue import Entry
from tests.zoo.training import trained_alike

MOST_PARAMETERS = 28_000_000


@dataclasses.dataclass(slots=True)
class Result:
    """What became of one model class. Each verdict is "right", or else what hindered it."""

    name: str
    kind: str
    own: str = ""  # its own forward and backward
    called_with: str = ""
    parameters: int = 0
    level: int = 0
    cut: str = ""
    stages: list[int] = dataclasses.field(default_factory=list)
    pipe: str = ""
    train: str = ""
    reason: str = ""
    seconds: float = 0.0
    state: str = ""  # of the code: commit and versions

    @property
    def runs(self) -> bool:
        """Whether the model's own forward and backward ran, so that it counts."""
        return self.own == "right"

    @property
    def passes(self) -> bool:
        """Whether all that was compared is the same."""
        return self.pipe == self.train == "right"

    def line(self) -> str:
        """All of it in one line."""
        if not self.runs:
            return f"{self.name}: not run: {self.own[:200]}"
        stages = "+".join(map(str, self.stages))
        reason = "" if self.passes else f": {self.reason[:400]}"
        return f"{self.name} ({self.seconds} s, {stages} stages) pipe {self.pipe}, train {self.train or '-'}{reason}"


@dataclasses.dataclass(frozen=True, slots=True)
class Runnable:
    """A model with a way to call it."""

    make: Callable[..., nn.Module]  # the same model each time
    inputs: Callable[[int, int, int], dict[str, Any]]  # batch, length, seed
    called_with: str
    level: int


def tried(entry: Entry) -> Iterator[Result]:
    """Everything about one model class; first, with `seconds` still 0, whether the model itself runs."""
    result = Result(entry.name, entry.kind)
    start = time.process_time()
    try:
        found = runnable(entry)
    except NotRunnableError as error:
        result.own = str(error)
    else:
        model = found.make()
        result.own, result.called_with, result.level = "right", found.called_with, found.level
        result.parameters = sum(p.numel() for p in model.parameters())
        yield result
        _cut_and_compare(result, found, blocks.ways(model, found.inputs(2, inputs.LENGTH, 0)))
    result.seconds = max(0.1, round(time.process_time() - start, 1))
    yield result


def _cut_and_compare(result: Result, found: Runnable, ways: Sequence[blocks.Way]) -> None:
    """The first way of cutting that is not refused counts, else the first; what was said of earlier ones is kept."""
    verdicts: list[tuple[str, list[int], str, str]] = []
    reasons: list[str] = []
    for way in ways:
        stages, train = list[int](), ""
        pipe, reason = verdict(lambda way=way, stages=stages: stages.extend(_local(found, way.cuts)))
        if pipe == "right":
            train, reason = verdict(lambda way=way: trained_alike(found, way.cuts))
        verdicts.append((way.name, stages, pipe, train))
        if reason:
            reasons.append(f"at {way.name}: {reason}")
        if "refused" not in (pipe, train):
            break
    passing = [v for v in verdicts if v[2] == v[3] == "right"]
    wrong = [v for v in verdicts if "refused" not in v]
    result.cut, result.stages, result.pipe, result.train = (passing or wrong or verdicts)[0]
    result.reason = " | ".join(reasons)


def verdict(check: Callable[[], None]) -> tuple[str, str]:
    """Gives "right", "refused" by an error of pipework, "wrong" where something differs, or "crashed"; and why."""
    try:
        check()
    except PipeworkError as error:
        return "refused", _told(error)
    except AssertionError as error:
        return "wrong", _told(error)
    except Exception as error:
        return "crashed", _told(error)
    return "right", ""


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:700]


def _local(found: Runnable, cuts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Output, gradients, buffers and names, in train and eval mode and for other shapes; the numbers of stages."""
    model, reference = found.make(), found.make()
    given = found.inputs(2, inputs.LENGTH, 0)
    state = State.of(model)
    stages: list[int] = []
    for how in cuts:
        pipe = pipework.pipeline(model, (), given, **how)
        stages.append(pipe.num_stages)
        state.assert_still(model)
        model.load_state_dict(reference.state_dict())
        for training in (True, False):
            reference.train(training)
            pipe.train(training)
            for kwargs in (given, found.inputs(3, inputs.LONGER, 1)) if training else (given,):
                wanted = outcome(reference, reference, (), kwargs)
                assert_same(outcome(pipe, model, (), kwargs, isinstance(wanted.output, torch.Tensor)), wanted)
        assert_names(pipe, model)
        model.train()
        model.zero_grad(set_to_none=True)
        state = State.of(model)
    return stages


# ---------------------------------------------------------------------- the model by itself


class NotRunnableError(Exception):
    """Neither config nor inputs could be made for the model's own forward and backward."""


def runnable(entry: Entry) -> Runnable:
    """The smallest config and the fullest call with which the model's own forward and backward run."""
    import transformers

    model_class = getattr(transformers, entry.name)
    problems: dict[str, None] = {}
    for level in (0, 1, 2):

        def make(level: int = level) -> nn.Module:
            torch.manual_seed(0)
            config = configs.tiny(model_class.config_class, level)
            return _sound(model_class(config).train())

        try:
            config = configs.tiny(model_class.config_class, level)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > MOST_PARAMETERS:
                problems[f"level {level}: {size:,} parameters"] = None
                continue
            model = make()
        except Exception as error:
            problems[f"level {level}: {_told(error)[:200]}"] = None
            continue
        for called_with, maker in inputs.candidates(model):
            problem, images = _runs(model, maker)
            if not problem:
                return Runnable(
                    make, lambda b, n, s, maker=maker, images=images: maker(b, n, images, s), called_with, level
                )
            problems[f"level {level}, {called_with}: {problem}"] = None
    raise NotRunnableError(" | ".join(problems)[:1500])


def _sound(model: nn.Module) -> nn.Module:
    """Parameters that the library leaves uninitialised get values; where it skips layers at random, it does not."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):  # not all take it from the config
            module.layerdrop = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and not (parameter.isfinite().all() and parameter.abs().max() < 1e3)
            ):
                parameter.normal_(0, 0.02)
    return model


def _runs(model: nn.Module, maker: Any) -> tuple[str, int]:
    """What hinders forward and backward (nothing if empty), and how many image tokens an example needs."""
    images = 0
    for _ in range(2):
        try:
            for batch, length in ((2, inputs.LENGTH), (3, inputs.LONGER)):
                given = maker(batch, length, images)
                first, again = (outcome(model, model, (), given) for _ in range(2))
                gradients = [g for g in first.gradients.values() if g is not None]
                if not gradients:
                    return "nothing got a gradient", images
                if not all(g.isfinite().all() for g in gradients):
                    return "gradients are not finite", images
                try:
                    same(dict(first.gradients), dict(again.gradients))
                except AssertionError:
                    return "with the same seed it gives other gradients each time", images
            model.zero_grad(set_to_none=True)
            return "", images
        except Exception as error:
            told = re.search(r"tokens: (\d+),? features:? (\d+)", str(error))
            if told is None or images or int(told[1]) != 0 or int(told[2]) % 2:
                return _told(error)[:200], images
            images = int(told[2]) // 2
    return "the number of image tokens keeps changing", images


def preload() -> None:
    """Import what all models need, so that each process need not."""
    import transformers
    from transformers import masking_utils, modeling_layers  # noqa: F401

    model = transformers.LlamaForCausalLM(configs.tiny(transformers.LlamaConfig, 0))
    with torch.no_grad():
        pipework.pipeline(model, (torch.ones(1, 4, dtype=torch.long),), {"use_cache": False})
