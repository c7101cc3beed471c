"""RL Zoo's experiment manager with our algorithms: what it reads, builds and runs."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import rl_zoo3.enjoy
import rl_zoo3.exp_manager
import rl_zoo3.train
import yaml
from helpers import small_model
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_off2on import Off2OnSAC, collect_dataset, zoo
from sb3_off2on.checkpoint import find_checkpoints

DATASET, OTHER_DATASET = "pendulum/random-v0", "pendulum/other-v0"


@pytest.fixture(scope="module", autouse=True)
def local_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("datasets")))
        for seed, dataset_id in enumerate((DATASET, OTHER_DATASET)):
            collect_dataset(None, "Pendulum-v1", n_steps=60, dataset_id=dataset_id, seed=seed)
        yield


def small_params(**params: Any) -> dict[str, Any]:
    return {
        "offline_gradient_steps": 6,
        "learning_starts": 4,
        "train_freq": 4,
        "batch_size": 4,
        "offline_batch_size": 4,
        "cql_n_actions": 2,
        "buffer_size": 100,
        "policy_kwargs": {"net_arch": [8], "ensemble_size": 2},
        **params,
    }


def make_manager(
    folder: Path, algo: str = "off2on_sac", dataset: list[str] | None = None, resume: str | None = None, **kwargs: Any
) -> Any:
    """A manager as ``rl_zoo3.train`` makes it, for Pendulum and with small hyperparameters if not told otherwise."""
    args = argparse.Namespace(dataset=dataset, resume=resume)
    defaults = {"eval_freq": -1, "device": "cpu", "verbose": 0, "n_timesteps": 8, "hyperparams": small_params()}
    return rl_zoo3.train.ExperimentManager(args, algo, "Pendulum-v1", str(folder / "logs"), **{**defaults, **kwargs})


def run(manager: Any) -> Any:
    """As the rest of ``rl_zoo3.train.train``."""
    model, _ = manager.setup_experiment()
    manager.learn(model)
    manager.save_trained_model(model)
    return model


def write(path: Path, content: Any) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_import_registers_every_algorithm() -> None:
    for name, algorithm in zoo.ALGORITHMS.items():
        registered = (rl_zoo3.ALGOS[name], HYPERPARAMS_SAMPLER[name], HYPERPARAMS_CONVERTER[name])
        assert registered == (*algorithm, dict)
        assert (zoo.HYPERPARAMS_FOLDER / f"{name}.yml").is_file()
    for module in (rl_zoo3.train, rl_zoo3.exp_manager):
        assert module.ExperimentManager is zoo.OfflineToOnlineExperimentManager


# ------------------------------------------------------------------ what depends on the dataset


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("mujoco/halfcheetah/medium-v0", "halfcheetah-medium"),
        ("mujoco/halfcheetah/medium-replay-v12", "halfcheetah-medium-replay"),
        ("/data/minari/mujoco/halfcheetah/medium-v0", "halfcheetah-medium"),
        ("halfcheetah-medium-v0", "halfcheetah-medium"),
        ("halfcheetah_medium_expert-v2.hdf5", "halfcheetah-medium-expert"),
        ("/data/halfcheetah_medium-v2.hdf5", "halfcheetah-medium"),
        ("pendulum/random-v0", "pendulum-random"),
        ("buffer.npz", "buffer"),
    ],
)
def test_name_of_a_dataset(source: str, name: str) -> None:
    assert zoo.dataset_name(source) == name


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["mujoco/halfcheetah/medium-v0"], "medium"),
        (["halfcheetah_medium-v2.hdf5"], "medium"),
        (["halfcheetah-medium-expert-v2"], "medium-expert"),
        (["mujoco/halfcheetah/medium-v0", "mujoco/halfcheetah/expert-v0"], "medium-expert"),
        (["mujoco/halfcheetah/expert-v0", "mujoco/halfcheetah/medium-v0"], "medium-expert"),
        (["mujoco/halfcheetah/medium-replay-v0"], None),
        (["mujoco/halfcheetah/expert-v0"], None),
        (["mujoco/hopper/medium-v0"], None),
        (["mujoco/halfcheetah/medium-v0", "mujoco/hopper/expert-v0"], None),
        (["mujoco/halfcheetah/medium-v0", "mujoco/halfcheetah/medium-expert-v0"], None),
    ],
)
def test_overlay_of_a_dataset(sources: list[str], expected: str | None) -> None:
    overlay = {f"halfcheetah-{kind}": {"found": kind} for kind in ("medium", "medium-expert")}
    assert zoo.dataset_hyperparameters(overlay, sources) == ({} if expected is None else {"found": expected})


def test_order_of_precedence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Environment < dataset < trial < -params; and a file of one's own has an overlay of its own."""
    values = ("batch_size", "buffer_size", "learning_rate", "cql_alpha")
    config = write(tmp_path / "mine.yml", {"Pendulum-v1": dict.fromkeys(values, 1)})
    write(tmp_path / "mine_datasets.yml", {"pendulum-random": dict.fromkeys(values[1:], 2)})
    storage = str(tmp_path / "study.log")
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(storage)), study_name="s")
    for value in (8, 3):
        study.enqueue_trial({"learning_rate": value, "cql_alpha": value})
        study.optimize(lambda trial: sum(trial.suggest_int(name, 0, 9) for name in values[2:]), n_trials=1)

    kwargs: dict[str, Any] = {"config": config, "storage": storage, "study_name": "s", "trial_id": 1}
    manager = make_manager(tmp_path, dataset=[DATASET], hyperparams={"cql_alpha": 4}, **kwargs)
    hyperparams, saved = manager.read_hyperparameters()
    expected = {"batch_size": 1, "buffer_size": 2, "learning_rate": 3, "cql_alpha": 4, "dataset": DATASET}
    assert hyperparams == expected
    assert list(saved.items()) == sorted(expected.items())
    assert f"Hyperparameters for the dataset {DATASET}: {{'buffer_size': 2}}" in capsys.readouterr().out

    # Another dataset, none, and several
    hyperparams, _ = make_manager(tmp_path, dataset=[OTHER_DATASET], hyperparams=None, config=config).read_hyperparameters()
    assert hyperparams["buffer_size"] == 1
    hyperparams, _ = make_manager(tmp_path, hyperparams=None, config=config).read_hyperparameters()
    assert hyperparams == dict.fromkeys(values, 1)
    both = [DATASET, OTHER_DATASET]
    hyperparams, saved = make_manager(tmp_path, dataset=both, hyperparams=None, config=config).read_hyperparameters()
    assert hyperparams["dataset"] == saved["dataset"] == both


