"""NaN, infinity, exploding Q-values, and workers that die: stopped at once with the cause named, or skipped and counted."""

import math
import os
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import TinyEnv, assert_same, make_dataset, small_kwargs, small_model
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_off2on import AWAC, BCQ, BalancedReplayBuffer, Off2OnSAC, load_dataset
from sb3_off2on.faults import NumericalFault, check_step, find_fault

ALGORITHMS = [Off2OnSAC, AWAC, BCQ]
NOT_FINITE = [np.nan, np.inf, -np.inf]


def model_of(cls: Any, env: Any = None, **kwargs: Any) -> Any:
    kwargs = small_kwargs(**kwargs)
    if cls is not Off2OnSAC:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cql_n_actions", "density_ratio_kwargs")}
    model = cls("MlpPolicy", "Pendulum-v1" if env is None else env, **kwargs)
    model.set_logger(configure(None, []))
    return model


def state_of(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"parameters": deepcopy(model.get_parameters()), "priorities": None}
    if model.replay_buffer.scheme == "balanced":
        state["priorities"] = np.array(model.replay_buffer._tree.leaves)
    for group in (group for part in state["parameters"].values() for group in part.get("param_groups", [])):
        del group["lr"]  # follows its schedule, whatever the updates do
    names = ("log_ent_coef", "offline_log_ent_coef", "log_cql_lagrange")
    return deepcopy(state | {name: getattr(model, name).detach() for name in names if hasattr(model, name)})


class FaultyEnv(TinyEnv):
    """
    ``TinyEnv`` whose third episode goes wrong: at step 2, where ``when`` is "step", or at its beginning or its end.

    :param what: "observation" or "reward"
    :param value: what is returned instead
    :param when: "step", "reset" or "end"
    """

    def __init__(self, what: str, value: float, when: str = "step", space: spaces.Space | None = None) -> None:
        super().__init__(spaces.Box(-1, 1, (3,)) if space is None else space)
        self.what, self.value, self.when = what, value, when

    def spoilt(self, observation: Any) -> Any:
        if isinstance(observation, dict):
            return {**observation, "vector": self.spoilt(observation["vector"])}
        return np.where(np.arange(3) == 1, self.value, observation).astype(observation.dtype)

    def reset(self, **kwargs: Any) -> Any:
        observation, info = super().reset(**kwargs)
        if self.when == "reset" and self.n_episodes == 3:
            observation = self.spoilt(observation)
        return observation, info

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        if self.n_episodes == 3 and self.n_steps == {"step": 2, "end": self.length, "reset": 0}[self.when]:
            reward = self.value if self.what == "reward" else reward
            observation = self.spoilt(observation) if self.what == "observation" else observation
        return observation, reward, terminated, truncated, info


