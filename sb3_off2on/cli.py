"""The command line: RL Zoo's scripts with our algorithms, and a look at datasets."""

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import minari  # type: ignore[import-untyped]
import numpy as np
from gymnasium import spaces
from minari.storage import get_dataset_path  # type: ignore[import-untyped]
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sb3_off2on.datasets import D4RL_REFERENCE_SCORES, load_dataset, normalized_score
from sb3_off2on.envs import make_dataset

# Our command: RL Zoo's module, its function (None where the module itself is the script), and what it does
ZOO_SCRIPTS = {
    "train": ("rl_zoo3.train", "train", "train offline and then online, or search hyperparameters (-optimize)"),
    "enjoy": ("rl_zoo3.enjoy", "enjoy", "watch and evaluate a trained agent"),
    "record-video": ("rl_zoo3.record_video", None, "record a video of a trained agent"),
    "push-to-hub": ("rl_zoo3.push_to_hub", None, "upload a trained agent to the Hugging Face hub"),
}
ZOO_PLOTS = {
    "train": ("rl_zoo3.plots.plot_train", "plot_train", "training returns of one run or several"),
    "all": ("rl_zoo3.plots.all_plots", "all_plots", "evaluations of several runs, and a table"),
    "from-file": ("rl_zoo3.plots.plot_from_file", "plot_from_file", "figures from what `plot all -o` saved"),
}
EPILOG = """\
examples:
  sb3-off2on datasets
  sb3-off2on train --algo off2on_sac --env HalfCheetah-v5 --dataset mujoco/halfcheetah/medium-v0
  sb3-off2on enjoy --algo off2on_sac --env HalfCheetah-v5 -f logs/
  sb3-off2on reproduce fig4c --dataset mujoco/halfcheetah/medium-v0 --scale 0.1

`sb3-off2on COMMAND --help` shows the options of a command; those of train, enjoy, record-video, plot and push-to-hub are
RL Zoo's.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a command.

    :param argv: command and options, those of the process by default
    :raises SystemExit: with a message of one line where the user made a mistake
    """
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.run not in (run_zoo_script, run_reproduce):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        args.run(args)
    # What this package, SB3 and RL Zoo raise, or assert, where an argument or a file is not what it should be
    except (ValueError, AssertionError, OSError) as error:
        # zoo.py adds a note to an error in training: that one, and an assertion without words, needs its traceback
        if hasattr(error, "__notes__") or not str(error):
            raise
        sys.exit(f"{args.prog}: error: {error}")


def make_parser() -> argparse.ArgumentParser:
    """:return: the parser of all commands; each one's function is in ``run``"""
    parser = argparse.ArgumentParser(
        "sb3-off2on",
        description="Offline-to-online reinforcement learning with Stable-Baselines3.",
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=20),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_zoo_scripts(commands, ZOO_SCRIPTS)
    plot = commands.add_parser("plot", help="plot training curves and evaluations")
    add_zoo_scripts(plot.add_subparsers(title="kinds", metavar="KIND", required=True), ZOO_PLOTS)

    reproduce = commands.add_parser("reproduce", help="make the paper's comparisons on any task", add_help=False)
    reproduce.set_defaults(run=run_reproduce, prog=reproduce.prog)

    datasets = commands.add_parser("datasets", help="list the local Minari datasets, show one, or make one")
    datasets.set_defaults(run=list_datasets, prog=datasets.prog)
    actions = datasets.add_subparsers(title="without one of these, lists the local Minari datasets", metavar="ACTION")
    show = actions.add_parser("show", help="show a dataset in detail")
    show.set_defaults(run=show_dataset, prog=show.prog)
    show.add_argument("source", nargs="+", help="Minari id, folder or file, see docs/datasets.md; several are joined")
    show.add_argument("--download", action="store_true", help="download an unknown Minari id")
    show.add_argument("--allow-pickle", action="store_true", help="load .pkl files, which can run any code")
    make = actions.add_parser("make", help="make the dataset of a manipulation task, see docs/envs.md")
    make.set_defaults(run=make_dataset.main, prog=make.prog)
    make_dataset.add_arguments(make)
    return parser


def add_zoo_scripts(commands: Any, scripts: Mapping[str, tuple[str, str | None, str]]) -> None:
    """
    Add commands that leave their options, ``--help`` among them, to RL Zoo.

    :param commands: what ``add_subparsers`` returned
    :param scripts: module, function and help of each
    """
    for name, (module, function, text) in scripts.items():
        command = commands.add_parser(name, help=text, add_help=False)
        command.set_defaults(run=run_zoo_script, prog=command.prog, module=module, function=function)


