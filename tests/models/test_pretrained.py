"""Weights to start from: what fits is taken, and what was not is said."""

from __future__ import annotations

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
        "model.init_from: 2 of the model's 5 tensors were taken; without the prefix 'backbone.'; another shape: "
        "head.weight, head.bias; not in the file: scale; not in the model: backbone.neck.weight"
    )
    with pytest.raises(InputError, match=r"2 of the model's 5 .*expected all of both \(model.init_strict\)"):
        load_weights(module, path, strict=True)
    with pytest.raises(
        InputError, match=r"none of the 5 tensors of .* fits the model. The file has backbone.body"
    ):
        load_weights(module, path, prefix="encoder.")


class Payload:
    def __reduce__(self) -> Any:
        return print, ("code of a stranger",)


def test_files_that_need_code_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "start.pt"
    torch.save({"body.weight": Payload()}, path)
    with pytest.raises(
        InputError, match=r"cannot be read without running code .*: save model.state_dict\(\)"
    ):
        load_weights(Net(), str(path))
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match=r"cannot be read without running code"):
        load_weights(Net(), str(path))
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.safetensors", None, "expected an existing file or run folder"),
        ("bad.safetensors", b"not safetensors", "is not a readable safetensors file"),
        ("bad.pt", b"", "cannot be read without running code"),
        ("list.pt", [1], "holds a list, expected a dict of tensors"),
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