def test_file_of_ones_own_is_not_overlaid_by_ours(tmp_path: Path) -> None:
    config = write(tmp_path / "mine.yml", {"Pendulum-v1": {"learning_rate": 1.0}})
    manager = make_manager(tmp_path, dataset=["mujoco/halfcheetah/medium-v0"], hyperparams=None, config=config)
    assert manager.read_hyperparameters()[0]["learning_rate"] == 1.0


def test_dataset_among_the_hyperparameters(tmp_path: Path) -> None:
    """In a file, or as -params; --dataset wins."""
    config = write(tmp_path / "mine.yml", {"Pendulum-v1": {"dataset": DATASET, "offline_gradient_steps": 1}})
    write(tmp_path / "mine_datasets.yml", {"pendulum-random": {"cql_alpha": 2}, "pendulum-other": {"cql_alpha": 3}})
    for kwargs, cql_alpha in (
        ({"hyperparams": None}, 2),
        ({"hyperparams": {"dataset": [OTHER_DATASET]}}, 3),
        ({"hyperparams": {"dataset": OTHER_DATASET}, "dataset": [DATASET]}, 2),
    ):
        assert make_manager(tmp_path, config=config, **kwargs).read_hyperparameters()[0]["cql_alpha"] == cql_alpha
    for wrong in ({"actions": 1}, [DATASET, 1], 3):
        manager = make_manager(tmp_path, config=config, hyperparams={"dataset": wrong})
        with pytest.raises(ValueError, match=r"`dataset` must be a Minari id, a path, or a list of these, got [\[{3]"):
            manager.read_hyperparameters()


