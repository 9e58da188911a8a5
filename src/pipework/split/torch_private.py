"""Every private name of torch that pipework touches, in one place; a test checks that each still exists."""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
from torch._C import DisableTorchFunction as WithoutFunctionModes
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C import _cuda_endAllocateToPool
from torch._C import _current_graph_task_id as graph_task
from torch._C import _disabled_torch_function_impl as plain_torch_function
from torch._C import _will_engine_execute_node as goes_on_to
from torch._C._autograd import _profiler_type, _top_saved_tensors_default_hooks
from torch._C._profiler import ActiveProfilerType
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import _get_sequence_nr as sequence_number
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import return_and_correct_aliasing as aliased
from torch.utils._pytree import SUPPORTED_NODES as PYTREE_NODES

Tensor = TypeVar("Tensor", bound=torch.Tensor)

functorch_vmap = importlib.import_module("torch._functorch.vmap")
"""The module in which vmap looks up the four calls below, which no function mode sees."""

CHECKPOINT_GENERATOR = "_checkpoint_without_reentrant_generator"
"""In torch.utils.checkpoint: the generator that runs a checkpoint's function where it yields."""

COMPILED_CALL = "_callback_from_stance"
"""In torch._dynamo.eval_frame: what every call of compiled code asks first, from the frame in which the code runs."""

VMAP_CALLS = ("_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting", "_vmap_decrement_nesting")


def compiler() -> Any:
    """The module of torch in which compiled code is called; None as long as nobody has loaded it, or compiled."""
    return sys.modules.get("torch._dynamo.eval_frame")


def storage_of(tensor: torch.Tensor) -> int:
    """A number shared by the tensors that share memory; each tensor without a storage (sparse, ...) has its own."""
    storage = _storage(tensor)
    return -id(tensor) if storage is None else storage._cdata


def memory_of(tensor: torch.Tensor) -> int:
    """The bytes that a tensor keeps: of a view, those of all that it is a view of."""
    storage = _storage(tensor)
    return tensor.numel() * tensor.element_size() if storage is None else storage.nbytes()


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor, or a view of it, has been written in place; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which this one is a view, through however many others; itself if it is none."""
    return tensor if tensor._base is None else tensor._base


def no_view(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which counts as nobody's view: what it is a view of must not be used."""
    return tensor if tensor._base is None else torch.ops.aten._unsafe_view(tensor, tensor.shape)


@contextlib.contextmanager
def without_function_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Inside the block this mode is off, and those that were put on after it (`torch.device`, ...) stay on."""
    stack = _get_current_function_mode_stack()
    if mode not in stack:
        yield
        return
    later = stack[stack.index(mode) + 1 :]
    _replace_function_modes((mode, *later), later)
    try:
        yield
    finally:
        _replace_function_modes(later, (mode, *later))


def _replace_function_modes(top: Sequence[TorchFunctionMode], other: Sequence[TorchFunctionMode]) -> None:
    for _ in top:
        _pop_mode()
    for mode in other:
        _push_mode(mode)


def in_backward() -> bool:
    """Whether this thread runs inside a backward pass, as a checkpoint's second forward does."""
    return graph_task() != -1


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The module's own table of parameters, not a copy."""
    return module._parameters


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The module's own table of buffers, not a copy."""
    return module._buffers


def children_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """The module's own table of children, not a copy."""
    return module._modules


def shallow_copy(
    module: torch.nn.Module,
    parameters: dict[str, torch.nn.Parameter | None],
    children: dict[str, torch.nn.Module | None],
    instead: Callable[[Any], Any],
) -> torch.nn.Module:
    """A module that shares all with another but these parameters and children; lists of its own follow `instead`."""
    copy = module.__class__.__new__(module.__class__)
    lists = {k: [instead(x) for x in v] for k, v in module.__dict__.items() if type(v) is list}
    copy.__dict__.update(shared_attributes(module) | lists | {"_parameters": parameters, "_modules": children})
    return copy


def shared_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """What a module and its shallow copies have in common: all but parameters, children, lists, how it is compiled."""
    own = {"_parameters", "_modules", "_compiled_call_impl"}
    return {name: value for name, value in module.__dict__.items() if name not in own and type(value) is not list}


def is_persistent(module: torch.nn.Module, buffer: str) -> bool:
    """Whether the module's buffer is saved in its state dict."""
    return buffer not in module._non_persistent_buffers_set


def has_backward_hooks(module: torch.nn.Module) -> bool:
    """Whether anything is to be called in the module's backward."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


_MODULE_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
_PARAMETER_HOOKS = "_backward_hooks", "_post_accumulate_grad_hooks"


def hooks_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Numbers of the hooks that look on at the module's calls, or at its parameters' gradients; by table, if any."""
    found = {name: tuple(getattr(module, name)) for name in _MODULE_HOOKS}
    for own, parameter in module._parameters.items():
        found |= {f"{own}.{name}": tuple(getattr(parameter, name, None) or ()) for name in _PARAMETER_HOOKS}
    return {name: numbers for name, numbers in found.items() if numbers}


def run_backward(
    roots: Sequence[Any], seeds: Sequence[torch.Tensor | None], inputs: tuple[torch.Tensor, ...] = ()
) -> None:
    """`torch.autograd.backward`; where all is plain, without the checks in Python that the engine makes once more."""
    if not roots:
        return
    if all(type(root) in _PLAIN for root in roots):
        given = [
            torch.ones_like(root) if seed is None and isinstance(root, torch.Tensor) else seed
            for root, seed in zip(roots, seeds, strict=True)
        ]
        _engine_run_backward(
            tuple(roots), tuple(given), False, False, inputs, allow_unreachable=True, accumulate_grad=True
        )
    else:
        torch.autograd.backward(roots, seeds, inputs=inputs or None)


