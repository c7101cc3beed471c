"""The systems of the paper's comparisons, and what has to be trained for each."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml

from sb3_off2on.datasets import OfflineDataset, load_dataset
from sb3_off2on.off2on_sac import Off2OnSAC

HYPERPARAMS_FOLDER = Path(__file__).parents[1] / "hyperparams"
# The paper's protocol (sections C and D.1); Fig. 9 to 14 have it too, but for 13
ONLINE_STEPS = 250_000
N_EVALUATIONS = 50
# Updates of CQL for one of FQE: 1,000,000 and 250,000
CQL_PER_FQE = 4
VAE_STEPS = 20_000  # ours, the paper does not say
# Where a file has no other
LEARNING_STARTS = signature(Off2OnSAC).parameters["learning_starts"].default


class System(NamedTuple):
    """
    What is compared. Every system is a configuration of an algorithm: its hyperparameter file, and what is different.

    :param label: for plots and tables
    :param config: ``hyperparams/<config>.yml`` of this package; or SAC, TQC or CrossQ, with the defaults of their libraries
    :param pretraining: which agents it starts with, of ``PRETRAINING``; ``None`` to start from scratch
    :param changes: hyperparameters of the online phase that differ from the file's
    :param ensemble_size: N where the system fixes it
    :param n_times_longer: factor for the number of online steps
    """

    label: str
    config: str
    pretraining: str | None = None
    changes: Mapping[str, Any] = {}
    ensemble_size: int | None = None
    n_times_longer: int = 1

    @property
    def algorithm(self) -> str:
        """Name of its algorithm."""
        return {"awac": "AWAC", "bcq": "BCQ", "SAC": "SAC", "TQC": "TQC", "CrossQ": "CrossQ"}.get(self.config, "Off2OnSAC")


def scheme(name: str) -> dict[str, Any]:
    """:return: hyperparameters for a replay scheme"""
    return {"replay_buffer_kwargs": {"scheme": name}}


SYSTEMS = {
    "off2on": System("Off2On", "off2on_sac", "cql"),
    "off2on_n1": System("Off2On, N=1", "off2on_sac", "cql", {}, 1),
    "off2on_n2": System("Off2On, N=2", "off2on_sac", "cql", {}, 2),
    "uniform": System("Uniform", "off2on_sac", "cql", scheme("uniform")),
    "online_only": System("Online only", "off2on_sac", "cql", scheme("online")),
    "online_only_n1": System("Online only, N=1", "sac_ft", "cql", scheme("online"), 1),
    "cql_reg": System("CQL Reg", "off2on_sac", "cql", {"cql_alpha_online": 5.0}),
    "other_ratio": System(
        "Off2On, d_on/d_(off and on)", "off2on_sac", "cql", {"density_ratio_kwargs": {"reference": "union"}}
    ),
    "fqe_init": System("FQE-init", "off2on_sac", "fqe"),
    "fqe_init_n1": System("FQE-init, N=1", "off2on_sac", "fqe", {}, 1),
    "off2on_long": System("Off2On", "off2on_sac", "cql", {}, None, 4),
    "fqe_init_long": System("FQE-init", "off2on_sac", "fqe", {}, None, 4),
    "sac_ft": System("SAC-ft (Uniform, N=1)", "sac_ft", "cql", {}, 1),
    "cql_ft": System("CQL-ft", "cql_ft", "cql", {}, 1),
    "awac": System("AWAC", "awac", "awac"),
    "bcq_ft": System("BCQ-ft", "bcq", "bcq"),
    "calql": System("Cal-QL", "calql", "calql", {}, 1),
    "symmetric": System("Symmetric sampling", "symmetric"),
    "sac": System("SAC", "SAC"),
    "tqc": System("TQC", "TQC"),
    "crossq": System("CrossQ", "CrossQ"),
}
# Agents that several systems start with: the file of their hyperparameters, and their number where it is fixed. "fqe" are
# those of "cql" after fit_fqe()
PRETRAINING: dict[str, tuple[str, int | None]] = {
    "cql": ("off2on_sac", None),
    "fqe": ("off2on_sac", None),
    "calql": ("calql", 1),
    "awac": ("awac", None),
    "bcq": ("bcq", None),
}


@lru_cache
def load_once(sources: tuple[str, ...]) -> OfflineDataset:
    """
    :param sources: Minari ids or paths, joined
    :return: the dataset; here rather than in the task, which goes to other processes
    """
    return load_dataset(list(sources))


@dataclass(frozen=True)
class Task:
    """
    An environment and a dataset.

    :param sources: Minari ids or paths, joined
    :param env_id: environment to fine-tune in, that of the dataset if ``None``
    """

    sources: tuple[str, ...]
    env_id: str | None

    @property
    def dataset(self) -> OfflineDataset:
        """The rows, loaded once."""
        return load_once(self.sources)

    def make_env(self) -> gym.Env:
        """:return: a new environment"""
        return self.dataset.make_env() if self.env_id is None else gym.make(self.env_id)

    @property
    def env_name(self) -> str:
        """Id of the environment."""
        if self.env_id is None and self.dataset.env_spec is None:
            raise ValueError(f"{self.dataset.source} does not name its environment: pass `--env`")
        return self.env_id or self.dataset.env_spec.id  # type: ignore[union-attr]

    @property
    def dataset_name(self) -> str:
        """A name that can be that of a folder."""
        stems = [Path(source).stem if Path(source).is_file() else source for source in self.sources]
        return "+".join(re.sub(r"[^\w.-]+", "-", stem).strip("-") for stem in stems)


@dataclass(frozen=True)
class Job:
    """
    Something to be trained, in a folder of its own.

    :param folder: where its logs and ``run.json`` are
    :param settings: all that decides what comes out, JSON; what was made with others is not taken for it
    :param n_steps: updates or environment steps
    :param task: environment and dataset
    :param after: folder of the job whose agents it starts with
    """

    folder: Path
    settings: dict[str, Any]
    n_steps: int
    task: Task
    after: Path | None = None

    @property
    def name(self) -> str:
        """The folder in short."""
        return "/".join(self.folder.parts[-3:])

    def is_finished(self) -> bool:
        """
        :return: whether there is nothing to do
        :raises ValueError: if the folder holds something else
        """
        path = self.folder / "run.json"
        if not path.is_file():
            return False
        record = json.loads(path.read_text())
        theirs, ours = record["settings"], json.loads(json.dumps(self.settings))
        differ = [
            f"{name}={theirs.get(name)!r}, not {ours.get(name)!r}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if differ:
            raise ValueError(f"{self.folder} was made with {'; '.join(differ)}: choose another `--out`, or delete it")
        return record["finished"]


def hyperparameters(config: str) -> dict[str, Any]:
    """
    :param config: name of a file of this package
    :return: its block ``default`` as arguments of the algorithm, with ``offline_gradient_steps``
    """
    block = yaml.safe_load((HYPERPARAMS_FOLDER / f"{config}.yml").read_text())["default"]
    for name in ("n_timesteps", "policy"):
        del block[name]
    # RL Zoo's format: these are Python
    return {name: eval(value) if name.endswith("_kwargs") else value for name, value in block.items()}


def make_jobs(args: argparse.Namespace, task: Task, system: System, name: str, seed: int) -> Iterator[Job]:
    """
    :param args: of the command line
    :param task: environment and dataset
    :param system: what is to be trained
    :param name: its name
    :param seed: its seed
    :return: the jobs, each after those that it needs; several systems can have one in common
    :raises ValueError: if a system needs more agents than are pretrained, or there are too few online steps to see anything
    """
    online_steps = (args.online_steps or max(round(ONLINE_STEPS * args.scale), 1)) * system.n_times_longer
    common = {"env": task.env_name, "seed": seed}
    folder = args.out / task.env_name
    settings: dict[str, Any] = {
        **common,
        "system": name,
        "online_steps": online_steps,
        "eval_freq": args.eval_freq or max(online_steps // N_EVALUATIONS, 1),
        "eval_episodes": args.eval_episodes,
    }
    if settings["eval_freq"] > online_steps:
        raise ValueError(f"`--eval-freq` must be at most the number of online steps, {online_steps}, got {args.eval_freq}")
    if system.config in ("SAC", "TQC", "CrossQ"):
        # Without data: one run serves all datasets of the environment
        kwargs = {"buffer_size": online_steps, **given(args, "batch_size")}
        settings.update(algorithm=system.algorithm, hyperparameters=kwargs, dataset=None)
        yield Job(folder / name / f"seed_{seed}", settings, online_steps, task)
        return

    data = {"dataset": list(task.sources), "fingerprint": task.dataset.fingerprint}
    folder = args.out / f"{task.env_name}-{task.dataset_name}"
    before: Job | None = None
    ensemble_size = system.ensemble_size or args.ensemble_size
    if ensemble_size > args.ensemble_size:
        raise ValueError(f"`--ensemble-size {args.ensemble_size}` is too small: {system.label!r} needs {ensemble_size} agents")
    if system.pretraining is not None:
        for family in ("cql", "fqe") if system.pretraining == "fqe" else (system.pretraining,):
            config, fixed_size = PRETRAINING[family]
            kwargs = adapted(hyperparameters(config), args, fixed_size or args.ensemble_size)
            published = kwargs.pop("offline_gradient_steps")
            n_updates = args.offline_steps or max(round(published * args.scale), 1)
            own = {**common, **data, "pretraining": family, "gradient_steps": n_updates, "hyperparameters": kwargs}
            if family == "fqe":
                assert before is not None
                own.update(gradient_steps=max(n_updates // CQL_PER_FQE, 1), hyperparameters={}, after=before.settings)
            pretrained_folder = folder / "pretrained" / f"{family}_seed_{seed}"
            before = Job(pretrained_folder, own, own["gradient_steps"], task, before.folder if before else None)
            yield before
        settings["pretrained"] = before.settings if before else None
    kwargs = adapted(hyperparameters(system.config), args, ensemble_size)
    del kwargs["offline_gradient_steps"]
    kwargs.update(system.changes, buffer_size=online_steps, **given(args, "batch_size"))
    if system.algorithm == "Off2OnSAC":
        kwargs.update(given(args, "learning_rate", "ent_coef"))
    if online_steps <= (learning_starts := kwargs.get("learning_starts", LEARNING_STARTS)):
        raise ValueError(
            f"`--online-steps` or `--scale` gives {online_steps} online steps, but the first update only comes after "
            f"{learning_starts}"
        )
    settings.update(data, algorithm=system.algorithm, hyperparameters=kwargs, vae_steps=max(round(VAE_STEPS * args.scale), 1))
    yield Job(folder / name / f"seed_{seed}", settings, online_steps, task, before.folder if before else None)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """
    :param args: of the command line
    :param names: of hyperparameters
    :return: those that the command line has
    """
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def adapted(kwargs: dict[str, Any], args: argparse.Namespace, ensemble_size: int) -> dict[str, Any]:
    """
    :param kwargs: hyperparameters of a file
    :param args: of the command line, which come before them
    :param ensemble_size: N
    :return: hyperparameters
    """
    kwargs = {**kwargs, "policy_kwargs": {**kwargs["policy_kwargs"], "ensemble_size": ensemble_size}}
    kwargs.update(given(args, "offline_batch_size"))
    if "bcq_lambda" not in kwargs and "awac_lambda" not in kwargs:
        kwargs.update(given(args, "cql_n_actions", "offline_bc_steps"))
    return kwargs
