"""A drop-in citizen of SB3: what works with ``SAC`` works with ``Off2OnSAC``, with a dataset and without."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE_SPACE, TinyEnv, assert_same, make_dataset, parameters_of, small_kwargs, small_model
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger, configure
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize
from stable_baselines3.sac import policies as sac_policies
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from test_offline import FakeBar

from sb3_off2on import Off2OnSAC, OfflineDataset
from sb3_off2on.policies import EnsembleActor, EnsembleCnnPolicy, EnsembleCQLPolicy, EnsembleMultiInputPolicy

DOCS = Path(__file__).parents[1] / "docs"
OBSERVATIONS = spaces.Box(-1, 1, (3,))
DICT_SPACE = spaces.Dict(position=OBSERVATIONS, speed=spaces.Box(-1, 1, (1,)))
CHANNEL_FIRST = spaces.Box(0, 255, (3, 36, 36), np.uint8)


@pytest.fixture(scope="module")
def dataset() -> OfflineDataset:
    return make_dataset(env=TinyEnv())


def tiny_envs(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: TinyEnv(**kwargs)] * n_envs)


def table(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading of a documentation page, without the table's own heading."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip(" |") for cell in row] for row in rows[2:]]


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


class TestConstructor:
    def test_arguments_are_those_of_sac_then_ours(self) -> None:
        sac, ours = parameters(SAC.__init__), parameters(Off2OnSAC.__init__)
        assert list(ours)[: len(sac)] == list(sac)
        assert all(ours[name].kind == sac[name].kind for name in sac)
        # Ours have defaults: a call that fits SAC fits
        assert all(ours[name].default is not inspect.Parameter.empty for name in list(ours)[len(sac) :])

    def test_defaults_that_differ_are_documented(self) -> None:
        sac, ours = parameters(SAC.__init__), parameters(Off2OnSAC.__init__)
        documented = {
            row[0].strip("`"): (row[1].strip("`"), row[2].strip("`")) for row in table("modules/off2on_sac.md", DEFAULTS)
        }
        differ = {
            name: (str(sac[name].default), str(ours[name].default)) for name in sac if sac[name].default != ours[name].default
        }
        in_signature = {name: values for name, values in documented.items() if name in differ}
        assert in_signature == differ
        # The others are no defaults of the signature: None stands for a class, and a policy has its own
        assert set(documented) - set(differ) == {
            "replay_buffer_class",
            'policy_kwargs["ensemble_size"]',
            'policy_kwargs["optimizer_kwargs"]',
        }

    def test_methods_take_the_arguments_of_sac(self) -> None:
        names = [name for name, _ in inspect.getmembers(SAC, callable) if not name.startswith("_")]
        assert {"learn", "predict", "save", "load", "train", "set_env", "load_replay_buffer"} <= set(names)
        for name in names:
            sac, ours = parameters(getattr(SAC, name)), parameters(getattr(Off2OnSAC, name))
            assert list(ours)[: len(sac)] == list(sac), name
            differ = {key for key in sac if ours[key].default != sac[key].default}
            assert differ == ({"tb_log_name"} if name == "learn" else set()), name

    @pytest.mark.parametrize(
        ("policy", "space", "policy_class"),
        [
            ("MlpPolicy", OBSERVATIONS, EnsembleCQLPolicy),
            ("EnsembleCQLPolicy", OBSERVATIONS, EnsembleCQLPolicy),
            (EnsembleCQLPolicy, OBSERVATIONS, EnsembleCQLPolicy),
            ("CnnPolicy", IMAGE_SPACE, EnsembleCnnPolicy),
            (EnsembleCnnPolicy, IMAGE_SPACE, EnsembleCnnPolicy),
            ("MultiInputPolicy", DICT_SPACE, EnsembleMultiInputPolicy),
            (EnsembleMultiInputPolicy, DICT_SPACE, EnsembleMultiInputPolicy),
        ],
    )
    def test_policies(self, policy: Any, space: spaces.Space, policy_class: type) -> None:
        assert type(small_model(TinyEnv(space), policy).policy) is policy_class

    def test_verbose(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Silent by default; else what SB3 says, and the tables of both phases."""
        for verbose in (0, 1):
            model = small_model(TinyEnv(), dataset=make_dataset(env=TinyEnv()), verbose=verbose)
            model.learn_offline(gradient_steps=2)
            model.learn(10, log_interval=1)
            output = capsys.readouterr().out
            for text in ("Using cpu device", "cql_gap", "ep_rew_mean"):
                assert (text in output) == (verbose == 1), text

    def test_stats_window_size(self, dataset: OfflineDataset) -> None:
        model = small_model(TinyEnv(), dataset=dataset, stats_window_size=2)
        model.learn_offline(gradient_steps=1).learn(20)
        assert model.ep_info_buffer is not None
        assert (model.ep_info_buffer.maxlen, len(model.ep_info_buffer)) == (2, 2)

    @pytest.mark.parametrize("n_envs", [1, 2])
    def test_action_noise(self, dataset: OfflineDataset, n_envs: int) -> None:
        """The agents' actions with noise so large that each is at the upper bound. Several environments get one each."""
        noise: Any = NormalActionNoise(np.full(2, 100.0), np.ones(2))
        if n_envs == 2:
            noise = VectorizedActionNoise(noise, n_envs)
        model = small_model(tiny_envs(n_envs), dataset=dataset, action_noise=noise)
        model.learn_offline(gradient_steps=1).learn(6)
        assert (model.replay_buffer.actions[: model.replay_buffer.size()] == 1.0).all()

    def test_action_noise_is_vectorised(self, dataset: OfflineDataset) -> None:
        model = small_model(tiny_envs(2), dataset=dataset, action_noise=NormalActionNoise(np.zeros(2), np.ones(2)))
        model.learn_offline(gradient_steps=1).learn(6)
        assert isinstance(model.action_noise, VectorizedActionNoise)

    def test_episodes_of_several_environments(self) -> None:
        """SB3 raises it in the middle of `learn()`."""
        with pytest.raises(ValueError, match=r"`train_freq=\(1, 'episode'\)` needs a single environment, but there are 2"):
            small_model(tiny_envs(2), train_freq=(1, "episode"))

    def test_her(self) -> None:
        with pytest.raises(ValueError, match="`replay_buffer_class=HerReplayBuffer` cannot hold an offline part"):
            small_model(replay_buffer_class=HerReplayBuffer)

    def test_critics_follow_a_replaced_schedule(self) -> None:
        """SB3's users change the rate of a model in this way."""
        model = small_model(TinyEnv())
        model.learn(6)
        model.lr_schedule = lambda _: 0.0
        before = parameters_of(model.critic), parameters_of(model.actor)
        model.learn(2, reset_num_timesteps=False)
        assert_same((parameters_of(model.critic), parameters_of(model.actor)), before)
        model = small_model(TinyEnv(), qf_learning_rate=1e-3)
        model.lr_schedule = lambda _: 0.0
        before = parameters_of(model.critic), parameters_of(model.actor)
        model.learn(6)
        assert_same(parameters_of(model.actor), before[1])
        with pytest.raises(AssertionError):
            assert_same(parameters_of(model.critic), before[0])