class TestEnvironment:
    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("value", NOT_FINITE)
    def test_raises(self, cls: Any, value: float) -> None:
        """At the step where it happens, with what was learned and stored before."""
        model = model_of(cls, FaultyEnv("reward", value))
        with pytest.raises(NumericalFault, match=rf"`rewards` of environment 0 hold {value}. The transition was not stored"):
            model.learn(50)
        assert model.num_timesteps == 12
        assert model.replay_buffer.size() == 11
        model.learn(50, reset_num_timesteps=False)  # goes on with a fresh episode
        assert np.isfinite(model.replay_buffer.rewards).all()

    @pytest.mark.parametrize(
        ("when", "name", "n_stored"), [("step", "new_observations", 11), ("end", "next_observations", 14), ("reset", "new", 9)]
    )
    def test_observations(self, when: str, name: str, n_stored: int) -> None:
        model = small_model(FaultyEnv("observation", np.nan, when))
        with pytest.raises(NumericalFault, match=rf"`{name}.*` of environment 0 hold nan"):
            model.learn(50)
        assert model.replay_buffer.size() == n_stored

    def test_which_environment(self) -> None:
        space = spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 3), np.uint8), "vector": spaces.Box(-1, 1, (3,))})
        makers: list[Callable[[], gym.Env]] = [lambda: TinyEnv(space), lambda: FaultyEnv("observation", np.inf, space=space)]
        model = small_model(DummyVecEnv(makers), "MultiInputPolicy")
        with pytest.raises(NumericalFault, match=r"`new_observations\['vector'\]` of environment 1 hold inf"):
            model.learn(50)

    def test_at_the_first_reset(self) -> None:
        env = FaultyEnv("observation", np.nan, "reset")
        env.n_episodes = 2
        model = small_model(env)
        with pytest.raises(NumericalFault, match=r"`observations` of environment 0 hold nan"):
            model.learn(50)
        assert model.num_timesteps == 0

    @pytest.mark.parametrize(("when", "n_skipped"), [("step", 2), ("end", 1), ("reset", 2)])
    def test_skips_and_counts(self, when: str, n_skipped: int) -> None:
        """Each transition that touches the bad observation is left out, and no other."""
        model = small_model(FaultyEnv("observation", np.nan, when), on_fault="skip")
        model.set_logger(configure(None, []))
        model.learn(40)
        assert model.n_skipped_steps == n_skipped
        assert model.replay_buffer.size() == 40 - n_skipped
        assert np.isfinite(model.replay_buffer.observations).all()
        assert np.isfinite(model.replay_buffer.next_observations).all()
        assert model.n_skipped_updates == 0

    def test_the_count_is_logged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_model(FaultyEnv("reward", np.nan), on_fault="skip")
        model.set_logger(configure(None, []))
        model.learn(40)
        logged: dict[str, Any] = {}
        monkeypatch.setattr(model.logger, "dump", lambda step: logged.update(model.logger.name_to_value))
        model.dump_logs()
        assert logged["rollout/n_skipped_steps"] == 1
        assert "train/n_skipped_updates" not in logged

    @pytest.mark.parametrize("on_fault", ["raise", "skip"])
    @pytest.mark.parametrize(("what", "when"), [("reward", "step"), ("observation", "step"), ("observation", "reset")])
    def test_statistics_stay_sound(self, what: str, when: str, on_fault: str) -> None:
        """``VecNormalize`` sees the fault first, and one NaN in its statistics would stay there."""
        makers: list[Callable[[], gym.Env]] = [TinyEnv, lambda: FaultyEnv(what, np.nan, when)]
        env = VecNormalize(DummyVecEnv([lambda: TinyEnv(spaces.Box(-1, 1, (3,))), makers[1]]))
        model = small_model(env, on_fault=on_fault)
        if on_fault == "raise":
            with pytest.raises(NumericalFault, match=r"of environment 1 hold nan"):
                model.learn(60)
        model.learn(60, reset_num_timesteps=False)
        assert (model.n_skipped_steps > 0) == (on_fault == "skip")
        statistics: Any = env.obs_rms
        for values in (statistics.mean, statistics.var, env.ret_rms.var, env.returns):
            assert np.isfinite(values).all()
        assert np.isfinite(model.replay_buffer.observations).all()

    def test_no_trace_without_faults(self) -> None:
        """Skipping changes nothing where nothing is wrong."""
        states: list[Any] = []
        for on_fault in ("raise", "skip"):
            model = small_model(VecNormalize(make_vec_env(TinyEnv, 2)), dataset=make_dataset(env=TinyEnv()), on_fault=on_fault)
            model.learn(20)
            states.append(state_of(model))
        assert_same(states[0], states[1])

    @pytest.mark.parametrize("name", ["observations", "next_observations", "actions", "rewards"])
    def test_the_buffer_takes_none(self, name: str) -> None:
        """Whoever adds: nothing is stored then. What float64 can hold and float32 cannot is infinite for the networks."""
        buffer = BalancedReplayBuffer(10, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), n_envs=2)
        row: dict[str, Any] = {"observations": np.zeros((2, 3)), "next_observations": np.zeros((2, 3))}
        row |= {"actions": np.zeros((2, 2)), "rewards": np.zeros(2)}
        row[name][1] = 1e39
        with pytest.raises(NumericalFault, match=rf"`{name}` of environment 1 hold 1e\+39"):
            buffer.add(*[*row.values(), np.zeros(2), [{}, {}]])
        assert (buffer.pos, buffer._tree.total) == (0, 0)

    def test_integers_are_finite(self) -> None:
        check_step(images=np.zeros((1, 2), np.uint8), rewards=[1, 2], flags=np.ones(1, bool))


