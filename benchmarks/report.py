"""Rewrite the tables of benchmarks/README.md from the raw results in benchmarks/results/.

    python benchmarks/report.py            rewrite the tables
    python benchmarks/report.py --check    only say whether they are up to date; exit code 1 if not

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from raw_results import ROOT, Section, interval, load_study

REPORT = ROOT / "benchmarks" / "README.md"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
LARGE_MAP = 1_200_000
"""Elements of a feature map up to which `compute.execution: auto` vectorises convolutions on a CPU."""

Rows = list[list[str]]
Sections = Mapping[str, Section]


class Table(NamedTuple):
    """One table of the report: where its figures come from, its header, and how its rows are made."""

    study: str
    parts: tuple[str, ...]
    """The sections that the table shows; empty for all."""
    header: str
    """Column titles with | between them."""
    make_rows: Callable[[Sections], Rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    before = REPORT.read_text(encoding="utf-8")
    after = rewrite_tables(before)
    if given.check:
        sys.exit(
            0 if before == after else "the tables differ from the raw results: python benchmarks/report.py"
        )
    REPORT.write_text(after, encoding="utf-8")


def rewrite_tables(text: str) -> str:
    """Return the report with every table made again from the raw results."""
    return BLOCK.sub(lambda found: f"{found[1]}{format_table(TABLES[found[2]])}\n{found[3]}", text)


def format_table(table: Table) -> str:
    """Return one table as Markdown, below a line with command, date, commit and hardware of its measurements."""
    study = load_study(table.study)
    sections = {part: study[part] for part in table.parts or study}
    titles = table.header.split("|")
    lines = [describe_origin(sections.values()), "", f"|{'|'.join(titles)}|", "|" + "-|" * len(titles)]
    lines += [f"|{'|'.join(row)}|" for row in table.make_rows(sections)]
    return "\n".join(lines)


def describe_origin(sections: Iterable[Section]) -> str:
    """Return `command`, date and commit of each measurement, then the hardware. Paths of stores are left out."""
    origins: dict[str, None] = {}
    hardware: dict[str, None] = {}
    for section in sections:
        environment = section["environment"]
        command = re.sub(r" --(store|run|pretrained)[ =]\S+", "", environment["command"])
        day = environment["date"].split()[0]
        origins[f"`{command}`, {day}, commit {environment['commit']}"] = None
        hardware[environment["hardware"]] = None
    return f"{'; '.join(origins)} ({'; '.join(hardware)}):"


def percent(figure: Mapping[str, float], digits: int = 2) -> str:
    return f"{100 * figure['mean']:.{digits}f}±{100 * figure['ci95']:.{digits}f}"


def number(figure: Mapping[str, float], digits: int = 3) -> str:
    return f"{figure['mean']:.{digits}f}±{figure['ci95']:.{digits}f}"


def mean_interval(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of independent figures with its interval."""
    half_width = math.sqrt(sum(figure["ci95"] ** 2 for figure in figures)) / len(figures)
    return {"mean": statistics.fmean(figure["mean"] for figure in figures), "ci95": half_width}


def all_rows(sections: Sections) -> list[dict[str, Any]]:
    return [row for section in sections.values() for row in section["rows"]]


# --- What is learned ----------------------------------------------------------------------------------------------


def methods(sections: Sections) -> Rows:
    """Pool the seeds of each method. Sort by 1-shot accuracy."""
    costs = {row["method"]: row for row in sections["cost"]["rows"]}
    runs: dict[str, dict[int, list[Any]]] = {}
    for row in sections["accuracy"]["rows"]:
        runs.setdefault(row["method"], {1: [], 5: []})[row["shots"]].append(row)
    accuracies = {
        name: {shots: pool_seeds(part) for shots, part in found.items()} for name, found in runs.items()
    }
    rows = []
    for name in sorted(runs, key=lambda name: -accuracies[name][1]["mean"]):
        row = [name, percent(accuracies[name][1]), percent(accuracies[name][5])]
        one_shot = runs[name][1]
        if "steps" in one_shot[0]:
            row.append(str(round(statistics.median(run["steps"] for run in one_shot))))
            row.append(f"{statistics.median(run['seconds_per_step'] for run in one_shot):.2f}")
        else:
            row += ["", ""]
        row.append(str(max(run["peak_mb"] for run in one_shot)))
        cost = costs.get(name, {"times_maml": "", "extra_mb": ""})
        rows.append([*row, str(cost["times_maml"]), str(cost["extra_mb"])])
    return rows


