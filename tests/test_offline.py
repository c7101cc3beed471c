"""The two phases as a user sees them: ``learn_offline()``, then ``learn()``, with SB3's callbacks and logs around both."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    IMAGE_SPACE,
    TinyEnv,
    assert_same,
    make_dataset,
    parameters_of,
    small_kwargs,
    small_model,
)
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import SACPolicy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sb3_off2on import Off2OnSAC, load_dataset
from sb3_off2on.buffers import SCHEMES, initial_priority
from sb3_off2on.policies import EnsembleCnnPolicy, EnsembleCQLPolicy, EnsembleMultiInputPolicy


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset()


def pendulums(n_envs: int) -> Any:
    return make_vec_env("Pendulum-v1", n_envs=n_envs)


def tiny_envs(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: TinyEnv(**kwargs)] * n_envs)


def spy(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, before: Callable[[], Any] = lambda: None) -> list[Any]:
    """Record what ``before()`` returns at each call of a method, which goes on to do its work."""
    calls: list[Any] = []
    method = getattr(target, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append(before())
        return method(*args, **kwargs)

    monkeypatch.setattr(target, name, recording)
    return calls


def train_calls(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[tuple[int, int]]:
    """Environment steps stored at each call of ``train()``, and the updates that it did."""
    calls: list[tuple[int, int]] = []
    train = model.train

    def recording(*args: Any, **kwargs: Any) -> None:
        n_steps, n_updates = model.replay_buffer.size() * model.n_envs, model._n_updates
        train(*args, **kwargs)
        calls.append((n_steps, model._n_updates - n_updates))

    monkeypatch.setattr(model, "train", recording)
    return calls


def pretrain(model: Off2OnSAC, how: str) -> None:
    """Agents that an offline phase leaves, or that were trained elsewhere."""
    if how == "offline":
        model.learn_offline(gradient_steps=2)
    else:
        for index in range(model.policy.ensemble_size):
            model.set_member(index, model.policy.get_member(index))


class Recorder(BaseCallback):
    """Calls a function at each step, and one when training starts."""

    def __init__(
        self, on_step: Callable[[Any], Any] = lambda model: None, on_start: Callable[[Any], Any] = lambda model: None
    ) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.starts: list[Any] = []
        self.record_step, self.record_start = on_step, on_start

    def _on_training_start(self) -> None:
        self.starts.append(self.record_start(self.model))

    def _on_step(self) -> bool:
        self.steps.append(self.record_step(self.model))
        return True


class TestFirstUpdate:
    @pytest.mark.parametrize("how", ["offline", "members"])
    @pytest.mark.parametrize(
        ("n_envs", "learning_starts", "train_freq", "first_steps"),
        [
            (1, 4, 1, 4),
            (1, 4, 4, 4),
            (1, 4, 3, 4),
            (1, 4, 10, 4),
            (4, 8, 2, 8),
            (4, 6, 1, 8),  # the first multiple of n_envs
            (1, 4, (1, "episode"), 4),
        ],
    )
    def test_at_learning_starts(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dataset: Any,
        how: str,
        n_envs: int,
        learning_starts: int,
        train_freq: Any,
        first_steps: int,
    ) -> None:
        """5 times ``learning_starts`` updates at that many environment steps, played by the agents; then as in SB3."""
        env = pendulums(n_envs) if isinstance(train_freq, int) else gym.make("Pendulum-v1", max_episode_steps=6)
        model = small_model(
            env,
            dataset=dataset if how == "offline" else None,
            learning_starts=learning_starts,
            train_freq=train_freq,
            gradient_steps=-1,
            first_update_multiplier=5,
        )
        pretrain(model, how)
        random_actions = spy(monkeypatch, model.action_space, "sample")
        predictions = spy(monkeypatch, model, "predict")
        calls = train_calls(monkeypatch, model)
        rollout_steps = 6 if isinstance(train_freq, tuple) else n_envs * train_freq
        model.learn(first_steps + 2 * rollout_steps)
        assert calls[0] == (first_steps, 5 * learning_starts)
        if isinstance(train_freq, tuple):  # the first rollout stopped 2 steps before the end of an episode
            assert calls[1:3] == [(6, 2), (12, 6)]
        else:
            assert calls[1:] == [(first_steps + (i + 1) * rollout_steps, rollout_steps) for i in range(2)]
        assert not random_actions
        assert len(predictions) == model.replay_buffer.size()

    @pytest.mark.parametrize("how", ["offline", "members"])
    def test_no_warm_up(self, monkeypatch: pytest.MonkeyPatch, dataset: Any, how: str) -> None:
        """With ``learning_starts=0``, the first update is as many times longer than others (here twice)."""
        model = small_model(dataset=dataset, learning_starts=0, train_freq=3, gradient_steps=2)
        pretrain(model, how)
        calls = train_calls(monkeypatch, model)
        model.learn(6)
        assert calls == [(3, 4), (6, 2)]

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        """The updates that were made are not made again."""
        model = small_model(dataset=dataset)
        pretrain(model, "offline")
        sample, left = model.replay_buffer.sample, [5]

        def interrupted_sample(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return sample(*args, **kwargs)

        with monkeypatch.context() as context:
            context.setattr(model.replay_buffer, "sample", interrupted_sample)
            with pytest.raises(KeyboardInterrupt):
                model.learn(10)
        assert (model.num_timesteps - model._n_offline_updates, model._n_updates) == (4, 5)
        model.learn(2, reset_num_timesteps=False)
        assert model._n_updates == 5 + 2

    def test_environment_is_reset_once(self, dataset: Any) -> None:
        """When it is needed: an offline phase is hours, and a reset can be a motion of a robot."""
        env = Monitor(gym.make("Pendulum-v1"), allow_early_resets=False)
        model = small_model(env, dataset=dataset)
        model.learn_offline(gradient_steps=2)
        assert env.needs_reset
        model.learn(6)

    @pytest.mark.parametrize("how", ["offline", "members"])
    def test_no_training_with_gradient_steps_0(self, monkeypatch: pytest.MonkeyPatch, dataset: Any, how: str) -> None:
        """``gradient_steps=0`` means in SB3 that nothing is trained, e.g. to evaluate or to collect."""
        model = small_model(dataset=dataset, gradient_steps=0)
        pretrain(model, how)
        calls = train_calls(monkeypatch, model)
        model.learn(20)
        assert calls == []

    def test_after_an_interrupted_warm_up(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        """Steps collected before a callback stopped the warm-up count."""
        model = small_model(dataset=dataset, learning_starts=8)
        pretrain(model, "offline")
        calls = train_calls(monkeypatch, model)
        model.learn(20, callback=lambda *_: model.num_timesteps < 2 + 5)
        assert calls == []
        assert model.replay_buffer.size() == 4  # SB3 does not store the step at which it stops
        model.learn(10)
        assert calls[0] in [(7, 16), (8, 16)]

    @pytest.mark.parametrize(("n_envs", "train_freq"), [(1, 6), (1, 4), (4, 2), (1, 1)])
    def test_without_dataset_as_sac(self, monkeypatch: pytest.MonkeyPatch, n_envs: int, train_freq: int) -> None:
        """Uniform warm-up, and SB3's strict test: training waits until there are more than ``learning_starts`` steps."""
        common: dict[str, Any] = {
            "learning_starts": 6,
            "train_freq": train_freq,
            "gradient_steps": 2,
            "batch_size": 8,
            "seed": 0,
        }
        sac = SAC("MlpPolicy", pendulums(n_envs), policy_kwargs={"net_arch": [16]}, **common)
        calls, random_actions = [], []
        for model in (sac, small_model(pendulums(n_envs), **common)):
            calls.append(train_calls(monkeypatch, model))
            random_actions.append(spy(monkeypatch, model.action_space, "sample"))
            model.learn(16)
        assert calls[0] == calls[1]
        assert len(random_actions[0]) == len(random_actions[1]) >= 6

    def test_dataset_for_the_replay_alone(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        """Where nothing was pretrained, the warm-up is random as SB3's, and updates begin when it ends, without a multiple."""
        model = small_model(dataset=dataset)
        calls = train_calls(monkeypatch, model)
        random_actions = spy(monkeypatch, model.action_space, "sample")
        with pytest.warns(
            UserWarning, match="Nothing was pretrained, as `offline_gradient_steps` is 0: the dataset only serves"
        ):
            model.learn(7)
        assert calls == [(4, 1), (5, 1), (6, 1), (7, 1)]
        assert len(random_actions) == 4
        assert model.num_timesteps == 7
        assert not model.pretrained

    def test_every_learn_trains_whatever_was_counted_offline(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        """The counter goes back to the offline updates, and SB3 would wait for it to pass ``learning_starts`` again."""
        model = small_model(dataset=dataset, learning_starts=20)
        model.learn_offline(gradient_steps=2)
        model.learn(20)
        calls = train_calls(monkeypatch, model)
        model.learn(3)
        assert [n_updates for _, n_updates in calls] == [1, 1, 1]

    def test_rollouts_without_updates(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        """With ``gradient_steps=0`` only the first rollout is the first one."""
        model = small_model(dataset=dataset, learning_starts=4, train_freq=5, gradient_steps=0)
        model.learn_offline(gradient_steps=2)
        rollouts = spy(monkeypatch, model, "collect_rollouts", lambda: model.num_timesteps - 2)
        model.learn(14)
        assert rollouts == [0, 4, 9]


class TestCounterAndCallbacks:
    def test_one_counter(self, dataset: Any) -> None:
        recorder = Recorder(lambda model: model.num_timesteps)
        model = small_model(dataset=dataset)
        model.learn_offline(gradient_steps=5, callback=recorder)
        assert (model.num_timesteps, model._n_offline_updates, model._n_updates) == (5, 5, 0)
        model.learn(6, callback=recorder)
        assert recorder.steps == list(range(1, 12))
        assert (model.num_timesteps, model._n_offline_updates, model._n_updates) == (11, 5, 8 + 2)

    def test_learn_offline_adds_up(self, dataset: Any) -> None:
        model = small_model()
        model.learn_offline(dataset, gradient_steps=3).learn_offline(gradient_steps=2)
        assert (model.num_timesteps, model._n_offline_updates) == (5, 5)

    def test_second_learn(self, dataset: Any) -> None:
        """``reset_num_timesteps=False`` goes on; True goes back to the end of the offline phase."""
        model = small_model(dataset=dataset)
        model.learn_offline(gradient_steps=5)
        model.learn(6)
        model.learn(4, reset_num_timesteps=False)
        assert model.num_timesteps == 5 + 6 + 4
        model.learn(4, reset_num_timesteps=True)
        assert model.num_timesteps == 5 + 4
        assert model._n_updates == 8 + 2 + 4 + 4

    def test_counter_goes_on_after_another_offline_phase(self, dataset: Any) -> None:
        """Offline, online, offline, online: no number comes twice."""
        recorder = Recorder(lambda model: model.num_timesteps)
        model = small_model(dataset=dataset)
        for _ in range(2):
            model.learn_offline(gradient_steps=3, callback=recorder)
            model.learn(6, callback=recorder)
        assert recorder.steps == list(range(1, 19))

    def test_checkpoints_have_distinct_names(self, dataset: Any, tmp_path: Path) -> None:
        checkpoints = CheckpointCallback(save_freq=5, save_path=str(tmp_path))
        model = small_model(dataset=dataset)
        model.learn_offline(gradient_steps=10, callback=checkpoints)
        model.learn(10, callback=checkpoints)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"rl_model_{n}_steps.zip" for n in (10, 15, 20, 5)]

    def test_logs_are_evenly_spaced(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        model = small_model(dataset=dataset)
        logs = spy(monkeypatch, model, "dump_logs", lambda: model.num_timesteps)
        callback = LogEveryNTimesteps(4)
        model.learn_offline(gradient_steps=10, callback=callback, log_interval=None)
        model.learn(12, callback=callback, log_interval=10**6)
        assert logs == [4, 8, 12, 16, 20]

    @pytest.mark.parametrize(("log_interval", "logs"), [(3, [3, 6, 9]), (None, [])])
    def test_log_interval(self, monkeypatch: pytest.MonkeyPatch, dataset: Any, log_interval: Any, logs: list[int]) -> None:
        model = small_model(dataset=dataset)
        calls = spy(monkeypatch, model, "dump_logs", lambda: model.num_timesteps)
        model.learn_offline(gradient_steps=9, log_interval=log_interval)
        assert calls == logs

    @pytest.mark.parametrize("n_envs", [1, 2])
    def test_stop_on_max_episodes(self, n_envs: int) -> None:
        """No episode ends offline; online the callback counts as always."""
        env = tiny_envs(n_envs, length=3)
        model = small_model(env, dataset=make_dataset(env=TinyEnv()))
        callback = StopTrainingOnMaxEpisodes(max_episodes=4)
        model.learn_offline(gradient_steps=5, callback=callback)
        assert model.num_timesteps == 5
        model.learn(100, callback=callback)
        assert model.num_timesteps == 5 + 12 * n_envs

    def test_evaluations(self, tmp_path: Path) -> None:
        model = small_model(TinyEnv(), dataset=make_dataset(env=TinyEnv()))
        callback = EvalCallback(tiny_envs(), eval_freq=5, n_eval_episodes=1, log_path=str(tmp_path), verbose=0, warn=False)
        model.learn_offline(gradient_steps=10, callback=callback)
        model.learn(10, callback=callback)
        assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [5, 10, 15, 20]

    @pytest.mark.parametrize("progress_bar", [False, True])
    @pytest.mark.parametrize("form", ["callback", "list", "CallbackList", "function"])
    def test_forms_of_callbacks(self, monkeypatch: pytest.MonkeyPatch, dataset: Any, form: str, progress_bar: bool) -> None:
        """Each is initialised once a phase and called once a step."""
        monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", FakeBar)
        n_calls = n_inits = 0

        class Counter(BaseCallback):
            def _init_callback(self) -> None:
                nonlocal n_inits
                n_inits += 1

            def _on_step(self) -> bool:
                nonlocal n_calls
                n_calls += 1
                return True

        counter = Counter()

        def function(local_variables: dict[str, Any], global_variables: dict[str, Any]) -> bool:
            assert isinstance(local_variables["self"], Off2OnSAC)
            return counter._on_step()

        forms: dict[str, Any] = {
            "callback": counter,
            "list": [counter],
            "CallbackList": CallbackList([counter]),
            "function": function,
        }
        model = small_model(dataset=dataset)
        model.learn_offline(gradient_steps=3, callback=forms[form], progress_bar=progress_bar)
        assert n_calls == 3
        model.learn(4, callback=forms[form], progress_bar=progress_bar)
        assert n_calls == 7
        assert n_inits == (0 if form == "function" else 2)

    @pytest.mark.parametrize("form", ["function", "list"])
    def test_returning_false_stops_either_phase(self, dataset: Any, form: str) -> None:
        last = 4

        def stop(*_: Any) -> bool:
            return model.num_timesteps < last

        class Stop(BaseCallback):
            def _on_step(self) -> bool:
                return stop()

        callback: Any = stop if form == "function" else [Stop()]
        model = small_model(dataset=dataset)
        model.learn_offline(gradient_steps=10, callback=callback)
        assert (model.num_timesteps, model._n_offline_updates) == (4, 4)
        last = 10
        model.learn(100, callback=callback)
        assert model.num_timesteps == 10

    @pytest.mark.parametrize("last", [4, 6])
    def test_stop_of_the_offline_phase_stops_learn(self, dataset: Any, last: int) -> None:
        """Also where it is the phase's last update that a callback stops at."""
        model = small_model(dataset=dataset, offline_gradient_steps=6)
        model.learn(20, callback=lambda *_: model.num_timesteps < last)
        assert model.num_timesteps == last
        assert model.replay_buffer.size() == 0

    def test_learning_rates_fall_over_each_phase(self, dataset: Any) -> None:
        """A schedule sees the progress of its own phase; the rates are read where the optimizers have them."""

        def rates(model: Off2OnSAC) -> list[float]:
            optimizers = [model.actor.optimizer, model.critic.optimizer, model.offline_ent_coef_optimizer]
            assert model.ent_coef_optimizer is not None
            optimizers += [model.ent_coef_optimizer]
            return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

        model = small_model(
            dataset=dataset,
            learning_rate=lambda progress: progress,
            qf_learning_rate=lambda progress: 2 * progress,
            offline_learning_rate=lambda progress: 3 * progress,
            offline_qf_learning_rate=lambda progress: 4 * progress,
        )
        recorder = Recorder(rates)
        for _ in range(2):
            model.learn_offline(gradient_steps=5, callback=recorder)
        progress = 1 - np.arange(5) / 5
        for phase in (recorder.steps[:5], recorder.steps[5:]):
            np.testing.assert_allclose([step[0] for step in phase], 3 * progress)
            np.testing.assert_allclose([step[1] for step in phase], 4 * progress)
            np.testing.assert_allclose([step[2] for step in phase], 3 * progress)

        online = Recorder(rates)
        model.learn(10, callback=online)
        online.steps.append(rates(model))
        # After 4, 5, ..., 10 of 10 steps there is an update
        progress = 1 - np.arange(4, 11) / 10
        np.testing.assert_allclose([step[0] for step in online.steps[4:]], progress, atol=1e-12)
        np.testing.assert_allclose([step[1] for step in online.steps[4:]], 2 * progress, atol=1e-12)
        np.testing.assert_allclose([step[3] for step in online.steps[4:]], progress, atol=1e-12)

    def test_learning_rate_is_never_negative(self, dataset: Any) -> None:
        """The warm-up of pretrained agents is as long as ``learning_starts``, also where ``learn()`` is asked for less."""
        model = small_model(dataset=dataset, learning_rate=lambda progress: progress, learning_starts=8)
        model.learn_offline(gradient_steps=2)
        model.learn(3)
        assert model._n_updates == 16
        assert model.actor.optimizer.param_groups[0]["lr"] >= 0

    def test_tensorboard(self, dataset: Any, tmp_path: Path) -> None:
        """Both phases are one run, on one axis; a reset starts another."""
        model = small_model(TinyEnv(), dataset=make_dataset(env=TinyEnv()), tensorboard_log=str(tmp_path))
        model.learn_offline(gradient_steps=6, log_interval=3)
        model.learn(20, log_interval=1)
        assert [path.name for path in tmp_path.iterdir()] == ["Off2OnSAC_1"]
        events = EventAccumulator(str(tmp_path / "Off2OnSAC_1")).Reload()
        assert [event.step for event in events.Scalars("offline/q_data")] == [3, 6]
        online = [event.step for event in events.Scalars("train/critic_loss")]
        assert online[0] > 6 + 4
        assert online == sorted(online)
        assert {"offline/cql_gap", "density_ratio/loss", "replay/offline_fraction", "rollout/ep_rew_mean"} <= set(
            events.Tags()["scalars"]
        )
        model.learn(6)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Off2OnSAC_1", "Off2OnSAC_2"]

    def test_short_offline_phase_is_logged(self, dataset: Any, tmp_path: Path) -> None:
        """The updates after the last full ``log_interval`` are not lost, and do not appear among the online ones."""
        model = small_model(dataset=dataset, tensorboard_log=str(tmp_path))
        model.learn_offline(gradient_steps=5, log_interval=3)
        events = EventAccumulator(str(tmp_path / "Off2OnSAC_1")).Reload()
        assert [event.step for event in events.Scalars("offline/q_data")] == [3, 5]


class FakeBar:
    """What SB3's progress bar callbacks use of tqdm."""

    bars: list["FakeBar"] = []  # noqa: RUF012

    def __init__(self, total: int) -> None:
        self.total, self.done, self.closed = total, 0, False
        self.descriptions: list[tuple[int, str | None]] = []
        self.bars.append(self)

    def set_description(self, desc: str | None) -> None:
        self.descriptions.append((self.done, desc))

    def update(self, n: int) -> None:
        self.done += n

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class TestHandOver:
    @pytest.mark.parametrize("n_envs", [1, 2])
    def test_environments_that_were_used_in_between(self, n_envs: int) -> None:
        """As ``evaluate_policy(model, model.get_env())`` does: episodes begin anew, and every row is a step that was made."""
        env = tiny_envs(n_envs)
        model = small_model(env, dataset=make_dataset(env=TinyEnv()), learning_starts=6)
        model.learn_offline(gradient_steps=2)
        env.reset()
        for _ in range(3):
            env.step(np.zeros((n_envs, 2)))
        model.learn(6 * n_envs)
        buffer = model.replay_buffer
        assert (buffer.dones[4] == 1).all()  # episodes have five steps
        np.testing.assert_array_equal(buffer.next_observations[:4], buffer.observations[1:5])

    @pytest.mark.parametrize("ent_coef", ["auto", "auto_0.3"])
    def test_everything_is_fresh(self, dataset: Any, ent_coef: str) -> None:
        model = small_model(dataset=dataset, ent_coef=ent_coef, initial_online_fraction=0.6)
        model.learn_offline(gradient_steps=3)
        # Traces that must not survive
        assert model.log_ent_coef is not None
        assert model.density_ratio is not None
        model.log_ent_coef.data.fill_(-4.0)
        for parameter in model.density_ratio.parameters():
            parameter.data.fill_(7.0)
        model.replay_buffer.update_priorities(np.arange(len(dataset)), np.full(len(dataset), 9.0))
        assert all(network.optimizer.state for network in (model.actor, model.critic))
        before = parameters_of(model.actor), parameters_of(model.critic)

        def check(model: Off2OnSAC) -> None:
            assert model.ent_coef_optimizer is not None
            assert model.log_ent_coef is not None
            assert model.density_ratio is not None
            optimizers = [model.actor.optimizer, model.critic.optimizer]
            optimizers += [model.ent_coef_optimizer, model.density_ratio.optimizer]
            assert not any(optimizer.state for optimizer in optimizers)
            assert_same(parameters_of(model.critic_target), parameters_of(model.critic))
            assert_same((parameters_of(model.actor), parameters_of(model.critic)), before)
            assert model.log_ent_coef.exp().item() == pytest.approx(0.3 if ent_coef == "auto_0.3" else 1.0)
            assert model.ent_coef_optimizer.param_groups[0]["params"][0] is model.log_ent_coef
            assert not any((parameter == 7.0).all() for parameter in model.density_ratio.parameters())
            np.testing.assert_array_equal(model.replay_buffer.priorities(np.arange(len(dataset))), 1.0)
            assert model.replay_buffer.default_priority == pytest.approx(len(dataset) / 4 * 0.6 / 0.4)

        recorder = Recorder(on_start=check)
        model.learn(6, callback=recorder)
        assert len(recorder.starts) == 1
        # The optimizers that are stepped are those of the model
        assert all(network.optimizer.state for network in (model.actor, model.critic, model.density_ratio))

    @pytest.mark.parametrize("fraction", [0.25, 0.75])
    @pytest.mark.parametrize("n_phases", [1, 2])
    @pytest.mark.parametrize("kwargs", [{}, {"learning_starts": 0, "train_freq": 5}, {"buffer_size": 10}])
    def test_share_of_the_first_update(
        self, monkeypatch: pytest.MonkeyPatch, dataset: Any, fraction: float, n_phases: int, kwargs: dict[str, Any]
    ) -> None:
        """
        The first update draws online rows with probability rho, as priorities have not changed yet. The rows of an online
        phase before another offline one are online rows, too.
        """
        model = small_model(dataset=dataset, initial_online_fraction=fraction, **kwargs)
        for _ in range(n_phases - 1):
            model.learn_offline(gradient_steps=2).learn(20)
        model.learn_offline(gradient_steps=2)
        shares: list[float] = []

        def only_draw(gradient_steps: int, batch_size: int) -> None:
            shares.append(np.mean(model.replay_buffer.sample(4000).indices >= len(dataset)).item())

        monkeypatch.setattr(model, "train", only_draw)
        model.learn(4, reset_num_timesteps=False)
        assert shares == [pytest.approx(fraction, abs=0.01)]

    def test_once_after_each_offline_phase(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        model = small_model(dataset=dataset)
        hand_overs = spy(monkeypatch, model, "_hand_over")
        calls = train_calls(monkeypatch, model)
        model.learn_offline(gradient_steps=5)
        assert len(hand_overs) == 0
        model.learn(5)
        model.learn(2, reset_num_timesteps=False)
        model.learn(2)
        assert len(hand_overs) == 1
        assert [n_updates for _, n_updates in calls] == [8, 1, 1, 1, 1, 1]
        model.learn_offline(gradient_steps=2)
        model.learn(5, reset_num_timesteps=False)
        assert len(hand_overs) == 2
        # ``_n_updates`` starts anew, and so does the first update
        assert model._n_updates == 8 + 1

    def test_dataset_that_comes_late(self, dataset: Any) -> None:
        """Learning online, then attaching a dataset: its first balanced update has P0 as well."""
        model = small_model(initial_online_fraction=0.5)
        model.learn(20)
        model.set_dataset(dataset)
        model.learn(1, reset_num_timesteps=False)
        # About as many as balance the parts, where the default of a buffer is 1.0
        assert model.replay_buffer.default_priority > 0.5 * initial_priority(len(dataset), 20, 0.5)


class TestEntryPoints:
    def test_learn_pretrains_first_and_once(self, monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
        model = small_model(dataset=dataset, offline_gradient_steps=4)
        offline = spy(monkeypatch, model, "train_offline", lambda: model.replay_buffer.size())
        model.learn(6)
        assert offline == [0] * 4
        assert (model.num_timesteps, model._n_offline_updates, model._n_updates) == (10, 4, 8 + 2)
        model.learn(2, reset_num_timesteps=False)
        model.learn(2)
        assert len(offline) == 4

    def test_an_unfinished_offline_phase_is_completed(self, dataset: Any) -> None:
        model = small_model(dataset=dataset, offline_gradient_steps=6)
        model.learn(4, callback=lambda locals_, _: locals_["self"].num_timesteps < 2)
        assert (model._n_offline_updates, model._n_updates) == (2, 0)
        model.learn(4)
        assert model._n_offline_updates == 6
        assert model._n_updates > 0

    def test_learn_equals_the_two_calls(self, dataset: Any) -> None:
        one = small_model(dataset=dataset, offline_gradient_steps=4).learn(6)
        two = small_model(dataset=dataset).learn_offline(gradient_steps=4).learn(6)
        assert_same(one.get_parameters(), two.get_parameters())

    @pytest.mark.parametrize("offline_gradient_steps", [0, 4])
    def test_agents_from_elsewhere(self, dataset: Any, offline_gradient_steps: int) -> None:
        """They go through an offline phase only where one is asked for."""
        model = small_model(dataset=dataset, offline_gradient_steps=offline_gradient_steps)
        pretrain(model, "members")
        assert model.learn(10)._n_offline_updates == offline_gradient_steps

    def test_pretrain_offline_with_the_datasets_env(self, dataset: Any) -> None:
        recorder = Recorder(lambda model: model.num_timesteps)
        kwargs = self.without_gradient_steps(gamma=0.9, policy_kwargs={"ensemble_size": 3})
        model = Off2OnSAC.pretrain_offline(dataset, offline_gradient_steps=3, callback=recorder, **kwargs)
        assert isinstance(model, Off2OnSAC)
        assert type(model.policy) is EnsembleCQLPolicy
        assert recorder.steps == [1, 2, 3]
        env = model.get_env()
        assert env is not None
        assert env.envs[0].spec.id == "Pendulum-v1"  # type: ignore[attr-defined]
        assert (model.gamma, model.policy.ensemble_size, model._n_offline_updates) == (0.9, 3, 3)
        model.learn(4)
        assert model._n_updates == 8

    @staticmethod
    def without_gradient_steps(**kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in small_kwargs(**kwargs).items() if name != "gradient_steps"}

    def test_pretrain_offline_hides_no_argument_of_the_constructor(self) -> None:
        """An argument of the same name and another meaning could not be passed on."""
        own, of_constructor = (
            set(signature(function).parameters) for function in (Off2OnSAC.pretrain_offline, Off2OnSAC.__init__)
        )
        assert own & of_constructor <= {"kwargs", "policy", "env", "dataset", "offline_gradient_steps"}

    @pytest.mark.parametrize(
        ("observation_space", "policy"),
        [
            (spaces.Box(-1, 1, (3,)), EnsembleCQLPolicy),
            (spaces.Dict(position=spaces.Box(-1, 1, (3,)), speed=spaces.Box(-1, 1, (1,))), EnsembleMultiInputPolicy),
            (IMAGE_SPACE, EnsembleCnnPolicy),
        ],
    )
    def test_pretrain_offline_chooses_the_policy(self, observation_space: spaces.Space, policy: type) -> None:
        env = TinyEnv(observation_space)
        model = Off2OnSAC.pretrain_offline(
            make_dataset(2, 10, env=env), env, offline_gradient_steps=1, **self.without_gradient_steps()
        )
        assert type(model.policy) is policy

    def test_pretrain_offline_takes_a_policy(self, dataset: Any) -> None:
        class OwnPolicy(EnsembleCQLPolicy):
            pass

        model = Off2OnSAC.pretrain_offline(
            dataset, policy=OwnPolicy, offline_gradient_steps=1, **self.without_gradient_steps()
        )
        assert type(model.policy) is OwnPolicy


def changed(before: dict[str, th.Tensor], module: th.nn.Module) -> bool:
    return all(not th.equal(before[name], parameter) for name, parameter in module.named_parameters())


def check_both_phases(model: Off2OnSAC, total_timesteps: int = 6) -> None:
    """A few updates of each phase: every parameter moves and stays finite."""
    for learn in (lambda: model.learn_offline(gradient_steps=2), lambda: model.learn(total_timesteps)):
        before = {network: parameters_of(getattr(model, network)) for network in ("actor", "critic", "critic_target")}
        learn()
        for network, parameters in before.items():
            assert changed(parameters, getattr(model, network)), network
        for name, parameter in model.policy.named_parameters():
            assert th.isfinite(parameter).all(), name
    assert model._n_updates > 0


class TestConfigurations:
    @pytest.mark.parametrize(
        "kwargs",
        [
            *[{"replay_buffer_kwargs": {"scheme": scheme}} for scheme in SCHEMES],
            {"density_ratio_kwargs": {"reference": "union"}},
            {"calql": True},
            {"calql": True, "cql_sampled_gradient": False},
            {"cql_target_action_gap": 1.0},
            {"cql_alpha_online": 1.0},
            {"cql_alpha_online": 1.0, "cql_sampled_gradient": False},
            {"target_q": "mean"},
            {"ent_coef": 0.1},
            {"n_envs": 2},
            {"initial_online_fraction": 0.0},
            {"policy_kwargs": {"ensemble_size": 1, "n_critics": 1}},
            {"policy_kwargs": {"critic_layer_norm": True, "n_critics": 3}},
            {"offline_batch_size": 5},
            {"target_update_interval": 2},
        ],
        ids=str,
    )
    def test_arguments(self, dataset: Any, kwargs: dict[str, Any]) -> None:
        n_envs = kwargs.get("n_envs", 1)
        kwargs = {name: value for name, value in kwargs.items() if name != "n_envs"}
        model = small_model(pendulums(n_envs), dataset=dataset, **kwargs)
        check_both_phases(model)
        if kwargs.get("replay_buffer_kwargs", {"scheme": "balanced"})["scheme"] == "balanced":
            priorities = model.replay_buffer.priorities(np.arange(len(dataset) + 6))
            assert len(np.unique(priorities)) > 2

    @pytest.mark.parametrize(
        ("observation_space", "policy"),
        [
            (spaces.Dict(position=spaces.Box(-1, 1, (3,)), speed=spaces.Box(-1, 1, (1,))), "MultiInputPolicy"),
            (spaces.Dict(image=IMAGE_SPACE, speed=spaces.Box(-1, 1, (1,))), "MultiInputPolicy"),
            (IMAGE_SPACE, "CnnPolicy"),
        ],
        ids=["dict", "dict with images", "images"],
    )
    def test_observations(self, observation_space: spaces.Space, policy: str) -> None:
        """Images are channel-last in the environment and in the dataset; SB3 transposes the former."""
        env = TinyEnv(observation_space)
        model = small_model(env, policy, dataset=make_dataset(2, 10, env=env), learning_starts=3, batch_size=4)
        check_both_phases(model, total_timesteps=4)

    def test_action_bounds(self) -> None:
        """Actions of the dataset and of the environment are scaled alike, and each part holds both extremes."""
        env = TinyEnv(action_space=spaces.Box(np.array([-2, 0], np.float32), np.array([5, 1], np.float32)))
        dataset = make_dataset(env=env)
        model = small_model(env, dataset=dataset)
        check_both_phases(model)
        offline = model.replay_buffer._get_samples(np.arange(len(dataset))).actions.numpy()
        np.testing.assert_allclose(offline, 2 * (dataset.actions - [-2, 0]) / [7, 1] - 1, atol=1e-6)
        assert (np.abs(model.replay_buffer.actions[:6]) <= 1).all()

    @pytest.mark.parametrize("norm_reward", [False, True])
    def test_vec_normalize(self, norm_reward: bool) -> None:
        """The offline phase needs statistics of the dataset: those of an environment just reset are of one observation."""
        env = VecNormalize(tiny_envs(), norm_reward=norm_reward, gamma=0.99)
        model = small_model(env, dataset=make_dataset(env=TinyEnv(), reward_scale=100.0 if norm_reward else 1.0))
        sample_offline = model.replay_buffer.sample_offline
        batches: list[Any] = []

        def recording(*args: Any, **kwargs: Any) -> Any:
            batches.append(sample_offline(*args, **kwargs))
            return batches[-1]

        model.replay_buffer.sample_offline = recording  # type: ignore[method-assign]
        check_both_phases(model)
        for batch in batches[:2]:  # VecNormalize clips at 10
            assert (batch.observations.abs() < 9).float().mean() > 0.9
            assert (batch.rewards.abs() < 9).float().mean() > 0.9

    @pytest.mark.parametrize("n_resets", [0, 1, 3])
    @pytest.mark.parametrize(("n_envs", "training"), [(1, True), (3, True), (1, False)])
    def test_vec_normalize_takes_the_statistics_of_the_dataset(self, n_envs: int, training: bool, n_resets: int) -> None:
        env = VecNormalize(tiny_envs(n_envs), gamma=0.99, training=training)
        offline_data = make_dataset(env=TinyEnv())
        seen: list[Any] = [offline_data.frames]
        for _ in range(n_resets):
            env.reset()
            seen += [env.get_original_obs()] * training  # which VecNormalize itself has counted
        small_model(env, dataset=offline_data)
        statistics: Any = env.obs_rms
        np.testing.assert_allclose(statistics.mean, np.concatenate(seen).mean(axis=0), atol=1e-5)
        assert env.ret_rms.count > len(offline_data)

    def test_vec_normalize_keeps_statistics_of_its_own(self) -> None:
        env = VecNormalize(tiny_envs())
        env.reset()
        env.step(np.zeros((env.num_envs, 2)))
        statistics: Any = env.obs_rms
        count, returns_count = statistics.count, env.ret_rms.count
        small_model(env, dataset=make_dataset(env=TinyEnv()))
        assert (statistics.count, env.ret_rms.count) == (count, returns_count)

    def test_without_dataset(self) -> None:
        model = small_model()
        before = parameters_of(model.policy)
        model.learn(8)
        assert changed(before, model.policy)
        assert model.density_ratio is None
        assert model._n_updates == 4

    def test_same_seed_same_run(self, dataset: Any) -> None:
        runs = []
        for seed in (3, 3, 4):
            model = small_model(dataset=dataset, seed=seed)
            model.learn_offline(gradient_steps=3)
            model.learn(6)
            runs.append((model.get_parameters(), model.replay_buffer.priorities(np.arange(len(dataset) + 6))))
        assert_same(runs[0], runs[1])
        with pytest.raises(AssertionError):
            assert_same(runs[0], runs[2])


def numpy_q_values(member: dict[str, Any], observations: np.ndarray, actions: np.ndarray, network: str) -> np.ndarray:
    """Twin Q-values of one member from its weights, shape ``(2, batch_size)``."""
    values = []
    for index in range(2):
        state = {name: value.double().numpy() for name, value in member[network].items()}
        hidden = np.concatenate([observations, actions], axis=1)
        hidden = np.maximum(hidden @ state[f"qf{index}.0.weight"].T + state[f"qf{index}.0.bias"], 0)
        values.append((hidden @ state[f"qf{index}.2.weight"].T + state[f"qf{index}.2.bias"])[:, 0])
    return np.array(values)


class TestOnlineLosses:
    @pytest.mark.parametrize("target_q", ["member", "mean"])
    def test_against_numpy(self, monkeypatch: pytest.MonkeyPatch, dataset: Any, target_q: str) -> None:
        """Eq. 1 and Eq. 2 for three members: the critics' targets, the sum of their losses, the actor's mean of minima."""
        alpha, gamma = 0.3, 0.9
        model = small_model(
            dataset=dataset,
            target_q=target_q,
            ent_coef=alpha,
            gamma=gamma,
            batch_size=16,
            qf_learning_rate=0.0,  # SB3 steps the critics first: the actor's loss is of the same ones
            policy_kwargs={"ensemble_size": 3},
        )
        model.learn_offline(gradient_steps=3)
        model.learn(4)
        # Targets of their own, far enough from each other for the minima and the two kinds of targets to differ
        with th.no_grad():
            for parameter in [*model.critic.parameters(), *model.critic_target.parameters()]:
                parameter.add_(0.3 * th.randn_like(parameter))
        members = [model.policy.get_member(index) for index in range(3)]

        batches, policy_draws = [], []
        sample, action_log_prob = model.replay_buffer.sample, model.actor.action_log_prob

        def recording_sample(*args: Any, **kwargs: Any) -> Any:
            batches.append(sample(*args, **kwargs))
            return batches[-1]

        def recording_action_log_prob(obs: Any) -> Any:
            actions, log_prob = action_log_prob(obs)
            policy_draws.append((actions.detach().double().numpy(), log_prob.detach().double().numpy()))
            return actions, log_prob

        monkeypatch.setattr(model.replay_buffer, "sample", recording_sample)
        monkeypatch.setattr(model.actor, "action_log_prob", recording_action_log_prob)
        model.train(gradient_steps=1, batch_size=16)
        (batch,) = batches
        (actions, log_prob), (next_actions, next_log_prob) = policy_draws
        fields = {name: getattr(batch, name).double().numpy() for name in ("observations", "next_observations", "actions")}
        rewards, dones = batch.rewards.double().numpy()[:, 0], batch.dones.double().numpy()[:, 0]

        next_minima = [
            numpy_q_values(member, fields["next_observations"], next_actions, "critic_target").min(axis=0)
            for member in members
        ]
        if target_q == "mean":
            next_minima = [np.mean(next_minima, axis=0)] * 3
        critic_loss = 0.0
        for member, next_minimum in zip(members, next_minima, strict=True):
            target = rewards + gamma * (1 - dones) * (next_minimum - alpha * next_log_prob)
            for q_values in numpy_q_values(member, fields["observations"], fields["actions"], "critic"):
                critic_loss += 0.5 * np.mean((q_values - target) ** 2)
        minima = [numpy_q_values(member, fields["observations"], actions, "critic").min(axis=0) for member in members]
        actor_loss = np.mean(alpha * log_prob - np.mean(minima, axis=0))

        values = model.logger.name_to_value
        assert values["train/critic_loss"] == pytest.approx(critic_loss, rel=1e-4)
        assert values["train/actor_loss"] == pytest.approx(actor_loss, rel=1e-4, abs=1e-5)

    def test_the_two_targets_differ(self, dataset: Any) -> None:
        """Otherwise the test above would not tell them apart."""
        parameters = []
        for target_q in ("member", "mean"):
            model = small_model(dataset=dataset, target_q=target_q)
            model.learn_offline(gradient_steps=2)
            model.learn(4)
            parameters.append(parameters_of(model.critic))
        with pytest.raises(AssertionError):
            assert_same(parameters[0], parameters[1])


class DiscreteEnv(TinyEnv):
    def __init__(self) -> None:
        super().__init__(action_space=spaces.Discrete(3))


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"policy_kwargs": {"ensemble_size": 0}}, "`ensemble_size` must be an integer of at least 1, got 0"),
            ({"initial_online_fraction": 1.0}, r"`initial_online_fraction` \(rho\) must be in \[0, 1\), got 1.0"),
            ({"initial_online_fraction": -0.1}, r"`initial_online_fraction` \(rho\) must be in \[0, 1\), got -0.1"),
            ({"priority_temperature": 0}, "`priority_temperature` must be above 0 and finite, got 0"),
            ({"cql_temp": 0.0}, "`cql_temp` must be above 0 and finite, got 0.0"),
            ({"cql_n_actions": 0}, "`cql_n_actions` must be at least 1, got 0"),
            ({"cql_alpha": -1.0}, "`cql_alpha` must be at least 0, got -1.0"),
            ({"cql_alpha": float("inf")}, "`cql_alpha` must be finite, got inf"),
            ({"cql_temp": float("inf")}, "`cql_temp` must be above 0 and finite, got inf"),
            ({"cql_alpha_online": -1.0}, "`cql_alpha_online` must be at least 0, got -1.0"),
            ({"first_update_multiplier": 0}, "`first_update_multiplier` must be at least 1, got 0"),
            ({"ent_coef": "autox"}, "`ent_coef` must be 'auto', such as 'auto_0.1', or a number from 0, got 'autox'"),
            ({"ent_coef": "auto_0"}, "`ent_coef` must be 'auto', such as 'auto_0.1', or a number from 0, got 'auto_0'"),
            (
                {"offline_ent_coef": -0.1},
                "`offline_ent_coef` must be 'auto', such as 'auto_0.1', or a number from 0, got -0.1",
            ),
            ({"offline_batch_size": 0}, "`offline_batch_size` must be at least 1, got 0"),
            ({"offline_gradient_steps": -1}, "`offline_gradient_steps` must be at least 0, got -1"),
            ({"replay_buffer_kwargs": {"scheme": "best"}}, "Unknown scheme='best', it must be one of 'balanced'"),
            ({"n_steps": 3}, "`n_steps=3` is not supported"),
            ({"use_sde": True}, r"gSDE is not supported.*`use_sde=True`"),
            ({"optimize_memory_usage": True}, "does not support optimize_memory_usage=True"),
            ({"replay_buffer_class": ReplayBuffer}, "`replay_buffer_class=ReplayBuffer` cannot hold an offline part"),
            ({"target_q": "x"}, "`target_q` must be 'member' or 'mean', got 'x'"),
            ({"density_ratio_kwargs": {"reference": "x"}}, r"\['reference'\]` must be 'offline' or 'union', got 'x'"),
        ],
        ids=str,
    )
    def test_constructor(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            small_model(**kwargs)

    def test_discrete_actions(self) -> None:
        with pytest.raises(ValueError, match=r"must be continuous \(a Box space\), got Discrete\(3\): use DQN or QR-DQN"):
            small_model(DiscreteEnv())
        with pytest.raises(ValueError, match=r"must be continuous \(a Box space\), got MultiBinary\(2\)$"):
            small_model(TinyEnv(action_space=spaces.MultiBinary(2)))

    @pytest.mark.parametrize("n_envs", [None, 2])
    def test_unbounded_actions(self, n_envs: int | None) -> None:
        action_space = spaces.Box(-np.inf, np.inf, (1,))
        env = TinyEnv(action_space=action_space) if n_envs is None else tiny_envs(n_envs, action_space=action_space)
        with pytest.raises(ValueError, match=r"must be bounded, got Box\(-inf, inf"):
            small_model(env)

    def test_dataset_of_another_environment(self, dataset: Any) -> None:
        """The message names both spaces."""
        with pytest.raises(ValueError, match=r"its action space Box\(-2.0, 2.0.* is not the environment's Box\(-3.0, 3.0"):
            small_model(TinyEnv(dataset.observation_space, spaces.Box(-3, 3, (1,))), dataset=dataset)
        with pytest.raises(ValueError, match=r"observation space Box\(.*-8\..* is not the environment's Box\(-1.0, 1.0, \(4,"):
            small_model(TinyEnv(spaces.Box(-1, 1, (4,)), dataset.action_space), dataset=dataset)
        model = small_model(TinyEnv())
        with pytest.raises(ValueError, match="is not the environment's"):
            model.learn_offline(dataset, gradient_steps=1)
        assert model.dataset is None

    @pytest.mark.parametrize("scheme", ["offline", "symmetric"])
    def test_scheme_without_dataset(self, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
        """Raised before the first environment step."""
        model = small_model(replay_buffer_kwargs={"scheme": scheme})
        env = model.get_env()
        steps = spy(monkeypatch, env, "step")
        with pytest.raises(ValueError, match=rf"scheme='{scheme}'\)` needs a dataset"):
            model.learn(20)
        assert not steps
        assert model.num_timesteps == 0

    @pytest.mark.parametrize("gradient_steps", [0, -1])
    def test_no_gradient_steps(self, dataset: Any, gradient_steps: int) -> None:
        with pytest.raises(ValueError, match=f"`gradient_steps` must be an integer of at least 1, got {gradient_steps}"):
            small_model().learn_offline(dataset, gradient_steps=gradient_steps)

    def test_learn_offline_without_dataset(self) -> None:
        with pytest.raises(ValueError, match=r"no dataset to learn from: pass `dataset=...` or call `model.set_dataset"):
            small_model().learn_offline(gradient_steps=1)

    def test_offline_gradient_steps_without_dataset(self) -> None:
        """Asked to pretrain, but from what? Better than to learn from scratch without a word."""
        with pytest.raises(ValueError, match="offline_gradient_steps"):
            small_model(offline_gradient_steps=5).learn(1)

    def test_calql_with_normalized_rewards(self) -> None:
        with pytest.raises(ValueError, match=r"use `VecNormalize\(norm_reward=False\)`"):
            small_model(VecNormalize(tiny_envs()), calql=True)
        assert small_model(VecNormalize(tiny_envs(), norm_reward=False), calql=True).calql

    def test_density_ratio_kwargs(self) -> None:
        with pytest.raises(ValueError, match=r"`density_ratio_kwargs` must be among .*'net_arch'.* got \['lr'"):
            small_model(density_ratio_kwargs={"lr": 1e-3})

    def test_new_members_start_afresh(self, dataset: Any) -> None:
        """Moments of the optimizers and the entropy coefficient belong to the parameters that were there before."""
        model = small_model(dataset=dataset, cql_target_action_gap=1.0)
        model.learn_offline(gradient_steps=3)
        coefficients = model.offline_log_ent_coef, model.log_cql_lagrange
        before = [values[1].item() for values in coefficients]
        assert all(values[0].item() != 0.0 for values in coefficients)
        model.set_member(0, model.get_member(0))
        assert [values.tolist() for values in coefficients] == [[0.0, value] for value in before]
        of_networks = model.actor.optimizer, model.critic.optimizer
        of_coefficients = model.offline_ent_coef_optimizer, model.cql_lagrange_optimizer
        assert not any(optimizer.state for optimizer in (*of_networks, *of_coefficients))

    def test_policy_class(self) -> None:
        class OwnPolicy(SACPolicy):
            pass

        with pytest.raises(ValueError, match="`policy` must be a name or derived from EnsembleCQLPolicy, got OwnPolicy"):
            Off2OnSAC(OwnPolicy, "Pendulum-v1")

    def test_nan(self) -> None:
        with pytest.raises(ValueError, match="`cql_alpha` must be at least 0, got nan"):
            small_model(cql_alpha=float("nan"))

    def test_gradient_steps_are_not_those_of_the_offline_phase(self) -> None:
        dataset = make_dataset(env=TinyEnv())
        with (
            pytest.warns(
                UserWarning, match=r"`gradient_steps=5` .* after each rollout.* `offline_gradient_steps`, here 1000000"
            ),
            pytest.raises(ValueError, match="does not name its environment"),
        ):
            Off2OnSAC.pretrain_offline(dataset, gradient_steps=5)

    def test_dataset_without_environment(self) -> None:
        with pytest.raises(ValueError, match="does not name its environment: make it yourself and pass it as env"):
            Off2OnSAC.pretrain_offline(make_dataset(env=TinyEnv()), offline_gradient_steps=1)

    def test_another_dataset(self, dataset: Any) -> None:
        model = small_model(dataset=dataset)
        with pytest.raises(ValueError, match=r"not the one this model was trained with: got .*arrays.* expected .*arrays"):
            model.learn_offline(make_dataset(seed=1), gradient_steps=1)
        model.learn_offline(load_dataset(dataset), gradient_steps=1)
