"""Models built on the meta device: first values, values from files, and what has neither."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipework
from pipework import InputError, Pipe, Runner
from tests.gloo import GlooPool
from tests.models import WIDTH, numbers
from tests.run.pipes import equal, gradients, piped, runner_of, unsplit

safetensors = pytest.importorskip("safetensors.torch")

X, Y = numbers(8, WIDTH, seed=5), numbers(8, WIDTH, seed=6)


class Scale(nn.Module):
    """A buffer that is not saved, and that only the module itself knows how to make."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("powers", torch.empty(WIDTH), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.powers = 0.9 ** torch.arange(WIDTH, device=self.powers.device)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.powers


class Net(nn.Module):
    """Of everything some: a tied weight, an RNN, buffers of both kinds, and two parameters that the trunk reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(WIDTH))
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = Scale()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.recurrent = nn.GRU(WIDTH, WIDTH)
        self.last = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        nn.init.normal_(self.first)
        nn.init.normal_(self.last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x + self.first)
        x = self.norm(self.scale(x))
        x = self.recurrent(x)[0] * self.last
        return self.head(x)


CUTS = {2: ("recurrent",), 4: ("scale", "recurrent", "head")}
OWN = {  # of 2 ranks
    0: {"first", "embed.weight", "norm.weight", "norm.bias"},
    1: {
        "last",
        "embed.weight",
        "head.bias",
        *(f"recurrent.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")),
    },
}


def net(device: str = "cpu") -> Net:
    with torch.device(device):
        return Net()


def filled() -> Net:
    """Weights that no initialisation gives."""
    model = net()
    with torch.no_grad():
        for number, tensor in enumerate((*model.parameters(), model.norm.get_buffer("running_mean"))):
            tensor.copy_(numbers(*tensor.shape, seed=40 + number) * 0.4)
    return model


def pipe_of(model: nn.Module, stages: int = 2) -> Pipe:
    return piped(model, *CUTS[stages])


def on_meta(stages: int = 2, group: dist.ProcessGroup | None = None) -> Runner:
    ranks = stages if group is None else dist.get_world_size(group)
    return runner_of(pipe_of(net("meta"), stages), ranks, group=group)


def saved(model: nn.Module, folder: Path, files: int = 1) -> Path:
    """What `save_pretrained` leaves: one file, or several with an index; a tied weight by its first name."""
    tensors = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
    if files == 1:
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder
    weights = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        own = dict(list(tensors.items())[number::files])
        safetensors.save_file(own, folder / file)
        weights |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    return folder


def state(runner: Runner) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*runner.named_parameters(), *runner.named_buffers())}


def trained(runner: Runner) -> dict[str, Any]:
    """The loss and all gradients and buffers of one step."""
    loss = runner.step(X, target=Y)
    return {"loss": loss, **{n: p.grad for n, p in runner.named_parameters()}, **dict(runner.named_buffers())}


def trained_unsplit(model: nn.Module) -> dict[str, Any]:
    return {"loss": unsplit(model, X, Y, 4), **gradients(model), **dict(model.named_buffers())}


# ---------------------------------------------------------------------- first values


def initialized_on(
    group: dist.ProcessGroup, rank: int, stages: int
) -> tuple[dict[str, Tensor], dict[str, Any], set[str]]:
    runner = on_meta(stages, group)
    runner.initialize(seed=7)
    first = state(runner)
    real = {name for name, p in runner.pipe.model.named_parameters() if not p.is_meta}
    return first, trained(runner), real


def test_first_values_are_the_same_whatever_the_cut_and_the_ranks(gloo_pool: GlooPool) -> None:
    two, four, whole = on_meta(2), on_meta(4), net()
    for runner in (two, four):
        runner.initialize(seed=7)
    expected = state(two)
    assert set(expected) == {name for name, _ in (*whole.named_parameters(), *whole.named_buffers())}
    assert equal(state(four), expected)
    assert not equal(state_after(8), expected)
    whole.load_state_dict(two.state_dict())
    step = trained_unsplit(whole)
    assert equal(trained(two), step)
    assert equal(trained(four), step)
    for stages in (2, 4):
        told = gloo_pool.run(initialized_on, stages)
        assert equal(told[0][0] | told[1][0], expected)
        assert all(torch.equal(step[name], value) for _, found, _ in told for name, value in found.items())
        if stages == 2:
            assert {0: told[0][2], 1: told[1][2]} == OWN


def state_after(seed: int) -> dict[str, Tensor]:
    runner = on_meta()
    runner.initialize(seed=seed)
    return state(runner)


def test_the_seed_is_the_runners_and_the_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    runner = on_meta()
    generator = torch.get_rng_state()
    runner.initialize()
    assert torch.equal(torch.get_rng_state(), generator)
    assert equal(state(runner), state_after(runner.seed))


def test_a_function_fills_in_one_module_at_a_time() -> None:
    met: list[str] = []

    def fill(module: nn.Module) -> None:
        met.append(type(module).__name__)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.fill_(0.5)

    runner = on_meta()
    runner.initialize(fill)
    assert sorted(met) == ["BatchNorm1d", "GRU", "Linear", "Linear", "Net", "Scale"]
    assert all((tensor == (0.5 if tensor.is_floating_point() else 0)).all() for tensor in state(runner).values())


def test_a_model_with_values_gets_the_same_ones_in_place() -> None:
    model = net()
    owners = dict(model.named_parameters())
    runner = runner_of(pipe_of(model))
    runner.initialize(seed=7)
    assert equal(state(runner), state_after(7))
    assert all(p is owners[name] for name, p in runner.named_parameters())


# ---------------------------------------------------------------------- from files


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_step_equals_that_of_the_model_that_was_saved(tmp_path: Path, files: int, stages: int) -> None:
    model = filled()
    runner = on_meta(stages)
    runner.load(saved(model, tmp_path, files))
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    assert equal(state(runner), expected)
    assert len(dict(runner.pipe.model.named_parameters())) == len(dict(model.named_parameters()))  # tied as before
    assert equal(trained(runner), trained_unsplit(model))


def loaded_on(group: dist.ProcessGroup, rank: int, path: Path) -> tuple[dict[str, Any], list[str], set[str]]:
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.safe_open", watched(read))
        runner = on_meta(2, group)
        runner.load(path)
    return trained(runner), read, {name for name, p in runner.pipe.model.named_parameters() if not p.is_meta}


def watched(read: list[str]) -> Callable[..., Any]:
    """`safe_open` that notes which tensors are read."""
    from safetensors import safe_open

    class Reader:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    return Reader


def test_a_process_reads_its_own_tensors_only(gloo_pool: GlooPool, tmp_path: Path) -> None:
    model = filled()
    path = saved(model, tmp_path, 3)
    step = trained_unsplit(model)
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for rank, (found, read, real) in enumerate(gloo_pool.run(loaded_on, path)):
        assert sorted(read) == sorted(OWN[rank] | (buffers if rank == 0 else set()))
        assert real == OWN[rank]
        assert all(torch.equal(step[name], value) for name, value in found.items())


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_weight_is_found_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    model, runner = filled(), on_meta()
    tensors = {n: t for n, t in model.state_dict().items() if n not in ("embed.weight", "head.weight")}
    safetensors.save_file(tensors | {name: model.embed.weight}, tmp_path / "any.safetensors")
    runner.load(tmp_path / "any.safetensors")
    assert torch.equal(runner.pipe.model.get_parameter("head.weight"), model.embed.weight)


def test_values_are_read_into_the_tensors_that_a_model_has(tmp_path: Path) -> None:
    model, target = filled(), net()
    owners = dict(target.named_parameters())
    runner = runner_of(pipe_of(target))
    runner.load(saved(model, tmp_path))
    assert equal(target.state_dict(), model.state_dict())
    assert all(p is owners[name] for name, p in runner.named_parameters())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_file_unless_said(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model, runner = filled().double(), on_meta()
    model.scale.float()
    runner.load(saved(model, tmp_path), dtype=dtype)
    wanted = dtype or torch.float64
    assert {p.dtype for p in runner.parameters()} == {wanted}
    assert runner.pipe.model.get_buffer("scale.powers").dtype == torch.float32
    assert runner.pipe.model.get_buffer("norm.num_batches_tracked").dtype == torch.int64
    reference = model.to(wanted)
    reference.scale.float()
    loss = runner.step(X.to(wanted), target=Y.to(wanted))
    assert torch.equal(loss, unsplit(reference, X.to(wanted), Y.to(wanted), 4))


def dtypes_on(group: dist.ProcessGroup, rank: int, path: Path) -> tuple[Tensor, set[torch.dtype]]:
    runner = on_meta(2, group)
    runner.load(path)
    return runner.step(X.double(), target=Y.double()), {p.dtype for p in runner.pipe.model.parameters()}


def test_a_dtype_is_known_to_the_processes_that_do_not_read_it(gloo_pool: GlooPool, tmp_path: Path) -> None:
    model = filled().double()
    model.scale.float()
    path = saved(model, tmp_path, 3)
    loss = unsplit(model, X.double(), Y.double(), 4)
    for found, dtypes in gloo_pool.run(dtypes_on, path):
        assert torch.equal(found, loss)
        assert dtypes == {torch.float64}


# ---------------------------------------------------------------------- what does not fit


def spoiled(folder: Path, spoil: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = {name: t for name, t in filled().state_dict().items() if name != "head.weight"}
    spoil(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def test_names_that_do_not_fit_are_named_with_the_nearest(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["norm.wieght"] = tensors.pop("norm.weight")
        tensors["head.bias"] = torch.zeros(3)

    runner = on_meta()
    with pytest.raises(InputError) as error:
        runner.load(spoiled(tmp_path, rename))
    assert error.value.why == (
        "not stored: 'norm.weight'; nearest existing: norm.wieght; "
        "not in the model: 'norm.wieght'; nearest existing: norm.weight; "
        "of another shape: 'head.bias' is (3,), in the model (8,)"
    )
    assert all(p.is_meta for p in runner.parameters())


def test_names_too_many_are_passed_over_on_request(tmp_path: Path) -> None:
    path = spoiled(tmp_path, lambda tensors: tensors.update(other=torch.zeros(2)))
    with pytest.raises(InputError, match="not in the model: 'other'"):
        on_meta().load(path)
    on_meta().load(path, strict=False)


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = on_meta()
    with pytest.raises(InputError, match="it has neither"):
        runner.load(tmp_path)
    with pytest.raises(InputError, match="there is no such file"):
        runner.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"no header here")
    with pytest.raises(InputError, match=r"a\.safetensors' could not be read"):
        runner.load(tmp_path / "a.safetensors")
    path = saved(filled(), tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors' could not be read"):
        runner.load(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"pip install 'pipework\[hf\]'"):
        runner.load(path)


# ---------------------------------------------------------------------- what no file holds


class Plain(nn.Module):
    """As `Scale`, but without a word on how its tensors are made."""

    def __init__(self, attribute: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        if attribute:
            self.offset = torch.ones(WIDTH)
        else:
            self.register_buffer("offset", torch.ones(WIDTH), persistent=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.offset


def plain(device: str, attribute: bool = False) -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(Plain(attribute), nn.Linear(WIDTH, WIDTH))


def plain_runner(attribute: bool = False) -> Runner:
    return runner_of(piped(plain("meta", attribute), "1"))


def make(module: nn.Module) -> None:
    if isinstance(module, Plain):
        module.offset = torch.full((WIDTH,), 2.0)
        if "steps" in dict(module.named_buffers()):
            module.get_buffer("steps").zero_()


def half(module: nn.Module) -> None:
    if isinstance(module, Plain):
        module.offset = torch.zeros(WIDTH)


def nothing(module: nn.Module) -> None:
    pass


@pytest.mark.parametrize("attribute", [False, True])
def test_what_no_file_holds_must_be_filled_in(tmp_path: Path, attribute: bool) -> None:
    model = plain("cpu", attribute)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    runner = plain_runner(attribute)
    with pytest.raises(InputError, match=r"values of '0.offset'.* are") as error:
        runner.load(tmp_path)
    assert "initialize=" in error.value.remedy
    with pytest.raises(InputError, match=r"'0.offset' has no values"):
        runner.load(tmp_path, initialize=nothing)
    assert all(p.is_meta for p in runner.parameters()) or attribute
    if not attribute:
        with pytest.raises(InputError, match=r"'0.steps' has no values"):
            runner.load(tmp_path, initialize=half)
    runner = plain_runner(attribute)
    runner.load(tmp_path, initialize=make)
    make(model[0])
    assert torch.equal(runner.step(X, target=Y), unsplit(model, X, Y, 4))
    assert equal(gradients(runner.pipe.model), gradients(model))


def test_what_initialize_raises_is_told_with_the_module() -> None:
    def fail(module: nn.Module) -> None:
        raise KeyError("no such thing")

    with pytest.raises(
        InputError, match=r"initialize failed on the module '0' \(Plain\)|'0.linear' \(Linear\)"
    ) as error:
        plain_runner().initialize(fail)
    assert "no such thing" in error.value.why


def refused_on(group: dist.ProcessGroup, rank: int) -> str:
    runner = on_meta(2, group)
    with pytest.raises(InputError) as error:
        runner.initialize(lambda module: nothing(module) if isinstance(module, nn.GRU) else reset(module))
    return str(error.value)


def reset(module: nn.Module) -> None:
    module.reset_parameters()  # type: ignore[operator]


def test_a_refusal_of_one_process_is_told_by_all(gloo_pool: GlooPool) -> None:
    first, second = gloo_pool.run(refused_on)
    assert "recurrent.weight_ih_l0' has no values" in first
    assert "rank 1" in first
    assert "recurrent.weight_ih_l0' has no values" in second


# ---------------------------------------------------------------------- transformers


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        **sizes,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",  # the default takes another path when it is called on fake tensors
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    ids = torch.arange(24).view(4, 6) + 3
    pipe = pipework.pipeline(twin, (), {"input_ids": ids[:1], "labels": ids[:1]}, stages=2)
    runner = runner_of(pipe, loss=None)
    with pytest.raises(InputError, match=r"values of 'model.rotary_emb.inv_freq' are"):
        runner.load(tmp_path)
    runner.load(tmp_path, initialize=twin._init_weights)
    reference = copy.deepcopy(model)
    losses = []
    for row in ids.split(1):
        loss = reference(input_ids=row, labels=row).loss
        (loss / 4).backward()
        losses.append(loss.detach())
    assert torch.equal(runner.step(input_ids=ids, labels=ids), torch.stack(losses).sum() / 4)
    assert equal(gradients(twin), gradients(reference))
    runner.initialize(twin._init_weights, seed=1)
    assert all(torch.isfinite(p).all() for p in runner.parameters())
