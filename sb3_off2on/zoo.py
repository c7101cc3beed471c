"""
RL Zoo (``rl_zoo3``) with the algorithms of this package. Importing this module makes RL Zoo know them, their hyperparameter
files and their Optuna samplers, and gives its training script the options ``--dataset`` and ``--resume``.
"""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import optuna
import rl_zoo3.exp_manager
import rl_zoo3.train
import yaml
from rl_zoo3 import ALGOS, get_saved_hyperparams
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_off2on.awac import AWAC
from sb3_off2on.bcq import BCQ
from sb3_off2on.callbacks import ResumableCheckpointCallback
from sb3_off2on.checkpoint import find_checkpoints
from sb3_off2on.datasets import load_dataset
from sb3_off2on.images import CogCNN, FlatCombinedExtractor, StridedCNN
from sb3_off2on.off2on_sac import Off2OnSAC
from sb3_off2on.offline import OfflineToOnline

HYPERPARAMS_FOLDER = Path(__file__).parent / "hyperparams"


def sample_off2on_sac_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Sampler for Off2OnSAC hyperparams: the values of the paper (sections D.1 and D.2), and the published weights of CQL.
    Networks stay as configured.

    :param trial: what Optuna suggests the values for
    :param n_actions: not used
    :param n_envs: not used
    :param additional_args: not used
    :return: arguments of ``Off2OnSAC``
    """
    return {
        "cql_alpha": trial.suggest_categorical("cql_alpha", [5.0, 10.0]),
        "learning_rate": trial.suggest_categorical("learning_rate", [3e-4, 3e-5, 5e-6]),
        "qf_learning_rate": trial.suggest_categorical("qf_learning_rate", [3e-4, 1e-4]),
        "initial_online_fraction": trial.suggest_categorical("initial_online_fraction", [0.5, 0.75]),
        "priority_temperature": trial.suggest_categorical("priority_temperature", [2.5, 5.0]),
    }


def sample_awac_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for AWAC hyperparams: around the published values. Arguments and return as ``sample_off2on_sac_params``.
    """
    return {
        "awac_lambda": trial.suggest_float("awac_lambda", 0.2, 5.0, log=True),
        "learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 3e-4, 1e-4]),
        "batch_size": trial.suggest_categorical("batch_size", [256, 512, 1024]),
    }