_PLAIN = (torch.Tensor, torch.nn.Parameter, GradientEdge)


def saved_elsewhere() -> bool:
    """Whether what autograd saves here goes through somebody's hands: a checkpoint, which drops it, or an offload."""
    return _top_saved_tensors_default_hooks(True) is not None


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether the module was compiled by its own `compile()`."""
    return module._compiled_call_impl is not None


def is_compiled(thing: Any) -> bool:
    """Whether a module or function was given to `torch.compile`, or a module compiled in place."""
    own: Mapping[str, Any] = getattr(thing, "__dict__", {})
    if "dynamo_ctx" in own:  # a module in another, and a copy of one
        return True
    if "_torchdynamo_orig_callable" in own:
        return "_torchdynamo_disable" not in own
    return isinstance(thing, torch.nn.Module) and is_compiled_in_place(thing)


def compile_like(module: torch.nn.Module, copy: torch.nn.Module) -> torch.nn.Module:
    """The copy of a module, compiled as the module itself is: what torch makes of a module is bound to that module."""
    call: Any = module._compiled_call_impl
    if call is not None:
        copy.__dict__["_compiled_call_impl"] = inspect.getclosurevars(call).nonlocals["self"](copy._call_impl)
    elif is_compiled(module):
        wrapper: Any = module
        return wrapper.dynamo_ctx(children_of(copy)["_orig_mod"])
    return copy


@final
class AroundCompiled:
    """Calls functions before and after a module that is compiled in place; its hooks would be compiled with it."""

    def __init__(
        self,
        module: torch.nn.Module,
        before: Callable[[torch.nn.Module, tuple[Any, ...]], object],
        after: Callable[[torch.nn.Module, tuple[Any, ...]], object],
    ) -> None:
        self.module, self.before, self.after = module, before, after
        self.call: Any = module._compiled_call_impl
        module.__dict__["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        self.before(self.module, args)
        try:
            return self.call(*args, **kwargs)
        finally:
            self.after(self.module, args)

    def remove(self) -> None:
        """Call them no more; of several around one module, those that came last go first."""
        self.module.__dict__["_compiled_call_impl"] = self.call


def has_gradient_hooks(parameter: torch.nn.Parameter) -> bool:
    """Whether anything asks to see the parameter's gradient before or after it is added to `.grad`."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def arguments_of(operation: torch._ops.OpOverload) -> list[str]:
    """The names of an operation's arguments."""
    return [argument.name for argument in operation._schema.arguments]


def written_by(operation: torch._ops.OpOverload, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation writes into, among its arguments."""
    found: list[torch.Tensor] = []
    for number, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [t for t in (given if isinstance(given, (list, tuple)) else [given]) if t is not None]
    return found


def wrapping(kind: type[Tensor], inner: torch.Tensor) -> Tensor:
    """A tensor of a class of its own, laid out as another, without memory."""
    return torch.Tensor._make_wrapper_subclass(
        kind,
        inner.size(),
        strides=inner.stride(),
        storage_offset=inner.storage_offset(),
        dtype=inner.dtype,
        layout=inner.layout,
        device=inner.device,
    )


def share_memory(tensor: Tensor, other: torch.Tensor) -> Tensor:
    """The tensor, which counts as a view of another one's memory from now on."""
    torch._functionalize_unsafe_set(tensor, other)
    return tensor


def abandon_capture(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """End the capture under way on this stream, which has failed; what was captured is lost."""
    try:
        graph.capture_end()
    except RuntimeError:  # says once more that it failed, and leaves the allocator as in a capture
        _cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def profiler_is_on() -> bool:
    """Whether `torch.profiler` or one of torch.autograd's is at work, on whichever thread it was started."""
    return torch.autograd.profiler._is_profiler_enabled


def makes_nvtx_ranges() -> bool:
    """Whether this thread is inside `torch.autograd.profiler.emit_nvtx()`."""
    return _profiler_type() == ActiveProfilerType.NVTX


def timeout_of(group: Any, device: torch.device) -> timedelta:
    """How long a process group waits for another rank, where tensors are on such a device."""
    backend = group._get_backend(device)
    return backend.options._timeout


__all__ = [
    "CHECKPOINT_GENERATOR",
    "COMPILED_CALL",
    "PYTREE_NODES",
    "VMAP_CALLS",
    "AroundCompiled",
    "FakeTensor",
    "FakeTensorMode",
    "NormWithStatistics",
    "TorchDispatchMode",
    "WithoutFunctionModes",
    "abandon_capture",
    "aliased",
    "arguments_of",
    "base_of",
    "buffers_of",
    "children_of",
    "compile_like",
    "compiler",
    "functorch_active",
    "functorch_vmap",
    "goes_on_to",
    "has_backward_hooks",
    "has_gradient_hooks",
    "hooks_of",
    "in_backward",
    "is_compiled",
    "is_compiled_in_place",
    "is_persistent",
    "makes_nvtx_ranges",
    "memory_of",
    "no_view",
    "parameters_of",
    "plain_torch_function",
    "profiler_is_on",
    "run_backward",
    "saved_elsewhere",
    "sequence_number",
    "shallow_copy",
    "share_memory",
    "shared_attributes",
    "storage_of",
    "timeout_of",
    "version_of",
    "without_function_mode",
    "wrapping",
    "written_by",
]