def test_mistakes_with_the_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`--dataset` cannot be used with `--algo sac`.*choose one of off2on_sac"):
        make_manager(tmp_path, algo="sac", dataset=[DATASET])
    with pytest.raises(ValueError, match=r"trains offline first \(6 updates\) and needs `--dataset`"):
        make_manager(tmp_path).setup_experiment()
    with pytest.raises(ValueError, match="needs `--dataset`"):
        make_manager(tmp_path, optimize_hyperparameters=True, n_evaluations=1).setup_experiment()
    with pytest.raises(ValueError, match="No Minari dataset 'pendulum/unknown-v0'"):
        make_manager(tmp_path, dataset=["pendulum/unknown-v0"]).setup_experiment()
    with pytest.raises(ValueError, match=r"`--algo off2on_sac` has no hyperparameter offline_gradientsteps: see `Off2OnSAC`"):
        make_manager(tmp_path, dataset=[DATASET], hyperparams=small_params(offline_gradientsteps=3)).setup_experiment()
    assert not (tmp_path / "logs").exists()


def test_other_algorithms_are_as_in_rl_zoo(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"hyperparams": {"qf_learning_rate": "lin_1"}}
    ours = make_manager(tmp_path, algo="sac", **kwargs)
    theirs = zoo.ExperimentManager(argparse.Namespace(), "sac", "Pendulum-v1", str(tmp_path), **kwargs)
    assert ours.config == theirs.config
    assert ours.read_hyperparameters() == theirs.read_hyperparameters()
    assert ours._preprocess_hyperparams(ours.read_hyperparameters()[0])[0]["qf_learning_rate"] == "lin_1"
    assert type(run(make_manager(tmp_path, algo="sac", hyperparams={"learning_starts": 4}))) is SAC


# ------------------------------------------------------------------ schedules


def test_schedules_of_every_learning_rate(tmp_path: Path) -> None:
    names = ("learning_rate", "qf_learning_rate", "offline_learning_rate", "offline_qf_learning_rate")
    rates = {name: f"lin_{number}e-3" for number, name in enumerate(names, start=1)}
    manager = make_manager(tmp_path, dataset=[DATASET], hyperparams=small_params(**rates))
    model, saved = manager.setup_experiment()
    schedules = (model.lr_schedule, model.qf_lr_schedule, model.offline_lr_schedule, model.offline_qf_lr_schedule)
    for number, schedule in enumerate(schedules, start=1):
        assert [schedule(remaining) for remaining in (1, 0.25)] == pytest.approx([number * 1e-3, number * 0.25e-3])
    assert {name: saved[name] for name in names} == rates  # as text, for the next run
    model.save(tmp_path / "model")
    schedule = Off2OnSAC.load(tmp_path / "model").qf_lr_schedule
    assert schedule is not None
    assert schedule(0.25) == pytest.approx(0.5e-3)


@pytest.mark.parametrize("value", [2e-3, None])
def test_numbers_as_learning_rates(tmp_path: Path, value: float | None) -> None:
    hyperparams = small_params(learning_rate=1e-3, qf_learning_rate=value)
    model, _ = make_manager(tmp_path, dataset=[DATASET], hyperparams=hyperparams).setup_experiment()
    if value is None:
        assert model.qf_lr_schedule is None  # the actor's, then
    else:
        assert model.qf_lr_schedule(0.5) == value


@pytest.mark.parametrize("value", ["3e-4", "lin_fast"])
def test_what_is_no_schedule(tmp_path: Path, value: str) -> None:
    manager = make_manager(tmp_path, dataset=[DATASET], hyperparams=small_params(qf_learning_rate=value))
    with pytest.raises(ValueError, match=r"`qf_learning_rate: .*` is neither a number nor a linear schedule like lin_3e-4"):
        manager.setup_experiment()


# ------------------------------------------------------------------ runs


