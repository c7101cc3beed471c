"""The figures of the paper, and the command that makes the runs of one and shows what came out."""

import argparse
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from sb3_off2on.reproduce import analyses
from sb3_off2on.reproduce.analyses import Curves, Run, TaskInfo
from sb3_off2on.reproduce.runs import algorithm_class, run_all
from sb3_off2on.reproduce.systems import SYSTEMS, Job, Task, make_jobs


class Figure(NamedTuple):
    """
    A figure of the paper.

    :param systems: what is compared, of ``SYSTEMS``
    :param claim: what the paper says that it shows
    :param analysis: what of a run it shows
    :param label: of the values, with unit
    """

    systems: tuple[str, ...]
    claim: str
    analysis: Callable[[Run], Curves] = analyses.learning_curve
    label: str = "return"


_OFFLINE_SHARE = Figure(
    ("off2on",),
    "Balanced replay uses offline samples as long as they are relevant to the agent: on random data they soon become "
    "obsolete, on medium-expert data they are replayed throughout.",
    analyses.offline_share,
    "offline samples in the minibatches (%)",
)
_AUROC = Figure(
    ("off2on", "off2on_n1"),
    "The Q-ensemble tells seen actions from random ones better than a single agent's Q-function.",
    analyses.action_auroc,
    "AUROC (%)",
)
_REPLAY = Figure(
    ("off2on", "uniform", "online_only"),
    "Balanced replay improves fine-tuning; with uniform or only online samples it is slow and unstable, even in an ensemble.",
)
_ENSEMBLE = Figure(("off2on_n1", "off2on_n2", "off2on"), "The larger the ensemble, the better and more stable fine-tuning is.")
FIGURES = {
    "fig1a": Figure(
        ("off2on_n1",),
        "What an offline agent collects online is unlike the samples that it was trained on.",
        analyses.log_likelihoods,
        "log-likelihood of state and action (nats)",
    ),
    "fig1b": Figure(
        ("sac_ft", "online_only_n1"),
        "From online samples alone fine-tuning is unstable, from all samples uniformly it is slow.",
    ),
    "fig1c": Figure(
        ("off2on_n1", "fqe_init_n1"),
        "On medium-expert data, fine-tuning loses the good initial policy if Q was trained without pessimism; on random data "
        "there is little difference.",
    ),
    "fig3": Figure(
        ("off2on", "awac", "bcq_ft", "sac_ft", "sac"),
        "In most tasks the method outperforms AWAC, BCQ-ft, SAC-ft and SAC, in sample-efficiency and final performance.",
    ),
    "fig4a": _OFFLINE_SHARE,
    "fig4b": _AUROC,
    "fig4c": _REPLAY,
    "fig4d": _ENSEMBLE,
    "fig8": Figure(
        ("off2on", "cql_reg"), "CQL's term, kept in the online phase, prevents the agent from improving by online interaction."
    ),
    "fig9": _OFFLINE_SHARE,
    "fig10": _AUROC,
    "fig11": _REPLAY,
    "fig12": _ENSEMBLE,
    "fig13": Figure(
        ("off2on_long", "fqe_init_long"),
        "In the long run, pessimistic and neutral initialisation end alike, but for halfcheetah-random, where pessimism ends "
        "higher; without it, performance falls at first on medium and medium-expert data.",
    ),
    "fig14": Figure(("off2on", "other_ratio"), "The density ratio against all samples performs similarly in most setups."),
    "today": Figure(
        ("off2on", "cql_ft", "calql", "symmetric", "sac", "tqc", "crossq"),
        "Not in the paper: the method beside what one would compare it with today.",
    ),
}