DEFAULTS = "Defaults that differ from SAC's"
# A value of each argument that changes what a run leaves
CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": lambda progress: 1e-2 * progress},
    "buffer_size": {"buffer_size": 5},
    "learning_starts": {"learning_starts": 5},
    "batch_size": {"batch_size": 9},
    "tau": {"tau": 0.5},
    "gamma": {"gamma": 0.5},
    "train_freq": {"train_freq": (2, "episode")},
    "gradient_steps": {"gradient_steps": -1, "train_freq": 2},
    "action_noise": {"action_noise": NormalActionNoise(np.zeros(2), np.ones(2))},
    "replay_buffer_kwargs": {"replay_buffer_kwargs": {"handle_timeout_termination": False}},
    "ent_coef": {"ent_coef": 0.5},
    "target_update_interval": {"target_update_interval": 2},
    "target_entropy": {"target_entropy": -9.0},
    "policy_kwargs": {"policy_kwargs": {"activation_fn": th.nn.Tanh}},
    "seed": {"seed": 1},
    "qf_learning_rate": {"qf_learning_rate": 1e-2},
    "offline_learning_rate": {"offline_learning_rate": 1e-2},
    "offline_qf_learning_rate": {"offline_qf_learning_rate": 1e-2},
    "offline_gradient_steps": {"offline_gradient_steps": 6},
    "offline_ent_coef": {"offline_ent_coef": 0.5},
    "offline_batch_size": {"offline_batch_size": 9},
    "offline_bc_steps": {"offline_bc_steps": 1},
    "cql_alpha": {"cql_alpha": 1.0},
    "cql_n_actions": {"cql_n_actions": 3},
    "cql_temp": {"cql_temp": 2.0},
    "cql_target_action_gap": {"cql_target_action_gap": 9.0},
    "cql_sampled_gradient": {"cql_sampled_gradient": False},
    "cql_alpha_online": {"cql_alpha_online": 1.0},
    "calql": {"calql": True},
    "target_q": {"target_q": "mean"},
    "first_update_multiplier": {"first_update_multiplier": 2},
    "initial_online_fraction": {"initial_online_fraction": 0.1},
    "priority_temperature": {"priority_temperature": 1.0},
    "density_ratio_kwargs": {"density_ratio_kwargs": {"reference": "union"}},
}
# What other tests are about: nothing to compare, changes nothing in a result, or refused
ELSEWHERE = {"self", "policy", "env", "dataset", "stats_window_size", "tensorboard_log", "verbose", "device"}
ELSEWHERE |= {"_init_setup_model", "replay_buffer_class", "on_fault", "max_abs_q"}
REFUSED = {"optimize_memory_usage", "n_steps", "use_sde", "sde_sample_freq", "use_sde_at_warmup"}


def result_of_a_run(dataset: OfflineDataset, **kwargs: Any) -> dict[str, th.Tensor]:
    kwargs = {"offline_gradient_steps": 3, "first_update_multiplier": 1, **kwargs}
    return parameters_of(small_model(TinyEnv(), dataset=dataset, **kwargs).learn(10).policy)


@pytest.fixture(scope="module")
def baseline(dataset: OfflineDataset) -> dict[str, th.Tensor]:
    result = result_of_a_run(dataset)
    assert_same(result_of_a_run(dataset), result)
    return result


class TestNothingIsIgnored:
    @pytest.mark.parametrize("name", CHANGES)
    def test_argument_changes_the_result(self, dataset: OfflineDataset, baseline: dict[str, th.Tensor], name: str) -> None:
        with pytest.raises(AssertionError):
            assert_same(result_of_a_run(dataset, **CHANGES[name]), baseline)

    def test_every_argument_is_tested(self) -> None:
        assert set(CHANGES) | ELSEWHERE | REFUSED == set(parameters(Off2OnSAC.__init__))

    @pytest.mark.parametrize("name", sorted(REFUSED))
    def test_refused(self, name: str) -> None:
        kwargs: dict[str, Any] = {name: 3 if name.endswith(("steps", "freq")) else True}
        with pytest.raises(ValueError, match=f"{name}="):
            small_model(TinyEnv(), **kwargs)


