"""Weights to start from: what fits is taken, and what was not is said."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from safetensors.torch import save_file
from torch import Tensor, nn

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.pretrained import load_weights
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.reporter import SilentReporter


class Net(nn.Module):
    def __init__(self, in_shape: tuple[int, ...] = (1,), out_features: int = 1, width: int = 4):
        super().__init__()
        self.body = nn.Linear(in_shape[0], width)
        self.head = nn.Linear(width, out_features)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def make_state(prefix: str = "", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {prefix + name: value.clone() for name, value in Net(**options).state_dict().items()}


def write(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.backbone.net."])
def test_prefix_is_found(prefix: str, ending: str, tmp_path: Path) -> None:
    module = Net()
    path = write(tmp_path / f"start{ending}", make_state(prefix))
    fit = load_weights(module, path, strict=True)
    assert fit.prefix == prefix
    expected = make_state()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_checkpoint_of_a_training_script(key: str, tmp_path: Path) -> None:
    path = tmp_path / "start.pt"
    torch.save({key: make_state("module."), "epoch": 3, "optimizer": {}}, path)
    module = Net()
    load_weights(module, str(path), strict=True)
    assert torch.equal(module.body.weight, make_state()["body.weight"])


def test_another_head_and_unknown_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    state = make_state("backbone.", out_features=10) | {"backbone.neck.weight": torch.ones(3)}
    del state["backbone.scale"]
    path = write(tmp_path / "start.pt", state)
    module = Net()
    head = module.head.weight.clone()
    fit = load_weights(module, path)
    assert torch.equal(module.head.weight, head)
    assert torch.equal(module.body.weight, state["backbone.body.weight"])
    assert str(fit) == (
        "model.init_from: 2 of the model's 5 tensors were taken; without the prefix 'backbone.'; another shape or "
        "type: head.weight, head.bias; not in the file: scale; not in the model: backbone.neck.weight"
    )
    with pytest.raises(InputError, match=r"2 of the model's 5 .*expected all of both \(model.init_strict\)"):
        load_weights(module, path, strict=True)
    with pytest.raises(
        InputError, match=r"none of the 5 tensors of .* fits the model. The file has backbone.body"
    ):
        load_weights(module, path, prefix="encoder.")


class Tied(nn.Module):
    """One tensor with two names, and a buffer that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(4, 3)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(3), persistent=False)


@pytest.mark.parametrize("left_out", [[], ["head.weight"], ["embed.weight"]])
def test_tied_tensors_and_buffers_that_are_not_stored(left_out: list[str], tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in Tied().state_dict().items() if name not in left_out}
    module = Tied()
    fit = load_weights(module, write(tmp_path / "start.pt", state), strict=True)
    weight = state.get("embed.weight", state.get("head.weight"))
    assert torch.equal(module.head.weight, weight)
    assert module.head.weight is module.embed.weight
    assert str(fit) == "model.init_from: 2 of the model's 2 tensors were taken"


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
        self.out = nn.Linear(3, 1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_submodule(prefix: str, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in Wrapped().backbone.state_dict().items()}
    path = write(tmp_path / "start.safetensors", {prefix + name: value for name, value in state.items()})
    module = Wrapped()
    out = module.out.weight.clone()
    fit = load_weights(module, path)
    assert all(torch.equal(value, state[name]) for name, value in module.backbone.state_dict().items())
    assert torch.equal(module.out.weight, out)
    assert str(fit).endswith("with 'backbone.' before their names; not in the file: out.weight, out.bias")


def test_names_of_a_compiled_submodule(tmp_path: Path) -> None:
    state = Wrapped().state_dict()
    names = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in state.items()}
    module = Wrapped()
    load_weights(module, write(tmp_path / "start.pt", names), strict=True)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_sparse_tensors_are_taken_and_other_kinds_of_numbers_are_not(tmp_path: Path) -> None:
    state = make_state()
    module = Net()
    bias = module.body.bias.clone()
    changed = state | {
        "body.weight": state["body.weight"].to_sparse(),
        "body.bias": torch.ones(4, dtype=torch.int8),  # a quantised tensor without its scale
        "head.bias": state["head.bias"].to(torch.complex64),
    }
    fit = load_weights(module, write(tmp_path / "start.pt", changed))
    assert torch.equal(module.body.weight, state["body.weight"])
    assert torch.equal(module.body.bias, bias)
    assert fit.other_shape == ["body.bias", "head.bias"]


class Payload:
    def __reduce__(self) -> Any:
        return os.write, (1, b"code of a stranger")


def test_files_that_need_code_are_not_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "start.pt"
    torch.save({"body.weight": Payload()}, path)
    with pytest.raises(
        InputError,
        match=r"cannot be read without running code \(it needs posix.write\), .*: save model.state_dict\(\)",
    ):
        load_weights(Net(), str(path))
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match=r"cannot be read without running code"):
        load_weights(Net(), str(path))
    assert "stranger" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.safetensors", None, "expected an existing file or run folder"),
        ("bad.safetensors", b"not safetensors", "is not a readable safetensors file"),
        ("bad.pt", b"", "cannot be read without running code"),
        ("text.pt", b"hello", "cannot be read without running code"),
        ("list.pt", [1], "holds a list, expected a dict of tensors"),
        ("empty.pt", {"epoch": 3}, "has no tensors, expected a state_dict"),
    ],
)
def test_unreadable_files_are_one_line(name: str, content: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=rf"model.init_from: .*{expected}"):
        load_weights(Net(), str(path))
    with pytest.raises(InputError, match=r"got the folder .* expected a run folder"):
        load_weights(Net(), str(tmp_path))


class RecordingReporter(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def report(self, text: str) -> None:
        self.lines.append(text)


def test_run_starts_from_another_run_and_resumes_without_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = {"type": "test_pretrained:Net", "freeze": ["body.*"]}
    run = {"steps": 1, "eval_every": 0, "checkpoint_every": 1}
    first = distmeta.train(Job.parse(tree("maml", model=model, run=run))).run
    trained = checkpoints.load(first)
    reporter = RecordingReporter()
    start = tree("maml", seed=3, model=model | {"init_from": str(first)}, run=run)
    second = distmeta.train(Job.parse(start), reporter=reporter).run
    assert "model.init_from: 5 of the model's 5 tensors were taken" in reporter.lines
    begun = checkpoints.load(second / "checkpoints" / "step-00000000")
    assert torch.equal(begun.theta["model.head.weight"], trained.theta["model.head.weight"])
    assert torch.equal(begun.constants["body.weight"], trained.constants["body.weight"])
    first.rename(first.parent / "elsewhere")
    longer = Job.parse(start).replace(run={"steps": 2})
    assert distmeta.train(longer, resume=str(second)).step == 2