def sample_bcq_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for BCQ hyperparams: around the published values. Arguments and return as ``sample_off2on_sac_params``.
    """
    return {
        "bcq_lambda": trial.suggest_float("bcq_lambda", 0.5, 1.0),
        "learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 3e-4, 1e-4]),
        "batch_size": trial.suggest_categorical("batch_size", [100, 256]),
    }


class Algorithm(NamedTuple):
    """
    An algorithm as RL Zoo needs it.

    :param algorithm_class: the class
    :param sampler: lets an Optuna trial choose hyperparameters
    """

    algorithm_class: type[OfflineToOnline]
    sampler: Callable[..., dict[str, Any]]


# By the name for --algo, to which hyperparams/<name>.yml belongs and, for what depends on the dataset, <name>_datasets.yml
ALGORITHMS = {
    "off2on_sac": Algorithm(Off2OnSAC, sample_off2on_sac_params),
    "awac": Algorithm(AWAC, sample_awac_params),
    "bcq": Algorithm(BCQ, sample_bcq_params),
}


def dataset_name(source: str) -> str:
    """
    The name that D4RL would give a dataset, without a version: versions of D4RL and of Minari count different things.

    :param source: a Minari id or the path of a dataset, e.g. ``mujoco/halfcheetah/medium-v0``, ``halfcheetah-medium-v2`` or
        ``d4rl/halfcheetah_medium-v2.hdf5``
    :return: in each of these cases ``halfcheetah-medium``
    """
    path = Path(source)
    is_file = path.suffix in (".hdf5", ".h5", ".npz", ".pkl")
    # The last part of a Minari id is only the kind of data
    name = path.stem if is_file else "-".join(path.parts[-2:])
    return re.sub(r"-v\d+$", "", name).replace("_", "-")


def dataset_hyperparameters(overlay: dict[str, dict[str, Any]], sources: Sequence[str]) -> dict[str, Any]:
    """
    What an overlay says about a dataset, or about several that are joined (medium and expert are medium-expert).

    :param overlay: hyperparameters by the name of the dataset, see ``dataset_name``
    :param sources: Minari ids or paths, in any order
    :return: the hyperparameters that depend on the dataset; none where the overlay does not name it
    """

    def task_and_kind(names: Sequence[str]) -> tuple[list[str], list[str]]:
        words = [name.split("-") for name in names]
        return sorted({task for task, *_ in words}), sorted(kind for _, *kinds in words for kind in kinds)

    wanted = task_and_kind([dataset_name(source) for source in sources])
    return next((values for name, values in overlay.items() if task_and_kind([name]) == wanted), {})


class OfflineToOnlineExperimentManager(ExperimentManager):
    """
    RL Zoo's experiment manager, which with an algorithm that has an offline phase

    - finds the hyperparameters of this package where no file is named,
    - treats the dataset as a hyperparameter, so that ``config.yml`` tells the whole run and a resumed run finds it there,
    - lays what depends on the dataset over what depends on the environment,
    - makes schedules of ``lin_3e-4`` in every learning rate,
    - goes on with the latest run of this algorithm and environment, if it is told to and that run has checkpoints.

    With other algorithms it is RL Zoo's, and refuses a dataset.

    :param args: parsed arguments of the command line; the list of datasets is in its ``dataset``, and ``resume`` is ``"auto"``
        for a run that writes checkpoints and goes on from them
    :param algo: name of the algorithm
    :param positional: see ``ExperimentManager``
    :param kwargs: see ``ExperimentManager``
    :raises ValueError: if there is a dataset or ``resume`` for an algorithm that takes none, or ``resume`` with an option that
        excludes it
    """

    def __init__(self, args: argparse.Namespace, algo: str, *positional: Any, **kwargs: Any) -> None:
        self.has_offline_phase = issubclass(ALGOS[algo], OfflineToOnline)
        self.dataset: list[str] | None = getattr(args, "dataset", None)
        if self.dataset and not self.has_offline_phase:
            raise ValueError(
                f"`--dataset` cannot be used with `--algo {algo}`, which learns online only: "
                f"choose one of {', '.join(ALGORITHMS)}"
            )
        if algo in ALGORITHMS and not kwargs.get("config"):
            kwargs["config"] = str(HYPERPARAMS_FOLDER / f"{algo}.yml")
        super().__init__(args, algo, *positional, **kwargs)
        self.resume: str | None = getattr(args, "resume", None)
        if self.resume is not None:
            self._find_run(has_uuid=bool(kwargs.get("uuid_str")))

    def _find_run(self, has_uuid: bool) -> None:
        """Make the latest run this one, if it has checkpoints."""
        if not self.has_offline_phase:
            raise ValueError(f"`--resume` cannot be used with `--algo {self.algo}`: choose one of {', '.join(ALGORITHMS)}")
        conflicts = {"-optimize": self.optimize_hyperparameters, "-i": self.continue_training, "--uuid": has_uuid}
        for option, is_given in conflicts.items():
            if is_given:
                raise ValueError(f"`--resume` cannot be used with `{option}`: leave one of them out")
        run = Path(self.log_path, f"{self.env_name}_{get_latest_run_id(self.log_path, self.env_name)}")
        if find_checkpoints(run / "checkpoints"):
            self.save_path, self.params_path = str(run), str(run / self.env_name)

    def create_callbacks(self) -> None:
        """RL Zoo's, and checkpoints where a run may be resumed."""
        save_freq = self.save_freq if self.save_freq > 0 else 10_000
        super().create_callbacks()
        if self.resume is not None:
            save_freq = max(save_freq // self.n_envs, 1)
            folder = Path(self.save_path, "checkpoints")
            self.callbacks.append(ResumableCheckpointCallback(folder, save_freq, resume=self.resume, verbose=1))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        RL Zoo's, but a resumed run adds to its ``monitor.csv``.

        :param n_envs: see ``ExperimentManager``
        :param eval_env: see ``ExperimentManager``
        :param no_log: see ``ExperimentManager``
        :return: the environments
        """
        if not (eval_env or no_log) and any(Path(self.save_path).glob("*monitor.csv")):
            self.monitor_kwargs = {**self.monitor_kwargs, "override_existing": False}
        return super().create_envs(n_envs, eval_env, no_log)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        RL Zoo's, with the dataset and what depends on it.

        :return: hyperparameters, and a copy to be saved
        :raises ValueError: if the offline phase has no dataset
        """
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if not self.has_offline_phase:
            return hyperparams, saved_hyperparams
        dataset = self.dataset or hyperparams.get("dataset")
        if dataset is None and self.continue_training:
            folder = Path(self.trained_agent).parent / self.env_name
            dataset = get_saved_hyperparams(str(folder))[0].get("dataset")
        if dataset is None:
            n_updates = hyperparams.get("offline_gradient_steps", 0)
            if n_updates > 0:
                raise ValueError(
                    f"`--algo {self.algo}` trains offline first ({n_updates} updates) and needs `--dataset`: a Minari id "
                    "(`sb3-off2on datasets` shows those at hand) or a file. To train online only, use "
                    "`-params offline_gradient_steps:0`"
                )
            return hyperparams, saved_hyperparams

        sources = [dataset] if isinstance(dataset, str) else dataset
        if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"`dataset` must be a Minari id, a path, or a list of these, got {dataset!r}")
        overlay_file = Path(self.config).with_name(f"{Path(self.config).stem}_datasets.yml")
        if overlay_file.is_file():
            overlay = dataset_hyperparameters(yaml.safe_load(overlay_file.read_text()), sources)
            # What was asked for, or found by a search, was chosen with the dataset in mind
            chosen = dict(self.custom_hyperparams or {})
            if self.storage and self.study_name and self.trial_id:
                chosen.update(self.load_trial(self.storage, self.study_name, self.trial_id))
            overlay = {name: value for name, value in overlay.items() if name not in chosen}
            hyperparams.update(overlay)
            print(f"Hyperparameters for the dataset {' + '.join(sources)}: {overlay or 'as above'}")
        hyperparams["dataset"] = sources[0] if len(sources) == 1 else sources
        return hyperparams, OrderedDict(sorted(hyperparams.items()))

    def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
        if self.has_offline_phase:
            # RL Zoo looks at `learning_rate` alone
            for name, value in hyperparams.items():
                if name.endswith("_learning_rate") and isinstance(value, str):
                    try:
                        hyperparams[name] = self._preprocess_schedules({"learning_rate": value})["learning_rate"]
                    except ValueError as error:
                        raise ValueError(
                            f"`{name}: {value}` is neither a number nor a linear schedule like lin_3e-4 (a number like 3e-4 "
                            "must be written as 3.0e-4 or !!float 3e-4 in YAML)"
                        ) from error
            if hyperparams.get("dataset") is not None:
                # Before there is a log folder, and once for all trials of a search
                hyperparams["dataset"] = load_dataset(hyperparams["dataset"])
        preprocessed = super()._preprocess_hyperparams(hyperparams)
        if self.has_offline_phase:
            # What RL Zoo leaves is for the constructor. Now there is no log folder yet, which later runs would find empty
            unknown = sorted(preprocessed[0].keys() - signature(ALGOS[self.algo]).parameters.keys())
            if unknown:
                raise ValueError(
                    f"`--algo {self.algo}` has no hyperparameter {', '.join(unknown)}: see `{ALGOS[self.algo].__name__}`"
                )
        return preprocessed

    def learn(self, model: BaseAlgorithm) -> None:
        """
        RL Zoo's; errors name the run.

        :param model: an initialized RL model
        """
        try:
            super().learn(model)
        except Exception as error:
            error.add_note(f"During training. Log path: {self.save_path}")
            raise


