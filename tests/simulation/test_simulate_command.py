"""`distmeta simulate`: its answers, the input it refuses, and its measurements."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import REPOSITORY, tree
from costs_by_hand import JOB, MACHINE

from distmeta.cli import main as cli
from distmeta.config.job import Job
from distmeta.simulation import calibrate, transfers
from distmeta.simulation.comparison import fingerprint_job
from distmeta.simulation.costs import MeasuredCosts, load_costs, save_costs
from distmeta.simulation.settings import STRATEGIES


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path) -> Any:
    """Run `distmeta simulate job.yaml` in this process. The file costs.json has costs of the job and a machine."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("job.yaml").write_text(yaml.safe_dump(tree()))
    jobs = {fingerprint_job(Job.load("job.yaml")): JOB}
    save_costs(MeasuredCosts(MACHINE, jobs, {"date": "then", "machine": "this"}), Path("costs.json"))

    def command(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["distmeta", "simulate", "job.yaml", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Answer(stop.value.code, *capsys.readouterr())

    return command


def test_output_shows_a_table_and_its_assumptions(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = simulate("--workers", "8,64", "--stragglers", "lognormal:0.3", "--failures-per-hour", "2")
    assert (found.code, found.err) == (0, "")
    for text in (
        "small: 1,000,000 parameters, 8 tasks per step in 8 shards",
        "measured on this, then",
        "link: 10Gbit in each direction",
        "100 us per message",
        "lognormal:0.3, drawn for each shard",
        "failures: 2 processes per hour",
        "56 workers idle",
    ):
        assert text in found.out, text
    rows = [line for line in found.out.splitlines() if re.match(r" +(8|64) +[a-z-]+ ", line)]
    assert [line.split()[1] for line in rows] == 2 * list(STRATEGIES)
    assert sum("←" in line for line in rows) == 2
    assert simulate("--workers", "64", "--scale-tasks").out.count("64 workers: ") == 1


def test_strategy_options_of_the_job_are_used(simulate: Any) -> None:
    """They apply if the job has that strategy. An option of the command line overrides them."""
    job = ("strategy.type=local", "strategy.replicas=2", "strategy.local_steps=5", "--workers", "2", "--json")
    assert any("5 steps between averages" in line for line in json.loads(simulate(*job).out)["assumptions"])
    asked = json.loads(simulate(*job, "--local-steps", "7", "--servers", "3").out)["assumptions"]
    assert any("7 steps between averages" in line for line in asked)
    assert any("sharded: 3 servers" in line for line in asked)
    assert any("more than 2 steps old" in line for line in asked)  # the default of strategy.max_staleness


def test_json_and_plot(simulate: Any) -> None:
    found = simulate("--workers", "8,2,8", "--strategies", "local,driver", "--json", "--plot", "p.png")
    assert (found.code, found.out.count("\n")) == (0, 1)
    answer = json.loads(found.out, parse_constant=lambda name: pytest.fail(name))
    assert set(answer["recommended"]) == {"2", "8"}
    rows = answer["outcomes"]
    assert [(row["workers"], row["strategy"]) for row in rows] == [
        (2, "driver"), (2, "local"), (8, "driver"), (8, "local")
    ]  # fmt: skip
    assert all(row["seconds_step"] > 0 and 0 < row["efficiency"] <= 1 for row in rows)
    assert len(answer["assumptions"]) > 5
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert simulate("--workers", "2,8", "--strategies", "driver,local", "--json").out == found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--link", "10Gb"), "--link: got '10Gb', expected a rate above 0 such as 10Gbit or 100Mbit, or local"),
        (("--link", "0bit"), "--link: got '0bit', expected a rate above 0"),
        (("--latency", "100"), "--latency: got '100', expected a time such as 100us"),
        (("--workers", "8,-1"), "--workers: got '8,-1', expected numbers from 1 to 10,000"),
        (("--workers", "8,99999999999"), "--workers: got "),
        (("--stragglers", "lognormal"), "--stragglers: got 'lognormal', expected none or lognormal:SIGMA"),
        (("--stragglers", "lognormal:9"), "--stragglers: got 'lognormal:9', expected none or"),
        (("--strategies", "drvier"), "--strategies: got 'drvier', expected some of driver,sharded"),
        (("--failures-per-hour", "-1"), "--failures-per-hour: got -1.0, expected a number from 0"),
        (("--failures-per-hour", "nan"), "--failures-per-hour: got nan"),
        (("--servers", "0"), "--servers: got 0, expected a number from 1 to 256"),
        (("--local-steps", "0"), "--local-steps: got 0"),
        (("--max-staleness", "-1"), "--max-staleness: got -1"),
        (("--workers-per-node", "0"), "--workers-per-node: got 0"),
        (("--servers", "x"), "'--servers'"),
        (("--costs", "nowhere.json"), "--costs: nowhere.json does not exist, expected a file of measured costs"),
        (("--costs", "job.yaml"), "--costs: job.yaml is not JSON"),
        (("--workers", "2", "--plot", "no/where.png"), "--plot: got 'no/where.png', which cannot be written"),
        (("--workers", "2", "--plot", "a.nothing"), "--plot: got 'a.nothing'"),
        (("run.stps=3",), "run.stps: unknown key"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(simulate: Any, arguments: tuple[str, ...], message: str) -> None:
    found = simulate(*arguments)
    assert (found.code, found.out) == (2, "")
    assert len(found.err.splitlines()) == 1
    assert message in found.err
    answer = simulate(*arguments, "--json")
    assert answer.code == 2
    assert message in json.loads(answer.out)["error"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 0),
        ("machine", {}),
        ("machine", None),
        ("machine.call", -1.0),
        ("machine.put", {"points": []}),
    ],
)
def test_damaged_costs_are_refused(simulate: Any, key: str, value: Any) -> None:
    costs = json.loads(Path("costs.json").read_text())
    *path, last = key.split(".")
    place = costs[path[0]] if path else costs
    place[last] = value
    Path("costs.json").write_text(json.dumps(costs))
    found = simulate("--workers", "2")
    assert found.code == 2
    assert re.fullmatch(r"error: --costs: costs\.json.*--calibrate writes a new one\n", found.err)


def test_help_imports_nothing_large(tmp_path: Path) -> None:
    program = (
        "import sys; from distmeta.cli import main as cli; sys.argv = ['distmeta', 'simulate', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'ray', 'simpy', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 set()"


def test_job_without_costs_is_measured_once(simulate: Any) -> None:
    """In this process and without Ray."""
    found = simulate("--workers", "2", "--link", "local", "model.hidden=[24]", "--json")
    assert found.code == 0
    assert "costs.json has no costs of this job" in found.err
    answer = json.loads(found.out)
    assert answer["parameters"] == 24 + 24 + 24 + 1
    assert simulate("--workers", "2", "--link", "local", "model.hidden=[24]", "--json") == (0, found.out, "")
    assert len(load_costs(Path("costs.json")).jobs) == 2


@pytest.mark.slow
def test_calibration(
    simulate: Any, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cost of this machine is measured, and later simulations use the file."""
    monkeypatch.setattr(calibrate, "MAX_WORKERS", 1)
    monkeypatch.setattr(calibrate, "ROUNDS", 3)
    monkeypatch.setattr(calibrate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(transfers, "ROUNDS", 2)
    monkeypatch.setattr(transfers, "SIZES", (4_000, 1_000_000))
    found = simulate("--workers", "1", "--link", "local", "--calibrate", "--costs", "new.json", "--json")
    assert found.code == 0, found.err
    measured = load_costs(Path("new.json"))
    machine = measured.machine
    (job_costs,) = measured.jobs.values()
    assert job_costs.parameters == 321
    assert job_costs.shards == 4
    seconds = [
        job_costs.compute_seconds(2),
        job_costs.outer,
        machine.put(1e6),
        machine.ring(1e6),
        machine.start,
        machine.slowdown[0],
    ]
    assert all(0 < value < math.inf for value in seconds)
    # differences of two measured times, which may be 0 on a busy machine
    assert 0 <= machine.call_driver <= machine.call < math.inf
    assert 0 <= machine.message_driver <= machine.message < math.inf
    assert simulate("--workers", "1", "--link", "local", "--costs", "new.json", "--json").out == found.out


def test_without_simpy_the_extra_is_named(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)  # as if it were not installed
    found = simulate("--workers", "2")
    assert (found.code, found.out) == (2, "")
    expected = "distmeta simulate needs simpy, which is not installed: pip install 'distmeta[simulate]'"
    assert found.err == f"error: {expected}\n"
    assert json.loads(simulate("--workers", "2", "--json").out) == {"error": expected}