# ---------------------------------------------------------------------- environments


def normalized(env: VecEnv, **kwargs: Any) -> VecNormalize:
    return VecNormalize(env, gamma=0.99, **kwargs)


def stacked(n_envs: int = 1) -> VecFrameStack:
    return VecFrameStack(tiny_envs(n_envs), n_stack=3)


def recorded(env: VecEnv, n_steps: int = 30) -> ReplayBuffer:
    """What SB3's own replay buffer holds after random play, with the wrappers of the environment."""
    model = SAC("MlpPolicy", env, buffer_size=100, learning_starts=n_steps, policy_kwargs={"net_arch": [4]})
    model.learn(n_steps)
    assert model.replay_buffer is not None
    return model.replay_buffer


VARIANTS: dict[str, Callable[[], Any]] = {
    "environment": TinyEnv,
    "time limit": lambda: gym.make("Pendulum-v1", max_episode_steps=4),
    "DummyVecEnv": lambda: tiny_envs(3),
    "SubprocVecEnv": lambda: SubprocVecEnv([TinyEnv, TinyEnv], start_method="fork"),
    "VecMonitor": lambda: VecMonitor(tiny_envs(2)),
    "VecNormalize": lambda: normalized(tiny_envs(2)),
    "VecNormalize of a dict": lambda: normalized(tiny_envs(2, observation_space=DICT_SPACE), norm_obs_keys=["speed"]),
    "VecFrameStack": lambda: stacked(2),
    "dict": lambda: TinyEnv(DICT_SPACE),
    "dict with an image": lambda: TinyEnv(spaces.Dict(image=IMAGE_SPACE, speed=spaces.Box(-1, 1, (1,)))),
    "channel-last images": lambda: TinyEnv(IMAGE_SPACE),
    "channel-first images": lambda: tiny_envs(2, observation_space=CHANNEL_FIRST),
    "action bounds": lambda: TinyEnv(action_space=spaces.Box(np.array([-2, 0], np.float32), np.array([5, 1], np.float32))),
    "action matrix": lambda: TinyEnv(action_space=spaces.Box(-2, 2, (2, 2))),
    "float64": lambda: TinyEnv(spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (2,), np.float64)),
}