def pool_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return interval(np.concatenate([np.array(run["correct_of_75"]) / 75 for run in runs]))


def omniglot(sections: Sections) -> Rows:
    keys = ("untrained", "distmeta", "peer", "difference")
    return [[str(row["seed"]), *(percent(row[key]) for key in keys)] for row in all_rows(sections)]


def digits(sections: Sections) -> Rows:
    keys = ("unadapted", "nearest_neighbour", "maml")
    rows = all_rows(sections)
    cells = [[", ".join(map(str, row["test_digits"])), *(percent(row[key]) for key in keys)] for row in rows]
    return [*cells, ["mean", *(percent(mean_interval([row[key] for row in rows])) for key in keys)]]


def sinusoid(sections: Sections) -> Rows:
    return [
        [row["system"], *(number(row["after_steps"][k]) for k in ("0", "1", "10"))]
        for row in all_rows(sections)
    ]


def domains(sections: Sections) -> Rows:
    keys = ("before", "nearest_neighbour", "without", "with", "gain")
    rows = []
    for part, section in sections.items():
        for row in section["rows"]:
            if row["query_domain"] != "original":
                rows.append(
                    [
                        row["query_domain"],
                        part.removeprefix("digits "),
                        *(percent(row[key], 1) for key in keys),
                    ]
                )
    return rows


def challenge(sections: Sections) -> Rows:
    keys = ("nearest_neighbour", "error")
    rows = sorted(all_rows(sections), key=lambda row: row["error"]["mean"])
    cells = [[row["alphabet"], *(percent(row[key], 1) for key in keys)] for row in rows]
    return [*cells, ["mean", *(percent(mean_interval([row[key] for row in rows]), 1) for key in keys)]]


def navigation(sections: Sections) -> Rows:
    rows = [row for row in all_rows(sections) if "less random" not in row["system"]]
    return [[row["system"], *(number(row["updates"][str(k)], 2) for k in range(4))] for row in rows]


def bandit(sections: Sections) -> Rows:
    return [[row["policy"], number(row["reward"], 1)] for row in all_rows(sections)]


def cheetah(sections: Sections) -> Rows:
    rows = []
    for row in all_rows(sections):
        middle, low, high = row["ratio"] or (1.0, 1.0, 1.0)
        rows.append(
            [row["loop"], f"{row['steps_per_second']:,.0f}", f"{middle:.2f}", f"{low:.2f}–{high:.2f}"]
        )
    return rows


def sweep_search(sections: Sections) -> Rows:
    rows = []
    for row in all_rows(sections):
        test = {"mean": row["test_loss_after"], "ci95": row["ci95"]}
        rows.append([row["rates"], f"{row['val_loss_after']:.2f}", number(test, 2)])
    return rows


def sweep_cost(sections: Sections) -> Rows:
    return [[f"{row['plain_seconds']:.0f}", f"{row['sweep_seconds']:.0f}"] for row in all_rows(sections)]


def strategies_accuracy(sections: Sections) -> Rows:
    (section,) = sections.values()
    by_case: dict[str, list[Any]] = {}
    for row in sorted(section["rows"], key=lambda row: row["seed"]):
        by_case.setdefault(row["case"], []).append(row)
    order = [
        case for case in ("driver", "int8", "async", "async-aware", "local", "local-int8") if case in by_case
    ]
    return [strategy_accuracy(case, by_case[case]) for case in order]