class TestActions:
    """A robot gets an error, as with SB3's ``SAC``, and not the NaN."""

    @pytest.mark.parametrize("deterministic", [True, False])
    @pytest.mark.parametrize("cls", ALGORITHMS)
    def test_parameters_are_named(self, cls: Any, deterministic: bool) -> None:
        model = model_of(cls, TinyEnv())
        name, parameter = next(model.policy.named_parameters())
        parameter.data[0] = np.nan
        with pytest.raises(NumericalFault, match=f"An action is NaN, as the parameter `{name}` is not finite: load the last"):
            model.predict(np.zeros((2, 3), np.float32), deterministic=deterministic)

    def test_actor_on_its_own(self) -> None:
        model = small_model(TinyEnv())
        name, parameter = next(model.actor.named_parameters())
        parameter.data[0] = np.nan
        with pytest.raises(NumericalFault, match=f"An action is NaN, as the parameter `{name}` is not finite: load the last"):
            model.actor.predict(np.zeros((2, 3), np.float32))

    @pytest.mark.parametrize("deterministic", [True, False])
    @pytest.mark.parametrize("cls", ALGORITHMS)
    def test_observation(self, cls: Any, deterministic: bool) -> None:
        """Of one of several environments."""
        observation = np.zeros((3, 3), np.float32)
        observation[1, 0] = np.nan
        with pytest.raises(NumericalFault, match=r"An action is NaN, as the observation holds NaN, infinity or .*: repair it"):
            model_of(cls, TinyEnv()).predict(observation, deterministic=deterministic)

    def test_skipping_keeps_the_observation(self) -> None:
        """Zeros stand in for what is not finite to choose an action only, also if there is none."""
        model = small_model(TinyEnv(), on_fault="skip")
        model.learn(8)
        model._last_obs = np.array([[1, np.nan, 2]], np.float32)
        next(model.actor.parameters()).data[0] = np.nan
        with pytest.raises(NumericalFault, match="An action is NaN"):
            model._sample_action(learning_starts=0)
        np.testing.assert_array_equal(model._last_obs, [[1, np.nan, 2]])