def _is_offline(model: BaseAlgorithm) -> bool:
    return isinstance(model, OfflineToOnline) and not model._handed_over


class OnlineTrialEvalCallback(TrialEvalCallback):
    """
    RL Zoo's evaluation of a trial, over the online steps alone: ``--n-evaluations`` divides those, and a trial can only be
    compared with others at the same online step.
    """

    def _on_step(self) -> bool:
        if _is_offline(self.model):
            self.n_calls = 0
            return True
        return super()._on_step()


def add_generate_metadata() -> None:
    """Prepare ``rl_zoo3.push_to_hub``: RL Zoo 2.9 imports a function of the hub's package that version 3 has renamed."""
    hub = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        vars(hub)["generate_metadata"] = lambda *args: hub._generate_metadata(*args).to_dict()


class TrainParser(argparse.ArgumentParser):
    """The parser of RL Zoo's training script with two options more; arguments as ``ArgumentParser``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--dataset",
            nargs="+",
            help=f"Minari id(s) or file(s) of the dataset to learn from first ({', '.join(ALGORITHMS)}); several are joined",
        )
        self.add_argument(
            "--resume",
            choices=["auto"],
            help="write checkpoints (every --save-freq steps, 10000 by default) and, if the latest run of this algorithm and "
            "environment has some, go on with it: for commands that may be started again",
        )


for _name, _algorithm in ALGORITHMS.items():
    ALGOS[_name] = _algorithm.algorithm_class
    HYPERPARAMS_SAMPLER[_name] = _algorithm.sampler
    # The samplers' values are hyperparameters as they are
    HYPERPARAMS_CONVERTER[_name] = dict  # type: ignore[assignment]

# RL Zoo has no hooks for the rest: these are the names that its modules look up
vars(rl_zoo3.exp_manager).update(
    ExperimentManager=OfflineToOnlineExperimentManager,
    TrialEvalCallback=OnlineTrialEvalCallback,
    # For the strings of policy_kwargs, which are evaluated there
    CogCNN=CogCNN,
    FlatCombinedExtractor=FlatCombinedExtractor,
    StridedCNN=StridedCNN,
)
vars(rl_zoo3.train).update(
    ExperimentManager=OfflineToOnlineExperimentManager,
    argparse=SimpleNamespace(**{**vars(argparse), "ArgumentParser": TrainParser}),
)