def strategy_accuracy(case: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    metric = "loss_after" if "loss_after" in rows[0] else "accuracy_after"
    scale, decimals = (1, 2) if metric == "loss_after" else (100, 1)
    seeds = [f"{scale * row[metric]:.{decimals}f}±{scale * row['ci95']:.{decimals}f}" for row in rows]
    tasks = [f"{row['tasks_to_goal']:,}" if row["tasks_to_goal"] else "never" for row in rows]
    mean = scale * statistics.fmean(row[metric] for row in rows)
    return [case, f"{mean:.{decimals}f}", "; ".join(seeds), "; ".join(tasks)]


def precision(sections: Sections) -> Rows:
    """Means over the seeds with intervals over the seeds, and the range of the differences of single seeds."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in all_rows(sections):
        groups.setdefault((row["study"], row["precision"]), []).append(row)
    rows = []
    for (study, kind), members in groups.items():
        show = percent if members[0]["metric"] == "accuracy" else number
        scale = 100 if members[0]["metric"] == "accuracy" else 1
        columns = [
            interval(np.array([row[key]["mean"] for row in members]))
            for key in ("float32", "other", "difference")
        ]
        single = [scale * row["difference"]["mean"] for row in members]
        apart = 100 * statistics.fmean(row["relative_distance_of_theta"] for row in members)
        seeds = str(len(members))
        span = f"{min(single):.3g} to {max(single):.3g}"
        rows.append([study, kind, seeds, *map(show, columns), span, f"{apart:.0f}"])
    return rows


# --- How fast, how much memory ------------------------------------------------------------------------------------


def throughput(sections: Sections) -> Rows:
    systems = dict.fromkeys(row["system"] for row in all_rows(sections))
    found = {part: {row["system"]: row for row in section["rows"]} for part, section in sections.items()}
    rows = []
    for system in systems:
        cells = [system]
        for part in sections:
            row = found[part].get(system)
            cells += ["", ""] if row is None else show_rate(row)
        rows.append(cells)
    return rows


def show_rate(row: Mapping[str, Any]) -> list[str]:
    rate = row["tasks_per_second"]
    decimals = 0 if rate >= 100 else 1
    return [f"{rate:,.{decimals}f}", f"{row['times_torchopt_gradient']:.2f}"]


def overheads(sections: Sections) -> Rows:
    rows = []
    for part, section in sections.items():
        found = {(row["kind"], row["way"]): row for row in section["rows"]}
        for way in dict.fromkeys(row["way"] for row in section["rows"]):
            cells = [part, way]
            for kind in ("step", "distribution"):
                low, high = found[kind, way]["middle_half"]
                cells.append(f"{found[kind, way]['ratio']:.2f} ({low:.2f}–{high:.2f})")
            rows.append(cells)
    return rows


def execution(sections: Sections) -> Rows:
    """The smallest and the largest ratio of each kind of model."""
    kinds = {
        "MLP": lambda row: row["model"].startswith("MLP"),
        f"convolutions to {LARGE_MAP / 1e6:g} M": lambda row: 0 < row["largest_feature_map"] <= LARGE_MAP,
        "larger convolutions": lambda row: row["largest_feature_map"] > LARGE_MAP,
    }
    rows = []
    for title, belongs in kinds.items():
        cells = [title]
        for tasks in (2, 4, 16):
            ratios = [row["ratio"] for row in all_rows(sections) if row["tasks"] == tasks and belongs(row)]
            cells.append(f"{min(ratios):.2f}–{max(ratios):.2f}")
        rows.append(cells)
    return rows


def memory(sections: Sections) -> Rows:
    times = {row["inner_steps"]: row["ratio"] for row in sections["times"]["rows"]}
    peaks: dict[int, dict[str, Any]] = {}
    for row in sections["peaks"]["rows"]:
        peaks.setdefault(row["inner_steps"], {})[row["differentiation"]] = row
    rows = []
    for steps, found in peaks.items():
        reverse = f"{found['reverse']['peak_mb']:.0f}" if "reverse" in found else ""
        ours = found["constant-memory"]
        ratio = f"{times[steps]:.2f}" if steps in times else ""
        rows.append([str(steps), reverse, f"{ours['peak_mb']:.0f}", f"{ours['phi_mb']:.0f}", ratio])
    return rows


def products(sections: Sections) -> Rows:
    ways = ("reverse over reverse, autograd", "reverse over reverse, vjp", "forward over reverse")
    found: dict[str, dict[str, Any]] = {}
    for row in all_rows(sections):
        found.setdefault(row["support_loss"], {})[row["way"]] = row
    rows = []
    for loss, by_way in found.items():
        cells = [
            f"{by_way[way]['ms']:.1f} ({by_way[way]['ratio']:.2f})" if way in by_way else "" for way in ways
        ]
        rows.append([loss, *cells])
    return rows


# --- Models and bilevel problems ---------------------------------------------------------------------------------


def texts(sections: Sections) -> Rows:
    rows = []
    for section in sections.values():
        tasks = str(section["settings"]["test_tasks"])
        for row in section["rows"]:
            rows.append([row["system"], tasks, percent(row["accuracy"], 1), percent(row["gain"], 1)])
    return rows


def texts_cost(sections: Sections) -> Rows:
    found: dict[str, list[str]] = {}
    for row in all_rows(sections):
        cells = found.setdefault(row["adapted"], [row["adapted"], f"{row['numbers_in_theta']:,}"])
        cells += [f"{row['seconds']:.2f} ({row['ratio']:.2f})", f"{row['extra_mb']:.0f}"]
    return list(found.values())


def bilevel(sections: Sections) -> Rows:
    return [
        [
            row["case"],
            f"{row['distance']:.0e}",
            f"{row['repaired']:.0e}",
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}",
        ]
        for row in all_rows(sections)
    ]


# --- Distribution -------------------------------------------------------------------------------------------------


def driver_steps(sections: Sections) -> Rows:
    found: dict[int, list[str]] = {}
    for row in all_rows(sections):
        cells = found.setdefault(row["parameters"], [f"{row['parameters']:,}"])
        cells += [f"{row['ours_ms']:.1f}", f"{row['by_hand_ms']:.1f}", f"{row['ratio']:.2f}"]
    return list(found.values())


def driver_sums(sections: Sections) -> Rows:
    found: dict[int, list[str]] = {}
    for row in all_rows(sections):
        cells = found.setdefault(row["parameters"], [f"{row['parameters']:,}"])
        cells.append(f"{row['tree_ms']:.1f} ({row['share']:.2f})")
    return list(found.values())


def strategies_steps(sections: Sections) -> Rows:
    found: dict[str, list[str]] = {}
    for row in all_rows(sections):
        cells = found.setdefault(row["strategy"], [row["strategy"]])
        cells.append(f"{row['step_ms']:.1f} ({row['ratio']:.2f})")
    return list(found.values())


def strategies_links(sections: Sections) -> Rows:
    rows = sorted(all_rows(sections), key=lambda row: -row["mbit"])
    driver = {row["mbit"]: row["step_s"] for row in rows if row["strategy"] == "driver"}
    cells = []
    for row in rows:
        gain = driver[row["mbit"]] / row["step_s"]
        cells.append(
            [
                f"{row['mbit']}",
                f"{row['parameters']:,}",
                row["strategy"],
                f"{row['step_s']:.2f}",
                f"{gain:.1f}",
            ]
        )
    return cells


def simulator(sections: Sections) -> Rows:
    found: dict[tuple[str, str], list[str]] = {}
    for row in all_rows(sections):
        cells = found.setdefault(
            (row["job"], row["strategy"]), [row["job"], f"{row['parameters']:,}", row["strategy"]]
        )
        milliseconds = f"{1e3 * row['predicted']:.0f}/{1e3 * row['measured']:.0f}"
        cells.append(f"{milliseconds} ({row['ratio']:.2f})")
    return list(found.values())


def soak(sections: Sections) -> Rows:
    return [
        [row["what"], f"{row['second_tenth']:.4g}", f"{row['last_tenth']:.4g}"] for row in all_rows(sections)
    ]


SYSTEMS = "25 sine tasks: tasks/s|× TorchOpt|256: tasks/s|× TorchOpt|16 conv4 tasks: tasks/s|× TorchOpt"
TABLES = {
    "methods": Table(
        "methods",
        ("accuracy", "cost"),
        "method|1-shot, %|5-shot, %|steps|s/step|peak MB|time/MAML|extra MB",
        methods,
    ),
    "omniglot": Table(
        "accuracy", ("omniglot",), "seed|untrained, %|distmeta, %|TorchOpt, %|paired difference", omniglot
    ),
    "digits": Table(
        "accuracy", ("digits",), "test digits|before adaptation, %|1-NN on pixels, %|MAML, %", digits
    ),
    "sinusoid": Table(
        "accuracy", ("sinusoid",), "squared error|before|after 1 step|after 10 steps", sinusoid
    ),
    "domains": Table(
        "domains",
        (),
        "query|digits|before adaptation, %|1-NN, %|trained without, %|trained with, %|gain, paired",
        domains,
    ),
    "challenge": Table("challenge", (), "alphabet|1-NN on pixels, %|error, %", challenge),
    "navigation": Table(
        "reinforcement", ("navigation",), "return|before|1 update|2 updates|3 updates", navigation
    ),
    "bandit": Table("reinforcement", ("bandit",), "policy|reward of 100 pulls", bandit),
    "cheetah": Table(
        "reinforcement", ("cheetah",), "loop|environment steps/s|ratio to plain|quartiles", cheetah
    ),
    "sweep-search": Table("sweep", ("search",), "rates|validation error|test error", sweep_search),
    "sweep-cost": Table("sweep", ("cost",), "plain script, s|sweep, s", sweep_cost),
    "throughput": Table("throughput", (), f"system|{SYSTEMS}", throughput),
    "overheads": Table("overheads", (), "workload|way|step / gradient|2 workers / 2 processes", overheads),
    "execution": Table("execution", (), "model|2 tasks|4 tasks|16 tasks", execution),
    "memory": Table(
        "memory",
        ("peaks", "times"),
        "inner steps|reverse, MB|constant memory, MB|+ stored φ, MB|time ratio",
        memory,
    ),
    "products": Table(
        "memory",
        ("products",),
        "ms (ratio to the first)|reverse over reverse, autograd|reverse over reverse, vjp|forward over reverse",
        products,
    ),
    "texts": Table(
        "texts",
        ("texts-lora", "texts-anil"),
        "system|test tasks|accuracy, %|gain over nearest centroid, paired",
        texts,
    ),
    "texts-cost": Table(
        "texts",
        ("cost",),
        "adapted|numbers in theta|second order, s (ratio)|MB|first order, s (ratio)|MB",
        texts_cost,
    ),
    "bilevel": Table("bilevel", (), "case|distance|with Betty repaired|outer step, s|time/Betty", bilevel),
    "driver-steps": Table(
        "driver",
        ("steps",),
        "parameters|vector at hand, ms|by hand, ms|ratio|gradient of zeros, ms|by hand, ms|ratio",
        driver_steps,
    ),
    "driver-sums": Table("driver", ("sums",), "parameters|2 shards, ms|8 shards|32 shards", driver_sums),
    "strategies-steps": Table(
        "strategies", ("steps",), "ms (ratio)|0.1 M|10 M|100 M parameters", strategies_steps
    ),
    "strategies-links": Table(
        "strategies", ("links",), "Mbit/s|parameters|strategy|s/step|× driver", strategies_links
    ),
    "strategies-sinusoid": Table(
        "strategies_accuracy",
        ("sinusoid",),
        "strategy|error|each seed|tasks to a loss of 2",
        strategies_accuracy,
    ),
    "strategies-digits": Table(
        "strategies_accuracy",
        ("digits",),
        "strategy|accuracy, %|each seed|tasks to a loss of 0.5",
        strategies_accuracy,
    ),
    "simulator": Table(
        "simulator", (), "job|parameters|strategy|1 worker, ms (ratio)|2 workers, ms (ratio)", simulator
    ),
    "soak": Table("soak", (), "what|second tenth|last tenth", soak),
    "precision": Table(
        "precision",
        (),
        "study|other|seeds|float32|other|difference|differences of single seeds|theta apart, %",
        precision,
    ),
}
"""The tables by the name in their marker."""


if __name__ == "__main__":
    main()
