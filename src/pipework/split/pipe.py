"""A model in stages: `pipeline` cuts it, `Pipe` is what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from pipework.errors import CutError, InputError, nearest
from pipework.plan import Layout
from pipework.split.arguments import Arguments, bind
from pipework.split.capture import Recording, ancestors, capture
from pipework.split.code import written
from pipework.split.compiled import compile_stage, compiled_modules, one_stream
from pipework.split.cut import Cut, cut, refuse_fake_constants
from pipework.split.draws import drawn, with_unreached
from pipework.split.guards import Guards, input_guards
from pipework.split.marks import Mark, Marks, SplitPoint
from pipework.split.points import CutPoints, PipeSplit
from pipework.split.preserve import simple_attributes
from pipework.split.scope import compiled
from pipework.split.search import balanced
from pipework.split.stage import Code, Stage
from pipework.split.table import table
from pipework.split.tape import Origin, Surroundings
from pipework.split.ties import Tie, canonical_names, ties, with_ties
from pipework.split.torch_private import compiler, is_compiled, is_compiled_in_place, parameters_of
from pipework.split.trees import Ref, map_leaves


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A cut for inputs of one signature, in one state of the model's modes."""

    cut: Cut
    codes: tuple[Code, ...]
    sources: tuple[str, ...]
    drawing: Mapping[str, frozenset[str]]
    calls_before: tuple[Mapping[str, int], ...]
    on_example: bool
    changed_attributes: tuple[tuple[str, str, Any], ...]
    written_buffers: frozenset[str]
    casts: bool
    compiled: tuple[frozenset[str], ...]
    compiled_trunk: str
    ties: tuple[Tie, ...]
    guards: Guards | None

    @property
    def draws(self) -> bool:
        """Whether random numbers go into any of it."""
        return bool(self.drawing) or any(entry.draw for part in self.cut.parts for entry in part.entries)

    def rebuild(self, results: Sequence[torch.Tensor]) -> Any:
        """The model's own output from the tensors that the last stage returns for it."""
        tensors = dict(zip(self.cut.results, results, strict=True))
        return map_leaves(lambda leaf: tensors[leaf.index] if isinstance(leaf, Ref) else leaf, self.cut.output)