class TestUpdates:
    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("name", ["rewards", "observations", "next_observations", "actions"])
    def test_the_row_is_named(self, cls: Any, name: str) -> None:
        """A row that went bad inside the replay: nothing changes in the update that draws it."""
        model = model_of(cls)
        model.learn(8)
        getattr(model.replay_buffer, name)[5] = np.nan
        before = []
        sample = model.replay_buffer.sample

        def watched(*args: Any, **kwargs: Any) -> Any:
            before.append(state_of(model))
            return sample(*args, **kwargs)

        model.replay_buffer.sample = watched
        with pytest.raises(NumericalFault, match=rf"`{name}` hold nan in \d of the minibatch's 8 rows \(in the replay: 5\)"):
            model.train(100, batch_size=8)
        assert_same(before[-1], state_of(model))

    @pytest.mark.parametrize("cls", ALGORITHMS)
    def test_the_row_is_named_offline(self, cls: Any) -> None:
        """Rows of the members lie one after the other; the index is that of the dataset."""
        model = model_of(cls, dataset=make_dataset(n_episodes=1, length=3))
        model.dataset.rewards[1] = np.inf
        before = state_of(model)
        with pytest.raises(
            NumericalFault, match=r"num_timesteps=0 was not made: `rewards` hold inf in .* \(in the replay: 1\)"
        ):
            model.learn_offline(gradient_steps=1)
        assert_same(before, state_of(model))
        assert not model.pretrained
        assert model.num_timesteps == model._n_offline_updates == 1  # of both counters, or of none

    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("phase", ["offline", "online"])
    def test_skips_and_counts(self, cls: Any, phase: str) -> None:
        model = model_of(cls, dataset=make_dataset(n_episodes=2, length=20), on_fault="skip")
        model.learn_offline(gradient_steps=2)
        if phase == "online":
            model.learn(8)
        model.dataset.rewards[:] = np.nan
        model.replay_buffer.rewards[:] = np.nan
        model.replay_buffer.set_scheme("uniform")  # no density ratio, whose own minibatches are judged by themselves
        before = state_of(model)
        model.train_offline(5, batch_size=8) if phase == "offline" else model.train(5, batch_size=8)
        assert model.n_skipped_updates == 5
        assert_same(before, state_of(model))

    def test_skips_with_the_lagrange_form(self) -> None:
        model = model_of(Off2OnSAC, dataset=make_dataset(n_episodes=2, length=20), on_fault="skip", cql_target_action_gap=1.0)
        model.dataset.rewards[:] = np.nan
        model.learn_offline(gradient_steps=3)
        assert model.n_skipped_updates == 3

    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("phase", ["offline", "online"])
    def test_exploding_q_values(self, cls: Any, phase: str) -> None:
        model = model_of(cls, dataset=make_dataset(), max_abs_q=1e-3)
        before = {name: deepcopy(model.critic.state_dict()) for name in ["critic"]}
        with pytest.raises(
            NumericalFault, match=r"`target_q_values` are .* beyond `max_abs_q=0.001`: load the last checkpoint"
        ):
            model.train_offline(3, 8) if phase == "offline" else model.learn(8)
        assert_same(before["critic"], model.critic.state_dict())
        assert model_of(cls, dataset=make_dataset(), max_abs_q=math.inf).learn_offline(gradient_steps=1).pretrained

    def test_fitted_q_evaluation(self) -> None:
        model = model_of(Off2OnSAC, dataset=make_dataset(n_episodes=2, length=20)).learn_offline(gradient_steps=2)
        model.fit_fqe(gradient_steps=2)
        rewards = model.dataset.rewards.copy()
        for value, message in (
            (np.nan, r"`rewards` hold nan"),
            (1e30, r"`current_q_values` are|`td_errors` are|`critic_loss` is inf"),
        ):
            model.dataset.rewards[:] = value
            before = state_of(model)
            with pytest.raises(NumericalFault, match=message):
                model.fit_fqe(gradient_steps=1)
            assert_same(before, state_of(model))
        model.dataset.rewards[:] = rewards
        model.fit_fqe(gradient_steps=1)

    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("network", ["critic", "actor"])
    def test_parameters_are_named(self, cls: Any, network: str) -> None:
        model = model_of(cls, dataset=make_dataset())
        next(getattr(model, network).parameters()).data[0] = np.nan
        message = rf"the parameter `{network}\..*` is not finite before the update: load the last"
        with pytest.raises(NumericalFault, match=message):
            model.learn_offline(gradient_steps=1)

    @pytest.mark.parametrize("cls", ALGORITHMS)
    @pytest.mark.parametrize("network", ["critic", "actor"])
    def test_gradients(self, cls: Any, network: str) -> None:
        """A finite loss can have a gradient that is not, e.g. that of a square root at zero."""
        model = model_of(cls, dataset=make_dataset())
        parameter = next(getattr(model, network).parameters())
        before = deepcopy(getattr(model, network).state_dict())
        parameter.register_hook(lambda gradient: gradient * np.nan)
        with pytest.raises(NumericalFault, match=r"`gradient norm` is nan, from a minibatch and parameters that are finite"):
            model.learn_offline(gradient_steps=1)
        assert_same(before, getattr(model, network).state_dict())

    def test_the_last_good_checkpoint_is_kept(self, tmp_path: Any) -> None:
        model = small_model(dataset=make_dataset())
        checkpoints = CheckpointCallback(save_freq=1, save_path=str(tmp_path))
        model.learn_offline(gradient_steps=2, callback=checkpoints)
        next(model.critic.parameters()).register_hook(lambda gradient: gradient * np.nan)
        with pytest.raises(NumericalFault):
            model.learn_offline(gradient_steps=2, callback=checkpoints)
        assert {path.name for path in tmp_path.iterdir()} == {"rl_model_1_steps.zip", "rl_model_2_steps.zip"}
        Off2OnSAC.load(tmp_path / "rl_model_2_steps.zip", env=model.env, dataset=make_dataset()).learn_offline(
            gradient_steps=1
        )

    def test_priorities(self) -> None:
        model = small_model(dataset=make_dataset())
        model.learn(8)
        leaves = np.array(model.replay_buffer._tree.leaves)
        reference, batch = model.replay_buffer.sample_offline(8), model.replay_buffer.sample(8)
        assert model.density_ratio is not None
        next(model.density_ratio.parameters()).data[:] = np.nan
        with pytest.raises(NumericalFault, match=r"the parameter `density_ratio\..*` is not finite"):
            model._update_priorities(batch, reference)
        model.on_fault = "skip"
        model._update_priorities(batch, reference)
        np.testing.assert_array_equal(model.replay_buffer._tree.leaves, leaves)

    def test_an_accelerator_is_asked_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = small_model(dataset=make_dataset())
        model.device = th.device("meta")
        batch = model.replay_buffer.sample_offline(8)
        batch.rewards[:] = np.nan
        assert not any(model._has_fault(batch) for _ in range(99))
        with pytest.raises(NumericalFault, match=r"`rewards` hold nan in 8 of the minibatch's 8 rows"):
            model._has_fault(batch)

    def test_of_a_large_minibatch_some_rows_are_named(self) -> None:
        """Two minibatches of four rows, judged by two networks of two critics each."""
        rows = np.arange(8).reshape(2, 4) * 10
        q_values = th.zeros(2, 2, 4)
        q_values[0, 1, 2] = q_values[1, 0, 0] = q_values[1, 1, 0] = -7.0
        assert find_fault(rows, {}, [], {"q_values": q_values}, {"q_values": 8.0}) is None
        found = find_fault(rows, {}, [], {"q_values": q_values}, {"q_values": 6.0})
        assert found is not None
        assert found.startswith(
            "`q_values` are -7 in 2 of the minibatch's 8 rows (in the replay: 20, 40), beyond `max_abs_q=6`"
        )
        found = find_fault(rows, {"rewards": th.full((8, 1), th.nan)}, [], {}, {})
        assert found == (
            "`rewards` hold nan in 8 of the minibatch's 8 rows (in the replay: 0, 10, 20, 30, 40, ...). Repair or remove those"
        )
        # All networks judge the same rows: of each row once
        q_values = th.full((2, 2, 4), th.inf)
        found = find_fault(np.arange(4).reshape(1, 4), {}, [], {"gap": q_values}, {})
        assert found is not None
        assert found.startswith("`gap` are inf in 4 of the minibatch's 4 rows (in the replay: 0, 1, 2, 3), from a minibatch")


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_arguments(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"`on_fault` must be 'raise' or 'skip', got 'ignore'"):
        model_of(cls, on_fault="ignore")
    for max_abs_q in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"`max_abs_q` must be above 0, got {max_abs_q}: use math.inf for no limit"):
            model_of(cls, max_abs_q=max_abs_q)