def policy_for(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space.dtype == np.uint8 else "MlpPolicy"


@pytest.mark.parametrize("with_dataset", [True, False], ids=["dataset", "no dataset"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_environments(variant: str, with_dataset: bool, tmp_path: Path) -> None:
    """Both phases, saved, loaded, and on from there."""
    env = VARIANTS[variant]()
    dataset = make_dataset(2, 10, env=env) if with_dataset else None
    kwargs: dict[str, Any] = {"learning_starts": 2, "first_update_multiplier": 1, "batch_size": 4, "dataset": dataset}
    model = small_model(env, policy_for(env.observation_space), **kwargs)
    if with_dataset:
        model.learn_offline(gradient_steps=2)
    model.learn(4)
    assert model._n_updates > 0
    vec_env = model.get_env()
    assert vec_env is not None
    observations = vec_env.reset()
    actions, _ = model.predict(observations, deterministic=True)  # type: ignore[arg-type]
    assert actions.shape == (vec_env.num_envs, *env.action_space.shape)
    assert all(env.action_space.contains(action.astype(env.action_space.dtype)) for action in actions)

    model.save(tmp_path / "model")
    loaded = Off2OnSAC.load(tmp_path / "model", env=env, device="cpu", dataset=dataset)
    np.testing.assert_array_equal(loaded.predict(observations, deterministic=True)[0], actions)  # type: ignore[arg-type]
    loaded.learn(3, reset_num_timesteps=False)
    assert loaded._n_updates > model._n_updates
    vec_env.close()


class TestEnvironments:
    def test_time_limit_is_no_end_of_the_task(self) -> None:
        """Environment and dataset alike: a truncated row bootstraps."""
        env = TinyEnv(length=2)  # terminated and truncated by turns
        model = small_model(env, dataset=make_dataset(2, 5, env=env), learning_starts=0)
        model.learn(8)
        online = model.replay_buffer._get_samples(model.replay_buffer.n_offline + np.arange(8)).dones.flatten()
        assert model.replay_buffer.dones[:8].sum() == 4
        assert online.sum() == 2
        offline = model.replay_buffer._get_samples(np.arange(10)).dones.flatten()
        assert offline.nonzero().flatten().tolist() == [4]

    def test_vec_normalize_saved_and_loaded(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """A loaded model sees what the saved one saw: statistics come back, and are not taken from the dataset again."""
        env = normalized(tiny_envs(2), norm_reward=True)
        model = small_model(env, dataset=dataset)
        model.learn_offline(gradient_steps=2).learn(6)
        env.save(str(tmp_path / "statistics.pkl"))
        model.save(tmp_path / "model")
        loaded_env = VecNormalize.load(str(tmp_path / "statistics.pkl"), tiny_envs(2))
        loaded = Off2OnSAC.load(tmp_path / "model", env=loaded_env, device="cpu", dataset=dataset, seed=None)
        batches = []
        for one in (model, loaded):
            rows: Any = one.replay_buffer._get_samples(np.arange(20), one.get_vec_normalize_env())
            batches.append([rows.observations.numpy(), rows.next_observations.numpy(), rows.rewards.numpy()])
        assert_same(batches[0], batches[1])
        assert np.abs(batches[0][0]).mean() > 0.5  # normalised: between -1 and 1 before

    def test_both_parts_are_normalised_alike(self, dataset: OfflineDataset) -> None:
        """The same transition, in the dataset and collected, is the same row of a batch."""
        env = normalized(tiny_envs(), norm_reward=True)
        model = small_model(env, dataset=dataset)
        model.learn_offline(gradient_steps=1)
        one: dict[str, Any] = {
            "obs": dataset.observations[:1],  # type: ignore[index]
            "next_obs": dataset.next_observations[:1],  # type: ignore[index]
            "action": model.policy.scale_action(dataset.actions[:1]),
            "reward": dataset.rewards[:1],
            "done": dataset.terminations[:1],
        }
        model.replay_buffer.add(**one, infos=[{}])
        rows: Any = model.replay_buffer._get_samples(np.array([0, model.replay_buffer.n_offline]), env)
        for values in (rows.observations, rows.next_observations, rows.actions, rows.rewards, rows.dones):
            np.testing.assert_array_equal(values[0], values[1])

    @pytest.mark.parametrize("wrap", [stacked, lambda: normalized(tiny_envs(2))], ids=["VecFrameStack", "VecNormalize"])
    def test_dataset_recorded_with_the_wrappers(self, wrap: Callable[[], VecEnv]) -> None:
        """SB3's replay buffer of such an environment. VecNormalize leaves the stored observations as they are."""
        model = small_model(wrap(), dataset=recorded(wrap()))
        model.learn_offline(gradient_steps=2).learn(6)
        assert model._n_updates > 0

    def test_dataset_recorded_without_stacking(self, dataset: OfflineDataset) -> None:
        with pytest.raises(ValueError, match=r"observation space Box\(.*\(3,\).* is not the environment's Box\(.*\(9,\)"):
            small_model(stacked(), dataset=dataset)

    def test_replay_buffer_without_its_own(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """A user who sets the model's empty buffer to None before loading another does not hold two at a time."""
        model = small_model(TinyEnv(), dataset=dataset)
        model.learn_offline(gradient_steps=1).learn(8)
        model.save_replay_buffer(tmp_path / "replay")
        observations, priorities = model.replay_buffer.observations.copy(), model.replay_buffer.priorities(np.arange(308))
        model.replay_buffer = None  # type: ignore[assignment]
        model.load_replay_buffer(tmp_path / "replay")
        np.testing.assert_array_equal(model.replay_buffer.observations, observations)
        np.testing.assert_array_equal(model.replay_buffer.priorities(np.arange(308)), priorities)
        model.learn(3)


# ---------------------------------------------------------------------- callbacks and logs


class Dumps(KVWriter):
    """A log output that keeps what it is given: the step, and the values, of each dump."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.steps.append(step)
        self.values.append(dict(key_values))

    @staticmethod
    def of(model: Off2OnSAC) -> "Dumps":
        dumps = Dumps()
        model.set_logger(Logger(None, [dumps]))
        return dumps


class Spy(BaseCallback):
    """Keeps what a function returns at each call."""

    def __init__(self, function: Callable[[BaseCallback], Any]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[Any] = []

    def _on_step(self) -> bool:
        self.calls.append(self.function(self))
        return True


def scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of every scalar in the event files of a run, which must hold nothing else."""
    events = EventAccumulator(str(folder)).Reload()
    assert not events.Tags()["histograms"]
    assert not events.Tags()["tensors"]
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class TestCallbacks:
    def test_a_call_stands_for_n_envs_steps(self, dataset: OfflineDataset) -> None:
        """In both phases; the last one offline for those that are left."""
        spy = Spy(lambda callback: callback.num_timesteps)
        model = small_model(tiny_envs(3), dataset=dataset)
        model.learn_offline(gradient_steps=7, callback=spy)
        assert (model.num_timesteps, model._n_offline_updates) == (7, 7)
        model.learn(6, callback=spy)
        assert spy.calls == [3, 6, 7, 10, 13]

    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("form", ["argument", "instance", "list"])
    def test_progress_bar(self, monkeypatch: pytest.MonkeyPatch, dataset: OfflineDataset, n_envs: int, form: str) -> None:
        """SB3's, asked for or passed: each phase has a bar of its own steps, and fills it."""
        monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", FakeBar)
        FakeBar.bars = []
        model = small_model(tiny_envs(n_envs), dataset=dataset, offline_gradient_steps=6)
        bar = ProgressBarCallback()
        forms: dict[str, dict[str, Any]] = {
            "argument": {"progress_bar": True},
            "instance": {"callback": bar},
            "list": {"callback": [bar]},
        }
        model.learn(9, **forms[form])
        model.learn_offline(gradient_steps=3, **forms[form])
        model.learn(9, reset_num_timesteps=False, **forms[form])
        assert [(bar.total, bar.done) for bar in FakeBar.bars] == [(6, 6), (9, 9), (3, 3), (9, 9)]
        assert all(bar.closed for bar in FakeBar.bars)

    def test_checkpoints(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """Evenly spaced over both phases with SB3's advice for several environments; each can be gone on from."""
        n_envs = 2
        callback = CheckpointCallback(
            save_freq=max(4 // n_envs, 1), save_path=str(tmp_path), save_replay_buffer=True, save_vecnormalize=True
        )
        model = small_model(normalized(tiny_envs(n_envs)), dataset=dataset)
        model.learn_offline(gradient_steps=8, callback=callback)
        model.learn(8, callback=callback)
        names = {"": "zip", "replay_buffer_": "pkl", "vecnormalize_": "pkl"}
        expected = {f"rl_model_{kind}{n}_steps.{end}" for kind, end in names.items() for n in (4, 8, 12, 16)}
        assert {path.name for path in tmp_path.iterdir()} == expected
        for n_steps in (4, 12):
            env = VecNormalize.load(str(tmp_path / f"rl_model_vecnormalize_{n_steps}_steps.pkl"), tiny_envs(n_envs))
            loaded = Off2OnSAC.load(tmp_path / f"rl_model_{n_steps}_steps", env=env, device="cpu", dataset=dataset)
            loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{n_steps}_steps.pkl")
            assert (loaded.num_timesteps, loaded._n_offline_updates) == (n_steps, min(n_steps, 8))
            # SB3 stores a transition after the callbacks of its step
            assert loaded.replay_buffer.size() == (0 if n_steps == 4 else 1)
            loaded.learn(8, reset_num_timesteps=False)
            assert loaded.num_timesteps == n_steps + 8

    @pytest.mark.parametrize("phase", ["offline", "online"])
    def test_reward_threshold_stops_either_phase(self, dataset: OfflineDataset, phase: str) -> None:
        stop = StopTrainingOnRewardThreshold(reward_threshold=-1e9)
        callback = EvalCallback(
            normalized(tiny_envs(), training=False),
            eval_freq=3,
            n_eval_episodes=1,
            callback_on_new_best=stop,
            warn=False,
            verbose=0,
        )
        model = small_model(normalized(tiny_envs()), dataset=dataset)
        if phase == "offline":
            model.learn_offline(gradient_steps=20, callback=callback)
        else:
            model.learn_offline(gradient_steps=2).learn(20, callback=callback)
        assert model.num_timesteps == (3 if phase == "offline" else 2 + 3)
        # Evaluated with the statistics of the training environment
        statistics: list[Any] = [callback.eval_env.obs_rms, model.get_vec_normalize_env().obs_rms]  # type: ignore
        np.testing.assert_array_equal(statistics[0].mean, statistics[1].mean)

    @pytest.mark.parametrize("how", ["two calls", "learn()", "log_interval of the phase"])
    @pytest.mark.parametrize("n_envs", [1, 2])
    def test_log_every_n_timesteps(self, dataset: OfflineDataset, n_envs: int, how: str) -> None:
        """Evenly over both phases, and nothing between or twice."""
        callback = LogEveryNTimesteps(4)
        offline_gradient_steps = 10 if how == "learn()" else 0
        model = small_model(tiny_envs(n_envs), dataset=dataset, offline_gradient_steps=offline_gradient_steps)
        dumps = Dumps.of(model)
        steps = [4, 8, 12, 16, 20]
        if how == "two calls":
            model.learn_offline(gradient_steps=10, callback=callback, log_interval=None)
        elif how == "log_interval of the phase":
            # Also logs what is left at its end, but not again what the callback has logged
            model.learn_offline(gradient_steps=10, callback=callback, log_interval=4)
            steps = [4, 8, 10, 12, 16, 20]
        model.learn(10, callback=callback, log_interval=None)  # type: ignore[arg-type]
        assert dumps.steps == steps

    def test_offline_logs_end_with_their_phase(self, dataset: OfflineDataset) -> None:
        """Also where a callback stops it."""
        model = small_model(TinyEnv(), dataset=dataset)
        dumps = Dumps.of(model)
        model.learn_offline(gradient_steps=20, log_interval=4, callback=lambda *_: model.num_timesteps < 6)
        assert dumps.steps == [4, 6]
        model.learn(10, log_interval=1)
        assert all("offline/q_data" in values for values in dumps.values[:2])
        assert dumps.steps[2:]
        assert not any("offline/q_data" in values for values in dumps.values[2:])

    def test_locals(self, dataset: OfflineDataset, capsys: pytest.CaptureFixture[str]) -> None:
        """What SB3's callbacks and those of its users' habits read, in both phases."""
        names = ("self", "dones", "infos", "total_timesteps", "tb_log_name", "callback")
        spy = Spy(lambda callback: [callback.locals[name] for name in names])
        model = small_model(tiny_envs(2, length=3), dataset=dataset)
        callbacks = [spy, StopTrainingOnMaxEpisodes(2, verbose=1)]
        model.learn_offline(gradient_steps=4, callback=callbacks)
        model.learn(50, callback=callbacks)
        for algorithm, dones, infos, _, tb_log_name, _ in spy.calls:
            assert algorithm is model
            assert (len(dones), len(infos), tb_log_name) == (2, 2, "Off2OnSAC")
        assert [total for _, _, _, total, _, _ in spy.calls] == [4] * 2 + [4 + 50] * 6
        assert "the Off2OnSAC model reached max_episodes=2" in capsys.readouterr().out

    def test_children_of_events(self, dataset: OfflineDataset) -> None:
        spy = Spy(lambda callback: (callback.num_timesteps, len(callback.locals["dones"])))
        callback = EveryNTimesteps(4, spy)
        model = small_model(tiny_envs(2), dataset=dataset)
        model.learn_offline(gradient_steps=8, callback=callback)
        model.learn(8, callback=callback)
        assert spy.calls == [(4, 2), (8, 2), (12, 2), (16, 2)]


class TestTensorBoard:
    def test_one_axis(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """Offline before online, and every curve goes forwards, whoever writes to it: the phases and the callbacks."""
        evaluations = EvalCallback(VecMonitor(tiny_envs()), eval_freq=3, n_eval_episodes=1, warn=False, verbose=0)
        callbacks: list[BaseCallback] = [evaluations, LogEveryNTimesteps(4)]
        env = VecMonitor(tiny_envs(2))
        model = small_model(env, dataset=dataset, tensorboard_log=str(tmp_path), cql_target_action_gap=1.0)
        model.learn_offline(gradient_steps=13, callback=callbacks, log_interval=5)
        model.learn(30, callback=callbacks, log_interval=None)  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == ["Off2OnSAC_1"]
        steps = scalars(tmp_path / "Off2OnSAC_1")
        for tag, of_tag in steps.items():
            assert of_tag == sorted(set(of_tag)), tag
            assert (max(of_tag) <= 13) if tag.startswith("offline/") else (max(of_tag) > 13), tag
        assert min(steps["eval/mean_reward"]) < 13
        assert min(steps["train/critic_loss"] + steps["rollout/ep_rew_mean"] + steps["density_ratio/loss"]) > 13

    def test_tensors_are_read_before_anyone_writes_them(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """SB3 writes a recorded tensor as a histogram, and ``EvalCallback`` dumps the logs on its own."""
        evaluations = EvalCallback(TinyEnv(), eval_freq=2, n_eval_episodes=1, warn=False, verbose=0)
        model = small_model(TinyEnv(), dataset=dataset, tensorboard_log=str(tmp_path))
        train_offline = model.train_offline

        def recording(gradient_steps: int, batch_size: int) -> None:
            train_offline(gradient_steps, batch_size)
            model.logger.record_mean("offline/update", th.tensor(float(model._n_offline_updates)))  # type: ignore[arg-type]

        model.train_offline = recording  # type: ignore[method-assign]
        for _ in range(2):
            model.learn_offline(gradient_steps=4, log_interval=3, callback=evaluations)
        events = EventAccumulator(str(tmp_path / "Off2OnSAC_1")).Reload()
        assert not events.Tags()["histograms"]
        expected = [(2, 1.5), (3, 3.0), (4, 4.0), (6, 5.5), (8, 7.5)]
        assert [(event.step, event.value) for event in events.Scalars("offline/update")] == expected

    def test_runs_side_by_side(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """Each goes on in its own folder. SB3 would take the latest one for both."""
        models = [small_model(TinyEnv(), dataset=dataset, tensorboard_log=str(tmp_path)) for _ in range(2)]
        for model in models:
            model.learn_offline(gradient_steps=2)
        for model in models:
            model.learn(6, log_interval=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Off2OnSAC_1", "Off2OnSAC_2"]
        for folder in tmp_path.iterdir():
            assert {"offline/q_data", "rollout/ep_rew_mean"} <= set(scalars(folder))

    def test_names(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """One run of the given name, or of the class; two names are two runs."""

        class Derived(Off2OnSAC):
            pass

        for folder, offline, online, expected in [
            ("default", {}, {}, ["Derived_1"]),
            ("named", {"tb_log_name": "mine"}, {"tb_log_name": "mine"}, ["mine_1"]),
            ("two", {}, {"tb_log_name": "mine"}, ["Derived_1", "mine_1"]),
        ]:
            kwargs = small_kwargs(dataset=dataset, tensorboard_log=str(tmp_path / folder))
            model = Derived("MlpPolicy", TinyEnv(), **kwargs)
            model.learn_offline(gradient_steps=1, **offline)  # type: ignore[arg-type]
            model.learn(6, log_interval=1, **online)  # type: ignore[arg-type]
            assert sorted(path.name for path in (tmp_path / folder).iterdir()) == expected

    def test_loaded_model_goes_on_in_the_run(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """As in SB3."""
        model = small_model(TinyEnv(), dataset=dataset, tensorboard_log=str(tmp_path / "logs"))
        model.learn_offline(gradient_steps=2)
        model.save(tmp_path / "model")
        loaded = Off2OnSAC.load(tmp_path / "model", env=TinyEnv(), device="cpu", dataset=dataset)
        loaded.learn(10, log_interval=1)
        assert [path.name for path in (tmp_path / "logs").iterdir()] == ["Off2OnSAC_1"]
        steps = scalars(tmp_path / "logs" / "Off2OnSAC_1")
        assert steps["offline/q_data"] == [2]
        assert steps["rollout/ep_rew_mean"] == [7, 12]


class SuccessEnv(TinyEnv):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "is_success": terminated}


class TestLogs:
    def test_every_key_is_documented(self, dataset: OfflineDataset) -> None:
        """And every documented key is logged, by some configuration."""
        with_scores = replace(dataset, ref_min_score=-1.0, ref_max_score=1.0)
        configurations: list[dict[str, Any]] = [
            {"dataset": with_scores, "cql_target_action_gap": 1.0, "cql_alpha_online": 1.0},
            {"dataset": dataset, "ent_coef": 0.1, "replay_buffer_kwargs": {"scheme": "uniform"}, "calql": True},
            {"dataset": dataset, "density_ratio_kwargs": {"reference": "union"}, "qf_learning_rate": 1e-3},
            {"dataset": None},
        ]
        seen: set[str] = set()
        for kwargs in configurations:
            model = small_model(SuccessEnv(), **kwargs)
            dumps = Dumps.of(model)
            if kwargs["dataset"] is not None:
                model.learn_offline(gradient_steps=2).fit_fqe(gradient_steps=1)
            model.learn(11, log_interval=1)
            seen |= {key for values in dumps.values for key in values}
        assert {row[0].strip("`") for row in table("modules/off2on_sac.md", "Logged values")} == seen

    def test_normalized_score(self, dataset: OfflineDataset) -> None:
        """That of the mean return, and only where the dataset has both references."""
        model = small_model(TinyEnv(), dataset=replace(dataset, ref_min_score=-2.0, ref_max_score=3.0))
        dumps = Dumps.of(model)
        model.learn_offline(gradient_steps=2).learn(10, log_interval=1)
        assert ["rollout/normalized_score" in values for values in dumps.values] == [False, True, True]
        for values in dumps.values[1:]:
            expected = 100 * (values["rollout/ep_rew_mean"] + 2.0) / 5.0
            assert values["rollout/normalized_score"] == pytest.approx(expected)
        for without in (dataset, replace(dataset, ref_min_score=-2.0), None):
            model = small_model(TinyEnv(), dataset=without)
            dumps = Dumps.of(model)
            model.learn(10, log_interval=1)
            assert dumps.steps
            assert not any("rollout/normalized_score" in values for values in dumps.values)


# ---------------------------------------------------------------------- deployment


class TestDeployment:
    @pytest.mark.parametrize("space", [OBSERVATIONS, IMAGE_SPACE, DICT_SPACE], ids=["array", "image", "dict"])
    def test_policy_and_actor_on_their_own(self, space: spaces.Space, tmp_path: Path) -> None:
        """SB3's ``policy.save()`` and ``actor.save()``."""
        model = small_model(TinyEnv(space, spaces.Box(-2, 3, (2,))), policy_for(space))
        observation = model.observation_space.sample()
        expected, _ = model.predict(observation, deterministic=True)
        model.policy.save(str(tmp_path / "policy"))
        model.actor.save(str(tmp_path / "actor"))
        policy = type(model.policy).load(str(tmp_path / "policy"))
        actor = EnsembleActor.load(str(tmp_path / "actor"))
        np.testing.assert_array_equal(policy.predict(observation, deterministic=True)[0], expected)
        np.testing.assert_array_equal(actor.predict(observation, deterministic=True)[0], expected)
        assert_same(parameters_of(actor), parameters_of(model.actor))

    @pytest.mark.filterwarnings("ignore")  # those of the exporter
    def test_older_onnx_exporter(self, tmp_path: Path) -> None:
        model = small_model(TinyEnv())
        observation = model.observation_space.sample()
        obs_tensor, _ = model.policy.obs_to_tensor(observation)
        file = str(tmp_path / "actor.onnx")
        th.onnx.export(model.actor, (obs_tensor, True), file, input_names=["observation"], dynamo=False)
        (action,) = onnxruntime.InferenceSession(file).run(None, {"observation": observation[None]})
        expected, _ = model.predict(observation, deterministic=True)
        np.testing.assert_allclose(model.policy.unscale_action(action[0]), expected, atol=1e-5)

    # Seconds each: PyTorch's exporter. The page's own block is the test of MlpPolicy
    @pytest.mark.filterwarnings("ignore")  # those of the exporter
    @pytest.mark.parametrize(
        "space",
        [IMAGE_SPACE, spaces.Dict(image=IMAGE_SPACE, speed=spaces.Box(-1, 1, (1,)))],
        ids=["CnnPolicy", "MultiInputPolicy"],
    )
    def test_onnx(self, space: spaces.Space, tmp_path: Path) -> None:
        """The recipe of the documentation, with features extractors that have parameters."""
        (block,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "export.md").read_text(), flags=re.DOTALL | re.MULTILINE)
        namespace: dict[str, Any] = {}
        exec(block.split("\nmodel = ")[0], namespace)
        # Tanh's middle, where a difference shows
        model = small_model(TinyEnv(space, spaces.Box(-2, 3, (2,))), policy_for(space), policy_kwargs={"ensemble_size": 3})
        observation, _ = model.policy.obs_to_tensor(model.observation_space.sample())
        file = str(tmp_path / "policy.onnx")
        th.onnx.export(
            namespace["OnnxablePolicy"](model.policy).eval(),
            kwargs={"observation": observation},
            f=file,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file)
        actions = []
        for _ in range(2):
            sample: Any = model.observation_space.sample()
            named = {"observation": sample} if space is IMAGE_SPACE else {f"observation_{key}": sample[key] for key in sample}
            (action,) = session.run(None, {key: value[None] for key, value in named.items()})
            expected, _ = model.predict(sample, deterministic=True)
            np.testing.assert_allclose(action[0], expected, atol=1e-5)
            actions.append(action)
        assert np.abs(actions[0] - actions[1]).max() > 1e-4

    @pytest.mark.parametrize("how", ["policy", "in place"])
    def test_compile(self, dataset: OfflineDataset, how: str, tmp_path: Path) -> None:
        """Backends that need a C++ compiler are PyTorch's own business."""
        model = small_model(TinyEnv(), dataset=dataset)
        expected, _ = model.predict(dataset.observations[:3], deterministic=True)  # type: ignore[index]
        if how == "policy":
            model.policy = th.compile(model.policy, backend="eager")  # type: ignore[assignment]
        else:
            model.policy.compile(backend="eager")
        with th.no_grad():
            scaled = model.policy(th.as_tensor(dataset.observations[:3]), deterministic=True)  # type: ignore[index]
        np.testing.assert_allclose(model.policy.unscale_action(scaled.numpy()), expected, atol=1e-6)
        model.learn_offline(gradient_steps=1).learn(5)
        model.save(tmp_path / "model")
        loaded = Off2OnSAC.load(tmp_path / "model", env=TinyEnv(), device="cpu", dataset=dataset)
        assert_same(loaded.get_parameters(), model.get_parameters())
        assert not any("_orig_mod" in name for name in loaded.get_parameters()["policy"])
        loaded.learn(2, reset_num_timesteps=False)


# ---------------------------------------------------------------------- in another order than usual


class TestOrder:
    def test_vec_normalize_after_the_dataset(self, dataset: OfflineDataset) -> None:
        model = small_model(TinyEnv(), dataset=dataset)
        model.set_env(normalized(tiny_envs()))
        model.learn_offline(gradient_steps=1)
        statistics = model._vec_normalize_env
        assert statistics is not None
        assert not isinstance(statistics.obs_rms, dict)
        assert statistics.obs_rms.count > len(dataset.observations)

    def test_calql_and_normalized_rewards(self, dataset: OfflineDataset) -> None:
        model = small_model(TinyEnv(), dataset=dataset, calql=True)
        model.set_env(normalized(tiny_envs()))
        with pytest.raises(ValueError, match="`calql=True` compares Q-values with the dataset's returns"):
            model.learn_offline(gradient_steps=1)

    def test_no_environment(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        small_model(TinyEnv()).save(tmp_path / "model")
        for train in (lambda model: model.learn(1), lambda model: model.learn_offline(gradient_steps=1)):
            with pytest.raises(ValueError, match=r"The model has no environment: pass `env` to load\(\)"):
                train(Off2OnSAC.load(tmp_path / "model", dataset=dataset))

    def test_logger_can_be_closed(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        model = small_model(TinyEnv(), dataset=dataset)
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn_offline(gradient_steps=2).learn(6)
        model.logger.close()
        assert (tmp_path / "progress.csv").read_text()

    def test_no_logs_of_the_offline_phase_online(self, dataset: OfflineDataset) -> None:
        model = small_model(TinyEnv(), dataset=dataset)
        dumps = Dumps.of(model)
        model.learn_offline(gradient_steps=2, log_interval=None).learn(12, log_interval=1)
        assert dumps.values
        assert not [key for values in dumps.values for key in values if key.startswith("offline/")]

    def test_saved_in_the_first_rollout(self, dataset: OfflineDataset, tmp_path: Path) -> None:
        """Without its replay buffer it starts over: the first update needs its rows."""
        model = small_model(TinyEnv(), dataset=dataset, learning_starts=10)
        model.learn_offline(gradient_steps=1)
        model.learn(10, callback=lambda locals_, _: locals_["self"].num_timesteps < 5)
        model.save(tmp_path / "model")
        loaded = Off2OnSAC.load(tmp_path / "model", env=TinyEnv(), dataset=dataset)
        rows = Spy(lambda spy: (spy.model.replay_buffer.n_online, spy.model._n_updates))  # type: ignore[attr-defined]
        loaded.learn(11, rows, reset_num_timesteps=False)
        assert next(n_rows for n_rows, n_updates in rows.calls if n_updates > 0) >= 10

    def test_offline_phase_of_assembled_members(self, dataset: OfflineDataset) -> None:
        model = small_model(TinyEnv(), dataset=dataset, offline_gradient_steps=2)
        model.set_member(0, model.get_member(1))
        assert model.learn(1)._n_offline_updates == 2


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"first_update_multiplier": 2.5}, "`first_update_multiplier` must be an integer, got 2.5"),
        ({"offline_batch_size": 2.5}, "`offline_batch_size` must be an integer, got 2.5"),
        ({"offline_gradient_steps": float("inf")}, "`offline_gradient_steps` must be finite, got inf"),
        ({"learning_starts": -5}, "`learning_starts` must be at least 0, got -5"),
        ({"target_update_interval": 0}, "`target_update_interval` must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        small_model(TinyEnv(), **kwargs)


def test_integers_written_as_floats(dataset: OfflineDataset) -> None:
    """1e6 is a float in YAML."""
    model = small_model(TinyEnv(), dataset=dataset, offline_gradient_steps=3.0, offline_batch_size=4.0)
    assert model.learn(1)._n_offline_updates == 3
    with pytest.raises(ValueError, match=r"`gradient_steps` must be an integer of at least 1, got 2\.5"):
        model.learn_offline(gradient_steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`log_interval` must be at least 1, got 0: use None for no logs"):
        model.learn_offline(gradient_steps=1, log_interval=0)


@pytest.mark.parametrize(
    ("policy", "space", "policy_class"),
    [
        (sac_policies.MlpPolicy, OBSERVATIONS, EnsembleCQLPolicy),
        (sac_policies.CnnPolicy, IMAGE_SPACE, EnsembleCnnPolicy),
        (sac_policies.MultiInputPolicy, DICT_SPACE, EnsembleMultiInputPolicy),
    ],
)
def test_policy_classes_of_sac(policy: Any, space: spaces.Space, policy_class: type) -> None:
    assert type(small_model(TinyEnv(space), policy).policy) is policy_class