@final
class Pipe(nn.Module):
    """A model in stages, whose tensors are the model's own.

    Calling it runs the stages one after another in this process, differentiable from end to end; it returns what the
    model returns, except that a bare tensor comes as a tuple of one. `print(pipe)` shows the cut.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), split_spec={"2": pipework.SplitPoint.BEGINNING})
    >>> pipe.num_stages
    2
    >>> torch.equal(pipe(torch.ones(2, 4))[0], model(torch.ones(2, 4)))
    True
    >>> print(pipe)
    stage  modules  parameters  sends per microbatch
        0  0, 1             40  to 1: 64 B
        1  2                18  -
    """

    def __init__(self, model: nn.Module, example: Arguments, marks: Marks) -> None:
        super().__init__()
        # In a tuple, so that nn.Module does not take the model in as a child: the stages hold its parts.
        self._model = (model,)
        self._marks, self._example, self._opened = marks, example, frozenset[str]()
        self._trunk: tuple[nn.Module, ...] = ()  # the open modules
        self.names = canonical_names(model)
        self._tables = tuple(table for m in model.modules() if (table := parameters_of(m)))
        self._modules_of_model = tuple(model.modules())
        self._variants: dict[tuple[Any, ...], list[Variant]] = {}
        self._standing: dict[tuple[Any, ...], Variant] = {}  # for a stage called by itself, by the state of the trunk
        self._stages = nn.ModuleList()
        self.cut_points = CutPoints()
        """Where the model is cut, whatever made the cuts: print it, save it, or pass it on as a `split_spec`."""
        first = self.variant(example)
        self.num_stages = len(first.cut.parts)

    @property
    def model(self) -> nn.Module:
        """The model that was cut; never changed, and sharing its parameters with the stages."""
        return self._model[0]

    @property
    def example(self) -> Arguments:
        """The call that the model was cut on."""
        return self._example

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], partial: bool = False) -> Arguments:
        """The arguments of a call by name; with `partial`, some may be left out."""
        return bind(self.model, args, kwargs, partial, self._example.signature)

    def get_stage_module(self, index: int) -> Stage:
        """Stage number `index`, from 0; raises `InputError` for one that is not there."""
        if not 0 <= index < self.num_stages:
            raise InputError(f"there is no stage {index}", remedy=f"the stages are 0 to {self.num_stages - 1}")
        stage = self._stages[index]
        assert isinstance(stage, Stage)
        return stage

    def layout(self, ranks: int, place: Callable[[int, int], Layout] = Layout.loop) -> Layout:
        """Which rank holds which stage, and which stage feeds which: stages go round the ranks, or as `place` says.

        `place` makes a layout from the number of ranks and of stages per rank; only its ranks count.

        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
        >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), stages=4)
        >>> pipe.layout(ranks=2).rank_of, pipe.layout(2, pipework.Layout.vee).rank_of
        ((0, 1, 0, 1), (0, 1, 1, 0))
        """
        if ranks < 1 or self.num_stages % ranks:
            raise InputError(
                f"{self.num_stages} stages cannot be laid on {ranks} ranks",
                why="each rank holds the same number of stages",
                remedy="choose ranks that divide the stages, or cut the model into another number of stages",
            )
        return self.lay(place(ranks, self.num_stages // ranks), self.variant(self._example))

    @staticmethod
    def lay(layout: Layout, *variants: Variant) -> Layout:
        """The layout with the edges of these variants."""
        edges = [edge for variant in variants for edge in variant.cut.edges]
        return Layout(
            layout.rank_of,
            frozenset((e.source, e.target) for e in edges),
            frozenset((e.source, e.target) for e in edges if e.gradients),
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run all stages on what the model itself would be called with."""
        arguments = self.bind(args, kwargs)
        variant = self.variant(arguments)
        inputs = arguments.tensors()
        values: dict[int, torch.Tensor] = {}
        for part, code, stage in zip(variant.cut.parts, variant.codes, self._stages, strict=True):
            given = [*(inputs[position] for _, position in part.inputs), *(values[i] for i in part.received)]
            values |= zip(part.outputs, code(stage, *given), strict=True)
        self.ran(variant)
        output = variant.rebuild([values[i] for i in variant.cut.results])
        return (output,) if isinstance(output, torch.Tensor) else output

    def train(self, mode: bool = True) -> Pipe:
        """Put the stages and the model in train or eval mode."""
        super().train(mode)
        self.model.train(mode)  # last, since a model may overrule the mode of some of its parts
        return self

    def _set_mode(self, mode: bool) -> None:
        """The trunk's modules are in no stage, but their mode decides what the trunk does."""
        for module in self._trunk:
            module.training = mode

    def variant(self, arguments: Arguments) -> Variant:
        """The cut for these arguments and the model's present modes; captured when first met, looked up afterwards."""
        key = arguments.key(), Surroundings.now(), self._frozen(), self._compiled()
        known = self._variants.get((*key, self._trunk_state()), ())
        found = next((v for v in known if v.guards is None or v.guards.hold(arguments.tensors())), None)
        if found is None:
            recording = self._capture(arguments)
            if recording.opened != self._opened:  # in the first capture it turns out which modules are open
                self._opened = recording.opened
                self._trunk = tuple(self.model.get_submodule(name) for name in sorted(self._opened))
            found = self._build(recording)
            self._variants.setdefault((*key, self._trunk_state()), []).append(found)
        return found

    def _frozen(self) -> tuple[bool, ...]:
        """Which parameters are trained, where anything is; those that are not let gradients end elsewhere."""
        if not torch.is_grad_enabled():
            return ()
        return tuple([p.requires_grad for table in self._tables for p in table.values() if p is not None])

    def _compiled(self) -> tuple[int, ...]:
        """Which modules are compiled in place: it may be done after the cut, and undone."""
        return tuple([n for n, m in enumerate(self._modules_of_model) if is_compiled_in_place(m)] if compiler() else ())

    def _trunk_state(self) -> tuple[Any, ...]:
        """The modes and other plain attributes of the open modules."""
        return tuple(tuple(simple_attributes(module).items()) for module in self._trunk)

    def compile(self, **options: Any) -> None:
        """Give every stage's code to `torch.compile`, with its options, as `nn.Module.compile` does with a forward.

        It is compiled when first called, here and in runners. Each kind of call (shapes, train or eval) has code of its
        own. A process compiles what it runs; `pipe.get_stage_module(i).compile()` is for one stage alone.

        The numbers are those of the compiled stages called one after another: the compiler's backend may round, and
        draws random numbers, in its own way. Those that a stage draws depend on the step, the microbatch and the stage,
        not on the schedule. Where a schedule splits the backward, all of a compiled stage's goes back with I.

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), stages=2)
        >>> pipe.compile(backend="aot_eager", fullgraph=True)
        >>> with torch.no_grad():
        ...     torch.equal(pipe(torch.ones(2, 4))[0], model(torch.ones(2, 4)))
        True
        """
        for index in range(self.num_stages):
            self.get_stage_module(index).compile(**options)

    def forget(self) -> None:
        """Capture anew at the next call: the model's tensors have other dtypes or devices, or a stage is compiled."""
        self._variants.clear()
        self._standing.clear()

    def ran(self, variant: Variant) -> None:
        """Give the model's plain attributes (a counter, a flag) the values that one forward leaves in them."""
        for module, name, value in variant.changed_attributes:
            setattr(self.model.get_submodule(module), name, value)

    def _capture(self, arguments: Arguments) -> Recording:
        recording = capture(
            self.model,
            arguments.values,
            lambda values: arguments.with_values(values).call(self.model),
            self._marks,
            self._opened,
        )
        _refuse_unmet(self.model, self._marks, recording)
        refuse_fake_constants(recording.values)
        return recording

    def _build(self, recording: Recording) -> Variant:
        whole = cut(recording)
        if not self._stages:
            self.cut_points = CutPoints(recording.points)
            for index in range(len(whole.parts)):
                self._stages.append(Stage(index, lambda i=index: self._chosen(i), self._set_mode, self.forget))
        elif len(whole.parts) != len(self._stages):
            raise CutError(
                f"on these inputs the model has {len(whole.parts)} stages, and on the example {len(self._stages)}",
                why="the number of cuts met in the forward depends on the inputs",
                remedy="cut at named modules, or outside loops whose length depends on the inputs",
            )
        ambient = recording.ambient
        sources, codes, inside = [], [], []
        for part, stage in zip(whole.parts, self._stages, strict=True):
            assert isinstance(stage, Stage)
            constants = {i: recording.values[i].tensor for i, (o, _) in part.owned.items() if o is Origin.CONSTANT}
            source, names = written(part, recording, ambient, stage.hold(part, self.model, constants))
            sources.append(source)
            inside.append(compiled_modules(stage, recording.compiled))
            if stage.compile_options is None:
                codes.append(compiled(source, names, part.index))
            else:
                code = compiled(source, {**names, "streams_on": one_stream}, part.index)
                codes.append(compile_stage(code, part, stage.compile_options))
        stages = list(self._stages)
        tied = ties(stages, self.names)
        return Variant(
            dataclasses.replace(whole, edges=with_ties(whole.edges, tied, stages)),
            tuple(codes),
            tuple(sources),
            self._drawing(recording),
            recording.calls_before,
            recording.on_example,
            recording.changed_attributes,
            recording.written_buffers,
            recording.casts,
            tuple(inside),
            recording.compiled_trunk,
            tied,
            input_guards(recording),
        )

    def _drawing(self, recording: Recording) -> dict[str, frozenset[str]]:
        """Which modules draw, or may draw on other values, and what each calls."""
        modules = dict(self.model.named_modules())
        closed = recording.called.keys() - recording.opened
        unreached = [name for name in modules.keys() - recording.called.keys() if ancestors(name) & closed]
        unreached = [name for name in unreached if not any(is_compiled(modules[around]) for around in ancestors(name))]
        seen = {name: recording.calls.get(name, frozenset()) for name in recording.drawing}
        return with_unreached(seen, modules, unreached)

    def _chosen(self, index: int) -> tuple[Code, str]:
        state = Surroundings.now(), self._trunk_state()
        variant = self._standing.get(state)
        if variant is None:
            variant = self._standing[state] = self.variant(self._example)
        return variant.codes[index], variant.sources[index]

    def __repr__(self) -> str:
        return table(self)


def pipeline(
    module: nn.Module,
    mb_args: tuple[Any, ...] = (),
    mb_kwargs: Mapping[str, Any] | None = None,
    split_spec: Mapping[str, SplitPoint] | CutPoints | None = None,
    stages: int | None = None,
) -> Pipe:
    """Cut a model into stages on one example microbatch.

    The cuts are where `pipe_split()` is met in a forward, and before or after the modules named in `split_spec`. With
    `stages=N` they are instead where the stages balance best by counted cost, which is the same on every rank; and with
    the `cut_points` of another pipe as `split_spec`, or with those loaded from a file, they are there. The model itself
    is not changed; the stages share its parameters. A model on the meta device is cut without memory for its weights.

    Raises `CutError` where a cut cannot be made and `CaptureError` where the forward does not run on the example.

    >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])
    >>> pipe = pipework.pipeline(model, (torch.ones(2, 4),), split_spec={"2": pipework.SplitPoint.BEGINNING})
    >>> [list(dict(s.named_children())) for s in (pipe.get_stage_module(0), pipe.get_stage_module(1))]
    [['0', '1'], ['2', '3']]
    """
    example = bind(module, tuple(mb_args), dict(mb_kwargs or {}))
    if stages is not None and split_spec is not None and len(split_spec):
        raise CutError("both split_spec and stages were given", why="each says where to cut", remedy="pass one of them")
    if stages is not None:
        return balanced(module, example, stages, lambda points: Pipe(module, example, points.marks()))
    return Pipe(module, example, _marks(module, {} if split_spec is None else split_spec))


def _marks(module: nn.Module, split_spec: Mapping[str, SplitPoint] | CutPoints) -> Marks:
    whole = split_spec.marks() if isinstance(split_spec, CutPoints) else Marks(_at(split_spec))
    modules = dict(module.named_modules(remove_duplicate=False))
    canonical = {id(m): name for name, m in module.named_modules()}
    at: dict[str, list[Mark]] = {}
    for name, marks in whole.at.items():
        if not name or name not in modules:
            raise CutError(
                f"there is no module {name!r}",
                why="a split spec names submodules by their FQN" + nearest(name, modules),
                remedy="see model.named_modules() for the names",
            )
        at.setdefault(canonical[id(modules[name])], []).extend(marks)
    return Marks(at, whole.splits)


def _at(split_spec: Mapping[str, SplitPoint]) -> dict[str, list[Mark]]:
    for name, point in split_spec.items():
        if not isinstance(point, SplitPoint):
            raise CutError(
                f"{point!r} is no place to cut at {name!r}", remedy="use SplitPoint.BEGINNING or SplitPoint.END"
            )
    return {name: [Mark(point)] for name, point in split_spec.items()}


def _refuse_unmet(module: nn.Module, marks: Marks, recording: Recording) -> None:
    for number in sorted(marks.splits or ()):
        if PipeSplit(number) not in recording.points:
            raise CutError(f"there is no pipe_split() {number}", remedy="remove this cut; the numbers count from 0")
    for name, found in marks.at.items():
        calls = recording.called.get(name, 0)
        if calls and (late := [mark.call for mark in found if mark.call is not None and mark.call >= calls]):
            raise CutError(
                f"the module {name!r} has no call {late[0]}",
                why=f"the forward calls it {calls} times, and calls count from 0",
                remedy="name an earlier call, or remove this cut",
            )
        if calls:
            continue
        children = [f"{name}.{child}" for child, _ in module.get_submodule(name).named_children()]
        inside = [c for c in children if c in recording.called]
        near = (
            f"; its children are: {', '.join(inside[:4])}" if inside else nearest(name, recording.called.keys() - {""})
        )
        by_chance = any(e.readback and drawn(e, recording.entries, recording.values) for e in recording.entries)
        raise CutError(
            f"the module {name!r} is never called in the forward",
            why="a cut lies before or after a module's call"
            + ("; here chance decides what is called" * by_chance or near),
            remedy="let a layer skip itself at random, or turn that off"
            if by_chance
            else "name a module that the forward calls (of a ModuleList, name one of its items)",
        )
