"""`distmeta simulate`: what it takes, what it refuses, what it shows, what it measures."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import REPOSITORY, tree
from costs_by_hand import JOB, MACHINE
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.cli import main as cli
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.simulation import calibrate, transfers
from distmeta.simulation.cluster import STRATEGIES, Link, Stragglers, parse_latency, parse_workers
from distmeta.simulation.costs import Costs, Curve, load, save
from distmeta.simulation.study import key_of


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path) -> Any:
    """Runs `distmeta simulate job.yaml`, with costs of a job and a machine beside it, in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("job.yaml").write_text(yaml.safe_dump(tree()))
    save(
        Costs(MACHINE, {key_of(Job.load("job.yaml")): JOB}, {"date": "then", "machine": "this"}),
        Path("costs.json"),
    )

    def command(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["distmeta", "simulate", "job.yaml", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, *capsys.readouterr())

    return command


def test_a_table_with_its_assumptions(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = simulate("--workers", "8,64", "--stragglers", "lognormal:0.3", "--failures-per-hour", "2")
    assert (found.code, found.err) == (0, "")
    for text in (
        "small: 1,000,000 parameters, 8 tasks a step in 8 shards",
        "measured on this, then",
        "link: 10Gbit in each direction",
        "100 us for a message",
        "lognormal:0.3, drawn anew",
        "failures: 2 processes an hour",
        "56 workers idle",
    ):
        assert text in found.out, text
    rows = [line for line in found.out.splitlines() if re.match(r" +(8|64) +[a-z-]+ ", line)]
    assert [line.split()[1] for line in rows] == 2 * list(STRATEGIES)
    assert sum("←" in line for line in rows) == 2
    assert simulate("--workers", "64", "--scale-tasks").out.count("64 workers: ") == 1


def test_the_jobs_own_settings_hold(simulate: Any) -> None:
    """A strategy's keys, where the job is of that strategy; an option goes before them."""
    job = ("run.strategy=local", "run.replicas=2", "run.local_steps=5", "--workers", "2", "--json")
    assert any("5 steps between averages" in line for line in json.loads(simulate(*job).out)["assumptions"])
    asked = json.loads(simulate(*job, "--local-steps", "7", "--servers", "3").out)["assumptions"]
    assert any("7 steps between averages" in line for line in asked)
    assert any("sharded: 3 servers" in line for line in asked)
    assert any("more than 2 steps old" in line for line in asked)  # run.max_staleness' default


def test_a_line_of_json_and_a_plot(simulate: Any) -> None:
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
        (("--costs", "nowhere.json"), "--costs: nowhere.json is not there, expected a file of measured costs"),
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


def test_help_and_simulation_import_nothing_heavy(tmp_path: Path) -> None:
    """The model itself needs no torch but what reading a job does."""
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


def test_a_job_that_the_file_lacks_is_measured_here(simulate: Any) -> None:
    """In this process, without Ray, once."""
    found = simulate("--workers", "2", "--link", "local", "model.hidden=[24]", "--json")
    assert found.code == 0
    assert "costs.json has no costs of this job" in found.err
    answer = json.loads(found.out)
    assert answer["parameters"] == 24 + 24 + 24 + 1
    assert simulate("--workers", "2", "--link", "local", "model.hidden=[24]", "--json") == (0, found.out, "")
    assert len(load(Path("costs.json")).jobs) == 2


def test_calibration(
    simulate: Any, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measures this machine: every cost is there, and the file is used from then on."""
    monkeypatch.setattr(calibrate, "TOGETHER", 1)
    monkeypatch.setattr(calibrate, "ROUNDS", 3)
    monkeypatch.setattr(calibrate, "SECONDS", (0.0, 3.0))
    monkeypatch.setattr(transfers, "ROUNDS", 2)
    monkeypatch.setattr(transfers, "SIZES", (4_000, 1_000_000))
    found = simulate("--workers", "1", "--link", "local", "--calibrate", "--costs", "new.json", "--json")
    assert found.code == 0, found.err
    measured = load(Path("new.json"))
    machine, (own,) = measured.machine, measured.jobs.values()
    assert own.parameters == 321
    assert own.shards == 4
    measured_ones = [
        own.compute(2),
        own.outer,
        machine.put(1e6),
        machine.ring(1e6),
        machine.start,
        machine.slowdown[0],
    ]
    assert all(0 < seconds < math.inf for seconds in measured_ones)
    # what is left of a measured time when another is taken off: on a busy machine nothing
    assert 0 <= machine.call_driver <= machine.call < math.inf
    assert 0 <= machine.message_driver <= machine.message < math.inf
    assert simulate("--workers", "1", "--link", "local", "--costs", "new.json", "--json").out == found.out


@settings(deadline=None)
@given(
    st.floats(0.001, 1e6),
    st.sampled_from(["bit", "kbit", "Mbit", "Gbit", "Tbit"]),
    st.sampled_from(["", "/s"]),
)
def test_links(number: float, unit: str, ending: str) -> None:
    exponent = {"bit": 0, "kbit": 3, "Mbit": 6, "Gbit": 9, "Tbit": 12}[unit]
    link = Link.parse(f"{number:f}{unit}{ending}")
    assert link.bytes_per_second == pytest.approx(float(f"{number:f}") * 10**exponent / 8)
    again = Link.parse(str(replace(link, bytes_per_second=float(f"{link.bytes_per_second:.3g}"))))
    assert again.bytes_per_second == pytest.approx(link.bytes_per_second, rel=0.01)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_setting_or_an_input_error(text: str) -> None:
    for parse in (Link.parse, parse_latency, Stragglers.parse, parse_workers):
        try:
            value = parse(text)
        except InputError as error:
            assert str(error).startswith("--")  # noqa: PT017 - most texts are refused
        else:
            assert value is not None


@settings(deadline=None)
@given(st.floats(0, 1e5), st.sampled_from(["ns", "us", "µs", "ms", "s"]))
def test_latencies(number: float, unit: str) -> None:
    scale = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]
    assert parse_latency(f"{number:f}{unit}") == pytest.approx(float(f"{number:f}") * scale)


@settings(deadline=None)
@given(st.floats(0, 3))
def test_stragglers(sigma: float) -> None:
    assert Stragglers.parse(f"lognormal:{sigma:f}").sigma == float(f"{sigma:f}")
    assert Stragglers.parse("none") == Stragglers()


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6))
def test_workers(counts: list[int]) -> None:
    assert parse_workers(", ".join(map(str, counts))) == tuple(sorted(set(counts)))


def test_curves() -> None:
    curve = Curve(((10.0, 1.0), (20.0, 2.0), (40.0, 2.5)))
    assert [curve(size) for size in (10, 15, 30, 40, 80)] == pytest.approx([1.0, 1.5, 2.25, 2.5, 3.5])
    assert curve(0) == 0.0
    assert curve(-1e9) == 0.0  # never below
    assert Curve(((5.0, 3.0),))(1e9) == 3.0
    assert math.isclose(Curve(((0.0, 1.0), (1.0, 0.0)))(9.0), 0.0)
    with pytest.raises(ValueError, match="rising"):
        Curve(((2.0, 1.0), (1.0, 2.0)))