class KillWorker(BaseCallback):
    def _on_step(self) -> bool:
        if self.n_calls == 6:
            processes: Any = self.training_env.processes  # type: ignore[attr-defined]
            os.kill(processes[1].pid, signal.SIGKILL)
        return True


@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
def test_a_worker_dies(start_method: str, tmp_path: Any) -> None:
    """A clear error, no hang (with "fork", SB3 alone would wait forever), and nothing lost."""
    env = SubprocVecEnv([TinyEnv, TinyEnv], start_method=start_method)
    processes = env.processes
    model = small_model(VecNormalize(env))
    # With "fork" the others are ended, too, and named
    with pytest.raises(
        RuntimeError, match=r"The worker of environment .*1 died \(exit code -9\).* it can be saved, and set_env"
    ):
        model.learn(100, KillWorker())
    assert model.replay_buffer.size() == 6
    assert not any(process.is_alive() for process in processes)
    env.close()
    model.save(tmp_path / "model.zip")
    model.set_env(make_vec_env(TinyEnv, 2))
    model.learn(20, reset_num_timesteps=False)


class AnotherEnv(BaseCallback):
    def _on_step(self) -> bool:
        raise EOFError("not of a worker")


def test_errors_of_others_pass() -> None:
    with pytest.raises(EOFError, match=r"not of a worker"):
        small_model(TinyEnv()).learn(10, AnotherEnv())