COMMON = ("--algo", "off2on_sac", "--env", "Pendulum-v1", "--device", "cpu")


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str, **params: Any) -> Path:
    """Run ``rl_zoo3.train`` with the options of a command line, and return the folder of the run."""
    before = set(folder.glob("off2on_sac/*"))
    hyperparams = [f"{name}:{value!r}" for name, value in small_params(**params).items()]
    arguments = [*COMMON, "-f", str(folder), "--eval-episodes", "1", *options, "-params", *hyperparams]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    rl_zoo3.train.train()
    (new,) = set(folder.glob("off2on_sac/*")) - before
    return new


def test_run_with_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both phases reach callbacks, logs and files, on one counter; resuming goes on."""
    options = ["--dataset", DATASET, OTHER_DATASET, "-n", "8", "--eval-freq", "5", "--save-freq", "4", "--save-replay-buffer"]
    extra = ["-P", "-uuid", "--tensorboard-log", str(tmp_path / "tb"), "--env-kwargs", "g:5.0", "--seed", "1"]
    first = train(monkeypatch, tmp_path, *options, *extra, normalize=True, qf_learning_rate="lin_1e-3")
    assert np.load(first / "evaluations.npz")["timesteps"].tolist() == [5, 10]
    assert {path.name for path in first.glob("rl_model*")} == {f"rl_model_{n}_steps.zip" for n in (4, 8, 12)}
    assert list((tmp_path / "tb").rglob("events*"))
    config = rl_zoo3.get_saved_hyperparams(str(first / "Pendulum-v1"))[0]
    assert config["dataset"] == [DATASET, OTHER_DATASET]
    assert config["qf_learning_rate"] == "lin_1e-3"
    assert "dataset" in (first / "Pendulum-v1" / "args.yml").read_text()
    model = Off2OnSAC.load(first / "Pendulum-v1.zip")
    assert (model._n_offline_updates, model.num_timesteps) == (6, 14)

    # From the end: the dataset comes from config.yml, and nothing is trained offline again
    resumed: list[Any] = []
    learn = Off2OnSAC.learn

    def learn_and_keep(self: Off2OnSAC, *args: Any, **kwargs: Any) -> None:
        resumed.append(learn(self, *args, **kwargs))

    monkeypatch.setattr(Off2OnSAC, "learn", learn_and_keep)
    second = train(monkeypatch, tmp_path, "-i", str(first / "Pendulum-v1.zip"), "-n", "4", "--eval-freq", "-1", normalize=True)
    assert resumed[0].dataset.source == f"{DATASET} + {OTHER_DATASET}"
    assert resumed[0]._n_offline_updates == 6
    assert resumed[0].replay_buffer.n_online == 12  # with those of the first run
    assert rl_zoo3.get_saved_hyperparams(str(second / "Pendulum-v1"))[0]["dataset"] == [DATASET, OTHER_DATASET]
    normalize: Any = VecNormalize.load(str(second / "Pendulum-v1" / "vecnormalize.pkl"), make_vec_env("Pendulum-v1"))
    assert normalize.obs_rms.count > 120  # the dataset's rows and what came after

    # RL Zoo's enjoy() normalises as well, and needs no dataset
    monkeypatch.setattr(sys, "argv", ["enjoy", *COMMON, "-f", str(tmp_path), "--no-render", "-n", "201"])
    rl_zoo3.enjoy.enjoy()
    output = capsys.readouterr().out
    assert "Loading running average" in output
    assert "1 Episodes" in output

    # From the middle of the offline phase: that is completed first
    train(monkeypatch, tmp_path, "-i", str(first / "rl_model_4_steps.zip"), "-n", "4", "--eval-freq", "-1", normalize=True)
    assert (resumed[1]._n_offline_updates, resumed[1].num_timesteps) == (6, 10)


def test_resuming_where_no_config_names_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run(make_manager(tmp_path, dataset=[DATASET])).save(tmp_path / "elsewhere" / "model")
    agent = str(tmp_path / "elsewhere" / "model.zip")
    with pytest.raises(ValueError, match="needs `--dataset`"):
        make_manager(tmp_path, trained_agent=agent).setup_experiment()
    with pytest.raises(ValueError, match="`dataset` is not the one this model was trained with"):
        make_manager(tmp_path, trained_agent=agent, dataset=[OTHER_DATASET]).setup_experiment()
    assert run(make_manager(tmp_path, trained_agent=agent, dataset=[DATASET])).num_timesteps == 14


def test_online_only(tmp_path: Path) -> None:
    """Without an offline phase no dataset is needed, neither at first nor to resume."""
    hyperparams = small_params(offline_gradient_steps=0)
    first = make_manager(tmp_path, hyperparams=hyperparams)
    assert run(first).dataset is None
    agent = f"{first.save_path}/Pendulum-v1.zip"
    assert run(make_manager(tmp_path, trained_agent=agent, hyperparams=hyperparams)).num_timesteps == 8


def test_several_environments(tmp_path: Path) -> None:
    hyperparams = small_params(n_envs=2, train_freq=2)
    manager = make_manager(tmp_path, dataset=[DATASET], vec_env_type="subproc", hyperparams=hyperparams)
    manager.vec_env_kwargs = {"start_method": "fork"}  # the others import everything anew in each process
    model, _ = manager.setup_experiment()
    assert isinstance(model.get_env(), SubprocVecEnv)
    manager.learn(model)
    assert model.num_timesteps == 6 + 8


def test_error_in_training_names_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("nan")

    monkeypatch.setattr(Off2OnSAC, "train_offline", fail)
    manager = make_manager(tmp_path, dataset=[DATASET])
    with pytest.raises(ValueError, match="nan") as info:
        run(manager)
    assert info.value.__notes__ == [f"During training. Log path: {manager.save_path}"]


@pytest.mark.parametrize("n_envs", [1, 2])
def test_progress_bar_counts_updates_then_steps(tmp_path: Path, n_envs: int) -> None:
    hyperparams = small_params(n_envs=n_envs, train_freq=2)
    manager = make_manager(tmp_path, dataset=[DATASET], show_progress=True, hyperparams=hyperparams)
    model, _ = manager.setup_experiment()
    bar, counts = manager.callbacks[0], []
    close = bar._on_training_end

    def count_and_close() -> None:
        counts.append((bar.pbar.n, bar.pbar.total))
        close()

    bar._on_training_end = count_and_close
    manager.learn(model)
    assert counts[:2] == [(6, 6), (8, 8)]


# ------------------------------------------------------------------ hyperparameter search


class StubTrial:
    """Takes reports of evaluations; wants to be pruned after ``prune_after`` of them."""

    def __init__(self, prune_after: int) -> None:
        self.prune_after = prune_after
        self.steps: list[int] = []

    def report(self, value: float, step: int) -> None:
        self.steps.append(step)

    def should_prune(self) -> bool:
        return len(self.steps) >= self.prune_after


@pytest.mark.parametrize(("prune_after", "expected"), [(9, [12, 17, 22, 27]), (2, [12, 17])])
def test_trials_are_evaluated_over_the_online_steps(
    monkeypatch: pytest.MonkeyPatch, prune_after: int, expected: list[int]
) -> None:
    """7 updates, then 20 steps with an evaluation after every 5."""
    evaluated = []

    def evaluate_policy(model: Off2OnSAC, *_: Any, **__: Any) -> tuple[list[float], list[int]]:
        evaluated.append(model.num_timesteps)
        return [0.0], [1]

    monkeypatch.setattr("stable_baselines3.common.callbacks.evaluate_policy", evaluate_policy)
    model = small_model(offline_gradient_steps=7, dataset=DATASET)
    env: Any = model.get_env()
    trial: Any = StubTrial(prune_after)
    callback = rl_zoo3.exp_manager.TrialEvalCallback(env, trial, eval_freq=5)
    model.learn(20, callback=callback)
    assert evaluated == expected
    assert trial.steps == list(range(1, len(expected) + 1))
    assert callback.is_pruned == (prune_after == 2)


def test_sampler_covers_what_the_paper_used() -> None:
    study = optuna.create_study()
    trial = study.ask()
    sampled = HYPERPARAMS_SAMPLER["off2on_sac"](trial, 1, 1, {})
    expected = {
        "cql_alpha": (5.0, 10.0),
        "learning_rate": (3e-4, 3e-5, 5e-6),
        "qf_learning_rate": (3e-4, 1e-4),
        "initial_online_fraction": (0.5, 0.75),
        "priority_temperature": (2.5, 5.0),
    }
    assert {name: distribution.choices for name, distribution in trial.distributions.items()} == expected  # type: ignore[attr-defined]
    assert sampled == trial.params == HYPERPARAMS_CONVERTER["off2on_sac"](trial.params)
    for values in list(itertools.product(*expected.values()))[::7]:
        fixed: Any = optuna.trial.FixedTrial(dict(zip(expected, values, strict=True)))
        model = small_model(**HYPERPARAMS_SAMPLER["off2on_sac"](fixed, 1, 1, {}))
        assert tuple(getattr(model, name) for name in expected) == values


class Killed(BaseCallback):
    """Raise after so many calls."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            raise RuntimeError("killed")
        return True