def make_parser(prog: str) -> argparse.ArgumentParser:
    """
    :param prog: how the command is called
    :return: its parser
    """
    parser = argparse.ArgumentParser(prog, description="The paper's comparisons on any task, see docs/reproduction.md.")
    parser.add_argument("figure", choices=sorted(FIGURES), metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument(
        "--dataset",
        nargs="+",
        action="append",
        required=True,
        help="Minari id(s) or file(s), joined; give the option again for another task",
    )
    parser.add_argument("--env", help="environment to fine-tune in, that of the dataset by default")
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds (paper: 4)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each with one thread")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the paper's updates and steps")
    parser.add_argument("--out", type=Path, default=Path("logs/reproduce"), help="folder for runs and results")
    given = parser.add_argument_group("instead of what --scale gives, or of the published values")
    given.add_argument("--offline-steps", type=int, help="updates of the offline phase of every algorithm")
    given.add_argument("--online-steps", type=int, help="environment steps")
    given.add_argument("--eval-freq", type=int, help="environment steps between two evaluations")
    given.add_argument("--eval-episodes", type=int, default=10, help="episodes of an evaluation")
    given.add_argument("--ensemble-size", type=int, default=5, help="N of the systems that do not fix it")
    given.add_argument("--offline-batch-size", type=int, help="rows per member and offline update")
    given.add_argument("--cql-n-actions", type=int, help="sampled actions of CQL's term, each of three kinds")
    given.add_argument("--offline-bc-steps", type=int, help="first offline updates of CQL agents, in which actors imitate")
    given.add_argument("--batch-size", type=int, help="rows per online update of every algorithm")
    given.add_argument("--learning-rate", type=float, help="of Off2OnSAC's actor online (paper: 3e-4, 3e-5 or 5e-6)")
    given.add_argument("--ent-coef", help="of Off2OnSAC online: auto, or auto_0.1 to start at 0.1 instead of 1")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """
    :param args: of the command line
    :raises ValueError: if one is out of its range
    """
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    for name in ("scale", "learning_rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must be above 0, got {value}")
    # Learned, as that of the pretrained agents is: a fixed one has other parameters
    if args.ent_coef is not None and not re.fullmatch(r"auto(_(?=.*[1-9])\d*\.?\d+)?", args.ent_coef):
        raise ValueError(f"`--ent-coef` must be auto, or auto_ and a number above 0, got {args.ent_coef!r}")


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """
    :param args: of the command line
    :return: a task for each dataset
    :raises ValueError: if the runs of two of them would be in one folder
    """
    tasks = {}
    for sources in args.dataset:
        task = Task(tuple(sources), args.env)
        if task.dataset_name in tasks:
            raise ValueError(
                f"`--dataset {' '.join(sources)}` and another one would have their runs in one folder, {task.dataset_name!r}: "
                "give each dataset once, and files different names"
            )
        tasks[task.dataset_name] = task
    return list(tasks.values())


