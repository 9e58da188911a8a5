"""Training a pipe: one call a step, the same on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from pipework.errors import InputError, PipeworkError, TransportError
from pipework.plan import Schedule, Timeline, check
from pipework.run.checkpoint import load
from pipework.run.clock import Recording
from pipework.run.graphs import Captured, copied
from pipework.run.inputs import Batch, Inputs
from pipework.run.labels import labels
from pipework.run.losses import Losses, LossWeight, shares
from pipework.run.materialise import Initialize, initialize
from pipework.run.plans import REFUSED, Plan, agree, fingerprint, plan, refuse_unplayable
from pipework.run.ranks import ProcessRank, Ranks, ThreadRanks
from pipework.run.stage_run import Feed
from pipework.run.transport import refusing, together
from pipework.split.draws import DrawKey, streams
from pipework.split.microbatch import UNSAID, merge
from pipework.split.pipe import Pipe
from pipework.split.torch_private import is_compiled

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

Loss = Callable[[Any, Any], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What `Runner.evaluate` gives: the loss on every rank, and the output where the last stage is (else None)."""

    loss: torch.Tensor | None
    output: Any


@final
class Runner:
    """Runs a pipe by a schedule, on threads of this process, or on processes: a group's, or a dimension of a mesh.

    Every rank makes the same calls. `loss` is a callable on (output, target), or None for a model whose output has a
    `.loss`. Each microbatch's loss is divided by their number before its backward, unless `scale_loss` is False;
    gradients are added to `.grad`, so that several steps accumulate.

    Where microbatches count for more or less (their losses are means over tokens that are not padded, and the numbers
    of these differ), `loss_weight` gives the weight of each from its target: a number, or a tensor without dimensions,
    such as `lambda target: (target != -100).sum()`. The step's loss is then `sum(w_i * loss_i) / sum(w_i)`, the loss of
    the whole batch; without `scale_loss`, `sum(w_i * loss_i)`. A microbatch of weight 0 has no part in it.

    Tensors are split into microbatches along dimension 0, unless `chunk_spec` says otherwise for an argument or for
    `target` (see `pipework.split.microbatch`).

    With `graphs`, on GPUs, each kind of step runs as ever for its first two times and is then captured in a CUDA graph,
    all of it: its forwards and backwards, its transfers, its loss. From then on the host only copies the inputs and
    starts the graph. Numbers stay those of a step that is not captured, random ones too. Gradients are left in memory
    that later steps write again (clone what shall outlast the next step), and Python that a forward runs beside its
    kernels (hooks that print, counters) runs no more. What cannot be captured runs as ever, with a warning that names
    the module. `captured` tells what has been.

    `recorded` is the last step's timeline. Threads on the CPU always record; with `record=True` processes do, at one
    exchange a step, and GPUs, at two events an action. In a profile that is being made, each instruction stands by its
    text, such as `2F0` and `send 2F0>3` (see `pipework.run.labels`). A step captured in a graph does neither.

    With `keep_outputs` set, `outputs` is the last step's output. Random numbers depend on `seed`, which is torch's own
    on rank 0 when the runner is made, and on `steps`, the number of steps made; set both to continue a run.

    Raises `InputError` for a schedule that does not fit the pipe or the group.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), stages=2)
    >>> schedule = pipework.schedules.one_f_one_b(pipe.layout(ranks=2), microbatches=4)
    >>> runner = pipework.Runner(pipe, schedule, loss=torch.nn.functional.mse_loss)
    >>> loss = runner.step(torch.ones(8, 4), target=torch.zeros(8, 2))
    >>> loss.shape, model[0].weight.grad.shape
    (torch.Size([]), torch.Size([8, 4]))
    """

    def __init__(  # noqa: PLR0913 (one for each thing that a user may want otherwise)
        self,
        pipe: Pipe,
        schedule: Schedule,
        *,
        loss: Loss | None = None,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        scale_loss: bool = True,
        loss_weight: LossWeight | None = None,
        chunk_spec: Mapping[str, Any] | None = None,
        output_merge_spec: Any = UNSAID,
        record: bool = False,
        graphs: bool = False,
    ) -> None:
        self.pipe, self.schedule = pipe, schedule
        self._ranks: Ranks = ThreadRanks(schedule.layout.ranks) if group is None else ProcessRank(group, self._device())
        self._ends = self._ranks.ends
        self._loss, self._scale_loss = loss, scale_loss
        weigh = None if loss_weight is None else partial(shares, loss_weight, scale=scale_loss)
        self._inputs = Inputs(pipe, schedule, dict(chunk_spec or {}), weigh)
        self._merge_spec, self._record = output_merge_spec, record and not graphs
        self._graphs = graphs
        self.keep_outputs = False
        with refusing(self._ends[0], group is not None):
            self._refuse_unfit(pipe, schedule)
        self._names = pipe.names
        self._buffer_names = {name for name, _ in pipe.model.named_buffers()}
        self._plans: dict[tuple[tuple[int, ...], bool], Plan] = {}
        self.steps = 0
        self._recorded: tuple[Schedule, Recording] | None = None
        self._outputs: Any = None
        self.seed = self.exchange(torch.initial_seed())[0]

    def _device(self) -> torch.device:
        """Where this process computes."""
        return next((p.device for p in self.pipe.parameters() if not p.is_meta), torch.device("cpu"))

    def _refuse_unfit(self, pipe: Pipe, schedule: Schedule) -> None:
        if schedule.layout.stages != pipe.num_stages:
            raise InputError(
                f"the schedule has {schedule.layout.stages} stages, and the pipe {pipe.num_stages}",
                remedy="make the schedule over pipe.layout(ranks=...)",
            )
        if self._ends[0].ranks != schedule.layout.ranks:
            raise InputError(
                f"the schedule has {schedule.layout.ranks} ranks, and the group {self._ends[0].ranks}",
                remedy="make the layout for as many ranks as the group has",
            )
        check(schedule)
        refuse_unplayable(schedule)

    # ------------------------------------------------------------------ steps

    def step(self, *args: Any, target: Any = None, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one batch; gives the loss, the same on every rank.

        The loss is the mean over microbatches (their sum without `scale_loss`; by weight with `loss_weight`), detached.
        Each rank needs only the inputs that its stages read, and the target only where the last stage is; others may be
        left out or None.
        """
        if not self.schedule.trains:
            raise InputError(
                f"the schedule {self.schedule.name!r} only goes forward",
                remedy="call evaluate(), or use one that trains",
            )
        if not torch.is_grad_enabled():
            raise InputError(
                "step() was called with gradients switched off",
                why="it would go backward through nothing",
                remedy="call it outside torch.no_grad() and torch.inference_mode(), or call evaluate()",
            )
        loss = self._play(self._batch(args, kwargs, target, trains=True), trains=True)
        assert loss is not None
        self.steps += 1
        return loss

    def evaluate(self, *args: Any, target: Any = None, **kwargs: Any) -> Evaluation:
        """Forward of one batch without gradients; neither gradients nor the count of steps change.

        The model's mode is left as it is: call `pipe.eval()` first for a model with dropout.
        """
        with torch.no_grad():
            loss = self._play(self._batch(args, kwargs, target, trains=False), trains=False)
        return Evaluation(loss, self._outputs)

    def _batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any, trains: bool) -> Batch:
        """The batch of a call; an error in it is told to the other ranks, which would wait for this one."""
        first = not self._plans
        try:
            return self._inputs.batch(args, kwargs, target, self._ends, first, trains)
        except PipeworkError:
            if not first and self._inputs.everyone_has_all:
                self._ends[0].numbers(REFUSED)
            raise

    def _play(self, batch: Batch, trains: bool) -> torch.Tensor | None:
        try:
            return self._played(batch, trains)
        except TransportError as error:
            for end in self._ends:
                end.fail(error)  # however late it was heard: the group's next runner makes new connections
            raise

    def _played(self, batch: Batch, trains: bool) -> torch.Tensor | None:
        made = self._plan(batch, trains)
        recording = self._recording(made)
        draw = DrawKey(self.seed, self.steps, 0)
        if made.graphs is None:
            losses = self._eager(made, trains, draw, recording, batch)
        else:
            eager = partial(self._eager, made, trains, draw, recording)
            losses = made.graphs.step(batch, self.keep_outputs, draw, eager)
        batch.return_gradients()
        total = losses.total(self._ends, made.schedule.layout.rank_of[-1], made.loss_dtype)
        outputs = losses.outputs if made.graphs is None else copied(losses.outputs)
        self._outputs = merge(outputs, self._merge_spec) if outputs else None
        self._recorded = None
        if recording is not None:
            if not self._ends[0].in_one_process:
                recording.share(self.exchange)
            self._recorded = made.schedule, recording
        return total

    def _recording(self, made: Plan) -> Recording | None:
        is_free = self._ends[0].in_one_process and all(device.type == "cpu" for device in made.devices)
        return Recording(made.devices) if self._record or is_free else None

    def _eager(
        self,
        made: Plan,
        trains: bool,
        draw: DrawKey,
        recording: Recording | None,
        batch: Batch,
        is_captured: bool = False,
    ) -> Losses:
        """Every action launched by the host."""
        divisor = self.schedule.microbatches if self._scale_loss else 1
        keep = self.keep_outputs or not trains
        losses = Losses(self._loss, trains, divisor, batch.targets, batch.shares, made.variants, keep)
        label = None if is_captured else labels()
        feed = Feed(batch.inputs, losses.finish, draw, recording, label, alone=is_compiled(self._loss))
        with streams(made.modules, made.drawing):
            self._ranks.run(made.executors, feed, is_captured)
        return losses

    def _plan(self, batch: Batch, trains: bool) -> Plan:
        """The plan of a step, after all ranks have said that they mean the same."""
        key = tuple(map(id, batch.variants)), trains
        made = self._plans.get(key)
        number = 0 if made is None else made.number
        told = self._ends[0].numbers(number) if self._plans else None  # before the first step all is told anyway
        if told is not None and REFUSED in told:
            raise InputError(
                f"rank {told.index(REFUSED)} refused the step",
                why="its call was another than this one; its own error says more",
                remedy="make the same call on every rank",
            )
        if not self._ends[0].in_one_process and (made is None or (told is not None and set(told) != {number})):
            facts = {
                "schedule": (self.schedule.name, self.schedule.fingerprint),
                "number of microbatches": self.schedule.microbatches,
                "kind of step": "step" if trains else "evaluate",
                "cut": fingerprint(batch.variants),
                "scale_loss": self._scale_loss,
                "loss_weight": "given" if self._inputs.weigh else None,
                "record": self._record,
            }
            agree(facts, self._ends[0])
        if made is None:
            made = plan(self.pipe, self.schedule, batch.variants, trains, self._ends, self._graphs, self._loss)
            self._plans[key] = made
        return made

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, by rank; the one value of this process where ranks are threads. All ranks call it."""
        return [value] if self._ends[0].in_one_process else together(self._ends[0], value)

    # ------------------------------------------------------------------ what the last step left

    @property
    def recorded(self) -> Timeline:
        """The last step as it really ran, on all ranks, in seconds; waits for GPUs that are still at it.

        An action lasts from when all that it needs has arrived. On a GPU it is timed by events on its stream;
        where ranks share a GPU, each is as slow as the others make it. Ranks on one machine go by one clock, those with
        GPUs of their own to some microseconds; machines agree as well as their times of day do.
        """
        if self._recorded is None:
            raise PipeworkError(
                "no step was recorded",
                why="recording costs processes one exchange a step, and GPUs two events an action",
                remedy="pass record=True to the runner, without graphs, and make a step",
            )
        schedule, recording = self._recorded
        return Timeline.recorded(schedule, recording.spans())

    @property
    def captured(self) -> tuple[Captured, ...]:
        """The kinds of steps that are replayed, one for each shape of inputs and for gradients there before or not."""
        return tuple(c for p in self._plans.values() if p.graphs is not None for c in p.graphs.captured)

    @property
    def outputs(self) -> Any:
        """The last step's output, merged over microbatches, where the last stage is and if `keep_outputs` is set."""
        return self._outputs

    # ------------------------------------------------------------------ parameters

    def _stages(self) -> list[nn.Module]:
        layout = self.schedule.layout
        held = sorted(index for end in self._ends for index in layout.held_by(end.rank))
        return [self.pipe.get_stage_module(index) for index in held]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process holds, by their name in the original model, each once."""
        seen: set[int] = set()
        for stage in self._stages():
            for name, parameter in stage.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield self._names[name], parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this process holds, for its optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers that this process holds, by their name in the original model."""
        for stage in self._stages():
            for name, buffer in stage.named_buffers():
                if name in self._buffer_names:
                    yield name, buffer

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers that this process holds, by their name in the original model.

        Those that no stage uses are given by the rank of the first stage, so that all ranks together give all.
        """
        held = {name: tensor for stage in self._stages() for name, tensor in stage.state_dict().items()}
        return held | self._unused()

    def _unused(self) -> dict[str, torch.Tensor]:
        """What of the model no stage uses, on the rank of the first stage."""
        if self.schedule.layout.rank_of[0] not in [end.rank for end in self._ends]:
            return {}
        used = {self.pipe.names.get(n, n) for i in range(self.pipe.num_stages) for n in self._stage_state(i)}
        state = self.pipe.model.state_dict()
        return {name: tensor for name, tensor in state.items() if self.pipe.names.get(name, name) not in used}

    def _stage_state(self, index: int) -> dict[str, torch.Tensor]:
        return self.pipe.get_stage_module(index).state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what this process holds from a state dict of the original model, or of any other cut of it.

        Raises `InputError` naming what is missing.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise InputError(f"the state dict lacks {', '.join(missing[:4])}", remedy="pass one of the whole model")
        for stage in self._stages():
            stage.load_state_dict({name: state[name] for name in stage.state_dict()})
        for name, tensor in self._unused().items():
            tensor.copy_(state[name])

    def initialize(
        self,
        function: Initialize | None = None,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        """Give the stages of this process their first values; those of a model on the meta device are made on `device`.

        `function(module)` is called with each module that owns parameters or buffers, and fills those in; by default
        it is the module's own `reset_parameters`. Random numbers begin anew in each module from `seed` (by default the
        runner's) and the module's FQN, so that the values depend neither on the cut nor on the ranks. All ranks call
        it, before they make optimizers: parameters on the meta device are replaced, in the model too.

        Raises `InputError` naming what is left without values.

        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), stages=2)
        >>> runner = pipework.Runner(pipe, pipework.schedules.gpipe(pipe.layout(ranks=2), microbatches=2))
        >>> runner.initialize(seed=0)
        >>> model[0].weight.device, bool((model[2].bias.abs() < 8 ** -0.5).all())
        (device(type='cpu'), True)
        """
        with self._all_or_none():
            initialize(self.pipe, self._stages(), function, self._place(device), self.seed if seed is None else seed)

    def load(
        self,
        path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        initialize: Initialize | None = None,
        strict: bool = True,
    ) -> None:
        """Read the weights of this process's stages, and no others, from safetensors.

        `path` is a file, or a directory with `model.safetensors` or with `model.safetensors.index.json` and its files.
        Tensors on the meta device are made on `device` (by default where the runner computes), floating-point ones in
        the dtype in which they are stored, or `dtype`; those that have values get others in place. A tied parameter is
        found by any of its names. What no file holds (non-persistent buffers) is filled in by `initialize`, as in
        `Runner.initialize`. All ranks call it, before they make optimizers.

        Raises `InputError` naming what is missing, what the model does not have (unless `strict` is False), what has
        another shape, and what is left without values.
        """
        with self._all_or_none():
            load(self.pipe, self._stages(), path, self._place(device), dtype, initialize, strict, self.seed)

    def _place(self, device: torch.device | str | None) -> torch.device:
        found = self._ends[0].device if device is None else torch.device(device)
        if found.type == "cuda" and found.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return found

    @contextlib.contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Every rank does what the block does, or every rank raises the error of one that could not."""
        with refusing(self._ends[0], not self._ends[0].in_one_process):
            yield
        self.exchange(None)
        self._plans.clear()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their global norm is at most `max_norm`; gives the norm before, on every rank.

        The norm is made of the parameters' norms in the order of the original model, as torch's own function does, so
        it depends neither on the cut nor on the ranks. All ranks call it.
        """
        own = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        told = {n: torch.linalg.vector_norm(g, norm_type).cpu() for n, g in own.items()}
        norms = {name: norm for each in self.exchange(told) for name, norm in each.items()}
        ordered = [norms[name] for name, _ in self.pipe.model.named_parameters() if name in norms]
        total = torch.linalg.vector_norm(torch.stack(ordered), norm_type) if ordered else torch.tensor(0.0)
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for gradient in own.values():
            gradient.mul_(scale.to(gradient.device))
        return total