class TestSafeLoading:
    """``load_dataset`` runs nothing that comes from a file. More places are in examples/hostile_input.py."""

    def hostile_spec(self, tmp_path: Any, **spec: Any) -> Any:
        return gym.envs.registration.EnvSpec(**{"id": "Pendulum-v1", "entry_point": "os:mkdir", "kwargs": {}, **spec})

    def test_entry_points(self, tmp_path: Any) -> None:
        """What a dataset says about its environment would be imported and called by ``gym.make``."""
        trace = tmp_path / "trace"
        spec = self.hostile_spec(tmp_path, id="Hostile-v0", kwargs={"path": str(trace)})
        dataset = replace(make_dataset(), env_spec=spec)
        with pytest.raises(
            ValueError, match=r"Hostile-v0 is not registered, and the entry point 'os:mkdir' that the dataset names"
        ):
            dataset.make_env()
        assert not trace.exists()
        # Of a registered id, the registered code is taken
        dataset = replace(dataset, env_spec=self.hostile_spec(tmp_path, max_episode_steps=7))
        env = dataset.make_env()
        assert type(env.unwrapped).__name__ == "PendulumEnv"
        assert env.spec is not None
        assert env.spec.max_episode_steps == 7

    def test_wrappers(self, tmp_path: Any) -> None:
        trace = tmp_path / "trace"
        spec_of = gym.envs.registration.WrapperSpec
        spec = replace(gym.spec("Pendulum-v1"), additional_wrappers=(spec_of("x", "os:mkdir", {"path": str(trace)}),))
        with pytest.raises(ValueError, match=r"has the wrapper 'os:mkdir', which could run any code"):
            replace(make_dataset(), env_spec=spec).make_env()
        assert not trace.exists()
        wrapped = gym.wrappers.ClipReward(gym.make("Pendulum-v1"), -1.0, 1.0).spec
        env = replace(make_dataset(), env_spec=wrapped).make_env()
        assert isinstance(env, gym.wrappers.ClipReward)

    def test_a_truncated_pickle_names_the_file(self, tmp_path: Any) -> None:
        (tmp_path / "buffer.pkl").write_bytes(b"\x80\x04\x95")
        with pytest.raises(ValueError, match=r"buffer.pkl cannot be read: (EOFError|UnpicklingError).* may be damaged"):
            load_dataset(tmp_path / "buffer.pkl", allow_pickle=True)

    @pytest.mark.parametrize("name", ["terminations", "truncations"])
    def test_flags(self, name: str) -> None:
        arrays = {
            "observations": np.zeros((4, 3)),
            "actions": np.zeros((4, 1)),
            "rewards": np.zeros(4),
            "terminations": np.zeros(4),
        }
        with pytest.raises(ValueError, match=rf"{name} must be flags, 0 or 1, got nan"):
            load_dataset({**arrays, name: np.full(4, np.nan)})
        with pytest.raises(ValueError, match=rf"{name} are of dtype object, expected numbers"):
            load_dataset({**arrays, name: np.full(4, None)})
        with pytest.raises(ValueError, match=r"observations are a single value, expected shape"):
            load_dataset({**arrays, "observations": 1.0})


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"gamma": 1.01}, ValueError, r"`gamma` must be in \[0, 1\], got 1.01"),
        ({"tau": -0.1}, ValueError, r"`tau` must be in \[0, 1\], got -0.1"),
        ({"learning_rate": 1e38}, ValueError, r"`learning_rate` must be in \[0, 1e\+06\], got 1e\+38"),
        ({"learning_rate": "fast"}, TypeError, r"`learning_rate` must be a number, got 'fast'"),
        ({"buffer_size": 0}, ValueError, r"`buffer_size` must be at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, r"`batch_size` must be an integer, got 2.5"),
        ({"gradient_steps": None}, TypeError, r"`gradient_steps` must be a number, got None"),
        (
            {"train_freq": (1,)},
            ValueError,
            r"`train_freq` must be a number of steps, or such as \(1, 'episode'\), .* got \(1,\)",
        ),
        (
            {"policy_kwargs": {"net_arch": [-1]}},
            ValueError,
            r"`net_arch` must be a list of integers of at least 1, .* got \[-1\]",
        ),
        ({"policy_kwargs": {"net_arch": {"pi": 5, "qf": [4]}}}, ValueError, r"`net_arch` must be .* for pi and qf, got 5"),
        ({"train_freq": 0}, ValueError, r"`train_freq` must be .* at least 1, got 0"),
    ],
)
def test_arguments_of_sb3(cls: Any, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    """Those that SB3 accepts, or meets with an assertion or an error of Python's."""
    with pytest.raises(error, match=message):
        model_of(cls, **kwargs)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (Off2OnSAC, {"cql_temp": "1"}, r"`cql_temp` must be a number, got '1'"),
        (Off2OnSAC, {"initial_online_fraction": None}, r"`initial_online_fraction` must be a number, got None"),
        (Off2OnSAC, {"cql_target_action_gap": "a"}, r"`cql_target_action_gap` must be a number, got 'a'"),
        (Off2OnSAC, {"calql": "no"}, r"`calql` must be True or False, got 'no'"),
        (AWAC, {"awac_lambda": "2"}, r"`awac_lambda` must be a number, got '2'"),
        (BCQ, {"bcq_lambda": "1"}, r"`bcq_lambda` must be a number, got '1'"),
    ],
)
def test_types_of_our_own_arguments(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model_of(cls, **kwargs)


def test_layers_of_the_density_ratio() -> None:
    with pytest.raises(ValueError, match=r"`density_ratio_kwargs\['net_arch'\]` must be a list of integers .* got 'big'"):
        model_of(Off2OnSAC, density_ratio_kwargs={"net_arch": "big"})
