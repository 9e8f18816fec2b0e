"""Hugging Face's networks and LoRA: against plain autograd, and on small networks from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree

import distmeta
from distmeta.compute.episodes import draw_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import apply_job_numerics, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.seeding import draw_uniforms, task_ids
from distmeta.trees import tree_map

pytest.importorskip("transformers")

BERT = {
    "model_type": "bert",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 8,
    "n_positions": 12,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}
NETWORKS = {
    "bert": ({"config": BERT, "pooling": "mean"}, ["query", "value"]),
    "gpt2": ({"config": GPT2, "pooling": "last"}, ["c_attn"]),
    "llama": ({"config": LLAMA, "pooling": "last"}, ["q_proj", "v_proj"]),
}
"""Options of a network, and the layers that get LoRA weights."""
LORA = {"lora": {"r": 2, "alpha": 4, "target_modules": ["query", "value"]}}
TASKS = {"type": "test_hf:TokenTasks"}


class TokenTasks:
    """Three classes of random token sequences, by their first token; the last three tokens are padding."""

    in_shape = (12,)
    out_features = 3

    def draw(self, split: str, ids: Any) -> Episode:
        numbers = torch.from_numpy(draw_uniforms(ids, 12 * 12)).float().view(len(ids), 12, 12)
        tokens = (8 * numbers).long()
        labels = tokens[..., 0] % 3
        mask = (torch.arange(12) < 9).long().expand_as(tokens)
        x = {"input_ids": tokens, "attention_mask": mask}
        support, query = (
            Batch({name: value[:, rows] for name, value in x.items()}, labels[:, rows])
            for rows in (slice(0, 6), slice(6, 12))
        )
        return Episode(support, query)

    def score(self, outputs: Any, batch: Any) -> Any:
        accuracy = (outputs.argmax(-1) == batch.y).float().mean()
        return torch.nn.functional.cross_entropy(outputs, batch.y), {"accuracy": accuracy}


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def build_job(algorithm: Any = "maml", run: dict[str, Any] | None = None, **model: Any) -> Job:
    settings = {"tasks_per_step": 2, "shards": 1, "eval_every": 1, "eval_tasks": 2} | (run or {})
    section = {"type": "hf", "config": BERT} | model
    return Job.parse(tree(algorithm, model=section, tasks=TASKS, run=settings))


def resolve_job(*arguments: Any, **options: Any) -> Any:
    problem = build_problem(build_job(*arguments, **options))
    with apply_job_numerics(problem.job, problem.device):
        return resolve(problem)


def test_theta_of_a_lora_network_is_lora_and_head() -> None:
    theta = resolve_job(peft=LORA).init()
    layer = "model.network.encoder.layer.0.attention.self"
    expected = {f"{layer}.{part}.lora_{m}.default.weight" for part in ("query", "value") for m in "AB"}
    assert set(theta) == expected | {"model.head.weight", "model.head.bias"}
    assert not theta[f"{layer}.query.lora_B.default.weight"].any()
    assert set(resolve_job(freeze_network=True).init()) == {"model.head.weight", "model.head.bias"}


@pytest.mark.parametrize(
    ("network", "adapt"),
    [("bert", "all"), ("bert", ["*lora*"]), ("bert", "head"), ("gpt2", ["*lora*"]), ("llama", ["*lora*"])],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_meta_gradient_through_lora_equals_plain_autograd(
    network: str, adapt: Any, dtype: torch.dtype, tolerance: float
) -> None:
    algorithm = {"type": "maml", "inner_lr": 0.1, "inner_steps": 2, "adapt": adapt}
    options, layers = NETWORKS[network]
    lora = {"lora": LORA["lora"] | {"target_modules": layers}}
    problem = build_problem(build_job(algorithm, peft=lora, **options))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    for name in theta:  # LoRA starts at zero, where half of the gradient is zero
        theta[name] = theta[name] + 0.1 * torch.randn(
            theta[name].shape, generator=torch.Generator().manual_seed(1), dtype=dtype
        )
    problem.model.to(dtype=dtype)
    ids = task_ids(0, "train", 0, 1)
    episodes = draw_episodes(problem.family, "train", ids)
    score = problem.family.score
    with apply_job_numerics(problem.job, problem.device):
        found = shard_gradient(problem.algorithm, score, theta, episodes, ids, Execution("loop", 1)).gradient
        support, query = (tree_map(lambda leaf: leaf[0], part) for part in episodes)
        start = {name: value.clone().requires_grad_() for name, value in theta.items()}
        phi = dict(start)
        adapted = problem.algorithm.names

        def compute_loss(parameters: Any, batch: Any) -> Any:
            values = {name.removeprefix("model."): value for name, value in parameters.items()}
            return score(torch.func.functional_call(problem.model.module, values, (batch.x,)), batch)[0]

        for _ in range(2):
            loss = compute_loss(phi, support)
            gradient = torch.autograd.grad(loss, [phi[name] for name in adapted], create_graph=True)
            phi |= {name: phi[name] - 0.1 * g for name, g in zip(adapted, gradient, strict=True)}
        expected = torch.autograd.grad(compute_loss(phi, query), list(start.values()))
    for (name, value), exact in zip(found.items(), expected, strict=True):
        assert float((value - exact).norm()) <= tolerance * float(exact.norm()), name


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_padding_has_no_influence(pooling: str) -> None:
    model = resolve_job(pooling=pooling, run={"eval_every": 0}).model.module.eval()
    tokens = torch.tensor([[1, 2, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = model({"input_ids": tokens, "attention_mask": mask})
        short = model({"input_ids": tokens[:, :3], "attention_mask": mask[:, :3]})
    torch.testing.assert_close(padded, short)


def test_tokens_and_features_have_their_shapes() -> None:
    x = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5)}
    problem = build_problem(build_job(task="token-classification"))
    assert problem.model.module(x).shape == (2, 5, 3)
    features = build_problem(build_job(task="features"))
    assert features.model.module(x).shape == (2, 8)
    assert features.model.head == ()


def test_two_workers_train_lora_to_the_same_bits(workplace: Path, cluster: None) -> None:
    adapted = {"type": "maml", "inner_lr": 0.1, "adapt": ["*lora*", "head.*"]}
    thetas = []
    for workers in (0, 2):
        job = build_job(adapted, run={"steps": 2, "shards": 2, "workers": workers}, peft=LORA)
        thetas.append(checkpoints.load(distmeta.train(job).run).theta)
    alone, together = thetas
    assert any("lora" in name for name in alone)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_lora_network_trains_resumes_and_is_used(workplace: Path) -> None:
    job = build_job(run={"steps": 1, "checkpoint_every": 1}, peft=LORA)
    run = distmeta.train(job).run
    assert distmeta.train(job.replace(run={"steps": 2}), resume=str(run)).step == 2
    learner = distmeta.load(run)
    support = learner.problem.example.support
    assert learner.adapt(support.x, support.y).predict(support.x).shape == (6,)
    assert np.isfinite(distmeta.evaluate(run, ["run.eval_tasks=2"]).figures["loss_after"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": None}, r"model.name: expected a name or a config"),
        ({"config": {"hidden_size": 8}}, r"model.config.model_type: missing"),
        ({"config": {"model_type": "brt"}}, r"model.config: Unrecognized model identifier: brt"),
        ({"config": None, "name": "./nowhere"}, r"model.name: got './nowhere', expected an existing folder"),
        (
            {"config": None, "name": "package:nowhere/model"},
            r"expected an installed package: pip install nowhere",
        ),
        ({"peft": {"lora": {"rank": 2}}}, r"model.peft.lora.rank: unknown key"),
        ({"peft": {"prompt": {}}}, r"model.peft: got .* expected \{lora"),
        ({"peft": {"lora": {"r": 2, "target_modules": ["qry"]}}}, r"model.peft.lora: Target modules .*qry"),
    ],
)
def test_bad_input_is_one_line(model: dict[str, Any], message: str, workplace: Path) -> None:
    with pytest.raises(InputError, match=message):
        build_problem(build_job(**model))