def run_zoo_script(args: argparse.Namespace) -> None:
    """
    Run a script of RL Zoo, which knows our algorithms.

    :param args: ``module`` and ``function`` of the script, ``prog`` to call it, and ``rest``, its arguments
    """
    try:  # RL Zoo is an extra, and takes seconds to import
        zoo = import_module("sb3_off2on.zoo")
        if args.module == "rl_zoo3.push_to_hub":
            zoo.add_generate_metadata()
        script = None if args.function is None else getattr(import_module(args.module), args.function)
    except ModuleNotFoundError as error:
        sys.exit(f'{args.prog}: error: {error.name} is not installed: pip install ".[zoo]" in the folder of the source code')
    sys.argv = [args.prog, *args.rest]
    if script is None:
        runpy.run_module(args.module, run_name="__main__")
    else:
        script()


def run_reproduce(args: argparse.Namespace) -> None:
    """
    Make the runs of a figure, and its table, plot and report.

    :param args: ``prog`` and ``rest``, its arguments
    """
    try:  # SciPy is an extra
        command = import_module("sb3_off2on.reproduce.command")
    except ModuleNotFoundError as error:
        sys.exit(
            f'{args.prog}: error: {error.name} is not installed: pip install ".[reproduce]" in the folder of the source code'
        )
    command.main(args.rest, args.prog)


def list_datasets(args: argparse.Namespace) -> None:
    """Print a table of the local Minari datasets."""
    ids = list(minari.list_local_datasets())
    if not ids:
        print(f"No Minari datasets in {get_dataset_path()}: `minari list remote` and `minari download ID` get some")
        return
    table = Table(title=f"Minari datasets in {get_dataset_path()}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    # In two lines, as ids and spaces do not fit into a terminal next to each other
    table.add_column("id\n  observations -> actions", overflow="fold")
    for column in ("transitions", "episodes", "return", "score", "size"):
        table.add_column(column, justify="right")
    for dataset_id in ids:
        try:
            table.add_row(*_row(minari.load_dataset(dataset_id)))
        except Exception as error:  # whatever is wrong with one, the others can be listed
            table.add_row(f"{dataset_id}\n  cannot be read: {error}")
    _print(table)


def _row(dataset: minari.MinariDataset) -> list[str]:
    """Cells of a Minari dataset, of which only the rewards are read: a list must not take as long as to load it all."""
    storage = dataset.storage
    with h5py.File(storage.data_path / "main_data.hdf5") as file:
        mean_return = np.mean([np.sum(file[f"episode_{index}"]["rewards"]) for index in range(dataset.total_episodes)])
    scores = storage.metadata.get("ref_min_score"), storage.metadata.get("ref_max_score")
    if None in scores and dataset.env_spec is not None:
        scores = D4RL_REFERENCE_SCORES.get(dataset.env_spec.name, scores)
    score = "-" if None in scores else f"{normalized_score(mean_return, *scores):.1f}"
    return [
        f"{dataset.id}\n  {_describe(dataset.observation_space)} -> {_describe(dataset.action_space)}",
        f"{dataset.total_steps:,}",
        f"{dataset.total_episodes:,}",
        f"{mean_return:,.1f}",
        score,
        _size_on_disk([dataset.id]),
    ]


def _describe(space: spaces.Space) -> str:
    """A space in few words: of arrays the shape, and the type where it is not float."""
    if isinstance(space, spaces.Dict):
        return ", ".join(f"{key}: {_describe(part)}" for key, part in space.items())
    if isinstance(space, spaces.Box):
        return f"{space.shape}" if space.dtype.kind == "f" else f"{space.shape} {space.dtype}"
    return str(space)


def show_dataset(args: argparse.Namespace) -> None:
    """
    Print what is in a dataset.

    :param args: ``source``, a list of what ``load_dataset`` takes, and its options
    """
    dataset = load_dataset(args.source, download=args.download, allow_pickle=args.allow_pickle)
    returns, lengths = dataset.episode_returns, dataset.episode_lengths
    references = dataset.ref_min_score, dataset.ref_max_score
    rows = {
        "environment": dataset.env_spec.id if dataset.env_spec else "unknown",
        "transitions": f"{len(dataset):,}",
        "episodes": f"{dataset.n_episodes:,}, {dataset.terminations.sum():,} of them terminated",
        "episode length": _spread(lengths),
        "return": _spread(returns),
        "normalized score": "no reference scores" if None in references else _spread(dataset.normalized_score(returns)),
        "reference scores": "none" if None in references else f"random {references[0]:,.1f}, expert {references[1]:,.1f}",
        "reward": _spread(dataset.rewards),
        "observations": str(dataset.observation_space),
        "actions": str(dataset.action_space),
        "size on disk": _size_on_disk(args.source),
        "fingerprint": dataset.fingerprint,
    }
    table = Table("", dataset.source)
    for name, value in rows.items():
        table.add_row(name, value)
    _print(table)


def _spread(values: Any) -> str:
    return f"{values.mean():,.1f} +/- {values.std():,.1f}, from {values.min():,.1f} to {values.max():,.1f}"


def _size_on_disk(sources: Sequence[str]) -> str:
    paths = [Path(source) if Path(source).exists() else get_dataset_path(source) for source in sources]
    files = [file for path in paths for file in [path, *path.rglob("*")] if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


def _print(table: Table) -> None:
    # Not into a terminal: whole lines, for a file or another program
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()