def main(argv: Sequence[str], prog: str = "sb3-off2on reproduce") -> None:
    """
    Make the runs of a figure that are not there yet, and write its table, plot and report.

    :param argv: arguments
    :param prog: how the command is called
    :raises ValueError: if an argument is wrong, or a folder holds runs with other settings
    :raises SystemExit: with status 1 if a run failed
    """
    args = make_parser(prog).parse_args(argv)
    check_arguments(args)
    figure = FIGURES[args.figure]
    tasks = make_tasks(args)
    # Everything is checked before the first hour of training
    for name in figure.systems:
        algorithm_class(SYSTEMS[name].algorithm)
    if figure.analysis is analyses.log_likelihoods:
        for task in tasks:
            analyses.state_action_pairs(task.dataset)
    planned: dict[Path, Job] = {}
    runs: dict[str, dict[str, list[Job]]] = {}
    for task in tasks:
        by_system = runs.setdefault(task.dataset_name, {})
        for name in figure.systems:
            for seed in range(args.seeds):
                jobs = list(make_jobs(args, task, SYSTEMS[name], name, seed))
                planned.update((job.folder, job) for job in jobs)
                by_system.setdefault(SYSTEMS[name].label, []).append(jobs[-1])
    todo: list[Job] = []
    for job in reversed(planned.values()):  # each comes after the one whose agents it starts with
        is_needed = "pretraining" not in job.settings or job.folder in {later.after for later in todo}
        if is_needed and not job.is_finished():
            todo.insert(0, job)
    print(f"{len(planned)} jobs in {args.out}, {len(planned) - len(todo)} of them done")
    try:
        failed = run_all(todo, args.jobs)
    except KeyboardInterrupt:
        sys.exit(f"{prog}: stopped; the same command goes on with what is missing")

    finished: analyses.Runs = {}
    for dataset, by_label in runs.items():
        for label, jobs in by_label.items():
            done = [Run(job.folder) for job in jobs if job.is_finished()]
            if done:
                finished.setdefault(dataset, {})[label] = done
    if finished:
        infos = {task.dataset_name: TaskInfo.of(task.dataset) for task in tasks}
        folder = args.out / args.figure
        write_results(folder, args, finished, infos, shlex.join([*prog.split(), *argv]), failed)
        print(f"{folder}: results.csv, {args.figure}.png, report.md")
    if failed:
        sys.exit(f"{prog}: error: {len(failed)} of {len(todo)} jobs failed: {', '.join(map(str, failed))}")


def write_results(
    folder: Path,
    args: argparse.Namespace,
    runs: analyses.Runs,
    infos: Mapping[str, TaskInfo],
    command: str,
    failed: Mapping[Path, str],
) -> None:
    """
    :param folder: where ``results.csv``, the plot and ``report.md`` go
    :param args: of the command line
    :param runs: those that are finished, by dataset and label of the system
    :param infos: what is known of each dataset
    :param command: that was given
    :param failed: errors by folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure = FIGURES[args.figure]
    results = analyses.tidy_results(runs, figure.analysis)
    results.to_csv(folder / "results.csv", index=False)
    is_histogram = figure.analysis is analyses.log_likelihoods
    plot = analyses.plot_histograms if is_histogram else analyses.plot_curves
    plot(results, figure.label, folder / f"{args.figure}.png")
    to_table = analyses.quantile_table if is_histogram else analyses.curve_table
    tables = [
        f"### {figure.label}: {dataset}\n\n{analyses.markdown_table(to_table(rows))}"
        for dataset, rows in results.groupby("dataset", sort=False)
    ]
    packages = ("sb3_off2on", "stable_baselines3", "torch", "gymnasium", "numpy")
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    one = next(iter(next(iter(runs.values())).values()))[0].record["settings"]
    lines = [
        f"# {args.figure}",
        f"The paper: {figure.claim}" if args.figure != "today" else figure.claim,
        f"![{args.figure}]({args.figure}.png)",
        "Curves: interquartile mean over the seeds; shades: its 95% interval by bootstrap. Returns: the same over all runs of "
        "a row; of several datasets together, of normalized scores, with a bootstrap that is stratified by dataset. Of less "
        "than four runs the interquartile mean is the mean. "
        f"Systems with an ensemble have N = {args.ensemble_size} where their name says no other.",
        *tables,
        "### Returns",
        analyses.markdown_table(analyses.summary(runs, infos)),
        f"Returns are means over {one['eval_episodes']} episodes. behaviour: of the dataset's episodes; offline: before the "
        f"first online step; dip: the lowest evaluation in the first {analyses.DIP_SHARE:.0%} of the online steps; final: the "
        f"mean of the last {analyses.N_FINAL} evaluations; normalized: by D4RL's reference scores (0 random, 100 expert).",
        f"```bash\n{command}\n```",
        "The settings of each run stand in the `run.json` of its folder.",
        f"Versions: {versions}.",
    ]
    if failed:
        lines.append("Failed, and not in the results: " + ", ".join(f"`{path}`" for path in failed) + ".")
    (folder / "report.md").write_text("\n\n".join(lines) + "\n")