class TestResume:
    def test_interrupted_run_goes_on(self, tmp_path: Path) -> None:
        """In its own folder, to the number of steps that one run has; episodes and evaluations are kept."""
        params = small_params(train_freq=200, gradient_steps=1, learning_starts=200)
        kwargs: dict[str, Any] = {
            "dataset": [DATASET],
            "n_timesteps": 600,
            "eval_freq": 150,
            "save_freq": 200,
            "log_interval": 1,
            "resume": "auto",
        }
        first = make_manager(tmp_path, hyperparams=params, n_eval_episodes=1, **kwargs)
        model, _ = first.setup_experiment()
        first.callbacks.append(Killed(at=450))
        with pytest.raises(RuntimeError, match=r"killed"):
            first.learn(model)
        folder = Path(first.save_path)
        episodes = (folder / "0.monitor.csv").read_text()
        assert len(episodes.splitlines()) == 2 + 2
        assert [path.name for path in find_checkpoints(folder / "checkpoints")] == ["000003_406_steps", "000002_206_steps"]

        second = make_manager(tmp_path, hyperparams=params, n_eval_episodes=1, **kwargs)
        assert (second.save_path, second.params_path) == (first.save_path, first.params_path)
        assert run(second).num_timesteps == 6 + 600
        assert (folder / "0.monitor.csv").read_text().startswith(episodes)
        assert list(np.load(folder / "evaluations.npz")["timesteps"]) == [150, 300, 450, 600]

        with pytest.warns(UserWarning, match=r"Nothing to do in `learn\(600\)`"):
            assert run(make_manager(tmp_path, hyperparams=params, **kwargs)).num_timesteps == 6 + 600
        with pytest.raises(ValueError, match=r"another model: `gamma` differs, 0.99 there and 0.5 here"):
            run(make_manager(tmp_path, hyperparams={**params, "gamma": 0.5}, **kwargs))
        assert [path.name for path in folder.parent.iterdir()] == ["Pendulum-v1_1"]

    def test_new_run(self, tmp_path: Path) -> None:
        """Where the latest run has no checkpoints."""
        run(make_manager(tmp_path, dataset=[DATASET]))
        manager = make_manager(tmp_path, dataset=[DATASET], resume="auto")
        assert Path(manager.save_path).name == "Pendulum-v1_2"
        run(manager)
        assert len(find_checkpoints(Path(manager.save_path, "checkpoints"))) == 2

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"algo": "sac"}, r"`--resume` cannot be used with `--algo sac`: choose one of off2on_sac, awac, bcq"),
            ({"optimize_hyperparameters": True}, r"`--resume` cannot be used with `-optimize`: leave one of them out"),
            ({"uuid_str": "_x"}, r"`--resume` cannot be used with `--uuid`: leave one of them out"),
        ],
    )
    def test_what_it_cannot_be_used_with(self, tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_manager(tmp_path, resume="auto", **kwargs)
