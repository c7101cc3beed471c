"""Callbacks: what they log against plain NumPy, that they leave training alone, and what the guard brings back."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE_SPACE, TinyEnv, assert_same, make_dataset, saved_state, small_model
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_off2on import BalancedReplayBuffer, Off2OnSAC
from sb3_off2on.callbacks import (
    ActionAUROCCallback,
    CollapseGuardCallback,
    NormalizedScoreCallback,
    OfflineShareCallback,
    auroc,
)
from sb3_off2on.offline import OfflineToOnline


class CalmEnv(TinyEnv):
    """Each of five steps costs 1, and as much again for the largest actions: returns between -10 and -5."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(np.nan_to_num(action))
        return obs, -1.0 - float(np.abs(action).mean()), terminated, truncated, info


class Rows(KVWriter):
    """What a logger writes at each dump."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def of(self, key: str) -> list[tuple[int, float]]:
        return [(step, values[key]) for step, values in self.rows if key in values]

    def close(self) -> None:
        pass


class Recorder(BaseCallback):
    """What a function returns at each call, and when training starts."""

    def __init__(self, record: Callable[[Any], Any]) -> None:
        super().__init__()
        self.record = record
        self.starts: list[Any] = []
        self.steps: list[Any] = []

    def _on_training_start(self) -> None:
        self.starts.append(self.record(self.model))

    def _on_step(self) -> bool:
        self.steps.append(self.record(self.model))
        return True


class Wreck(BaseCallback):
    """Let the policy play the largest actions from some calls on."""

    def __init__(self, calls: set[int], value: float = 9.0) -> None:
        super().__init__()
        self.calls, self.value = calls, value

    def _on_step(self) -> bool:
        if self.n_calls in self.calls:
            for parameter in self.model.policy.actor.parameters():  # type: ignore[union-attr]
                parameter.data.fill_(self.value)
        return True


def evaluation(callback: BaseCallback | None, eval_env: Any = None, **kwargs: Any) -> EvalCallback:
    eval_env = Monitor(CalmEnv()) if eval_env is None else eval_env
    return EvalCallback(
        eval_env, callback_after_eval=callback, **{"eval_freq": 3, "n_eval_episodes": 2, "verbose": 0, **kwargs}
    )


def logged(model: Any) -> Rows:
    rows = Rows()
    model.set_logger(Logger(folder=None, output_formats=[rows]))
    return rows


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset(env=CalmEnv(), n_episodes=4, length=10)


def calm_model(dataset: Any, **kwargs: Any) -> Any:
    """Agents that keep still, which costs about 5 an episode."""
    model = small_model(CalmEnv(), dataset=dataset, **kwargs)
    for parameter in model.actor.mu.parameters():
        parameter.data *= 0.01
    # They come from elsewhere: the hand-over is the first thing that happens
    model.set_member(0, model.get_member(0))
    return model


class TestNormalizedScore:
    def test_each_evaluation_at_its_timestep(self, dataset: Any) -> None:
        model = calm_model(dataset, offline_gradient_steps=4)
        rows = logged(model)
        model.pretrained = False
        model.learn(6, callback=evaluation(NormalizedScoreCallback(-10.0, -6.0)), log_interval=1)
        returns = rows.of("eval/mean_reward")
        # Updates 1 to 4, then steps 5 to 10
        assert [step for step, _ in returns] == [3, 6, 9]
        scores = rows.of("eval/normalized_score")
        assert [step for step, _ in scores] == [3, 6, 9]
        expected = [100 * (value - -10) / (-6 - -10) for _, value in returns]
        assert [value for _, value in scores] == pytest.approx(expected)

    def test_scores_of_the_dataset(self) -> None:
        dataset = replace(make_dataset(env=CalmEnv(), n_episodes=2, length=10), ref_min_score=-8.0, ref_max_score=-4.0)
        model = calm_model(dataset)
        rows = logged(model)
        model.learn(3, callback=evaluation(NormalizedScoreCallback()))
        ((_, mean_return),) = rows.of("eval/mean_reward")
        ((_, score),) = rows.of("eval/normalized_score")
        assert score == pytest.approx(dataset.normalized_score(mean_return))

    def test_any_sb3_algorithm(self) -> None:
        model = SAC("MlpPolicy", CalmEnv(), learning_starts=100, policy_kwargs={"net_arch": [8]})
        rows = logged(model)
        model.learn(3, callback=evaluation(CallbackList([NormalizedScoreCallback(-10, -5)])))
        assert len(rows.of("eval/normalized_score")) == 1

    @pytest.mark.parametrize(
        ("scores", "match"),
        [
            ((1.0, None), r"both scores or neither, got `ref_min_score=1.0` and `ref_max_score=None`"),
            ((None, 1.0), r"both scores or neither, got `ref_min_score=None` and `ref_max_score=1.0`"),
            ((1.0, 1.0), r"`ref_min_score=1.0` must be below `ref_max_score=1.0`"),
            ((float("nan"), 1.0), r"`ref_min_score=nan` must be below"),
        ],
    )
    def test_wrong_scores(self, scores: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            NormalizedScoreCallback(*scores)

    @pytest.mark.parametrize("has_dataset", [True, False])
    def test_no_scores(self, dataset: Any, has_dataset: bool) -> None:
        model = small_model(CalmEnv(), dataset=dataset if has_dataset else None)
        with pytest.raises(
            ValueError, match=r"no dataset with reference scores: use `NormalizedScoreCallback\(ref_min_score="
        ):
            model.learn(3, callback=evaluation(NormalizedScoreCallback()))
        assert model.num_timesteps == 0


class TestAUROC:
    @pytest.mark.parametrize("n_values", [2, 5, 1000])
    def test_against_all_pairs(self, n_values: int) -> None:
        """The chance that a seen sample is above an unseen one, with many ties or few, in arrays of any shape."""
        rng = np.random.default_rng(n_values)
        for n, m in [(1, 1), (7, 3), (20, 130)]:
            seen = (rng.integers(0, n_values, n) / n_values).astype(np.float32)
            unseen = (rng.integers(0, n_values, (m, 2)) / n_values).astype(np.float32)
            pairs = seen[:, None] - unseen.reshape(1, -1)
            assert auroc(seen, unseen) == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)), abs=1e-12)

    def test_extremes(self) -> None:
        low, high = np.array([-2.0, -1.0, -np.inf]), np.array([0.0, np.inf])
        assert auroc(high, low) == 1.0
        assert auroc(low, high) == 0.0
        assert auroc(low, low) == 0.5

    @pytest.mark.parametrize("which", [0, 1])
    def test_nan(self, which: int) -> None:
        scores = [np.array([1.0, 2.0]), np.array([1.0, 2.0])]
        scores[which][0] = np.nan
        assert np.isnan(auroc(*scores))

    @pytest.mark.parametrize(("n", "m"), [(0, 2), (2, 0)])
    def test_empty(self, n: int, m: int) -> None:
        with pytest.raises(ValueError, match=rf"must not be empty, got {n} and {m} scores"):
            auroc(np.zeros(n), np.zeros(m))


class DropoutExtractor(FlattenExtractor):
    """Draws random numbers in training mode."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.layers = th.nn.Sequential(th.nn.Linear(self.features_dim, self.features_dim), th.nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(super().forward(observations))


class TestActionAUROC:
    @pytest.mark.parametrize(
        ("kind", "ensemble_size"), [("array", 1), ("array", 3), ("normalized", 2), ("image", 2), ("dict", 2)]
    )
    def test_against_all_pairs(self, monkeypatch: pytest.MonkeyPatch, kind: str, ensemble_size: int) -> None:
        """Which rows, which actions, and what the critics say of them through SB3's own interface, in both phases."""
        images = {"image": IMAGE_SPACE, "dict": spaces.Dict(image=IMAGE_SPACE, vector=spaces.Box(-1, 1, (3,)))}
        policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}.get(kind, "MlpPolicy")
        env: Any = make_vec_env(lambda: TinyEnv(images.get(kind)), n_envs=2)
        env = VecNormalize(env) if kind == "normalized" else env
        dataset = make_dataset(env=TinyEnv(images.get(kind)), n_episodes=2, length=10)
        model = small_model(env, policy, dataset=dataset, policy_kwargs={"ensemble_size": ensemble_size})
        logged(model)

        batches, all_actions = [], []
        get_samples, q_values_of_many = model.replay_buffer._get_samples, model.critic.q_values_of_many

        def recording_samples(indices: np.ndarray, env: Any) -> Any:
            assert env is model.get_vec_normalize_env()
            batches.append(get_samples(indices, env))
            return batches[-1]

        def recording_q_values(features: th.Tensor, actions: th.Tensor) -> th.Tensor:
            all_actions.append(actions[0])
            return q_values_of_many(features, actions)

        callback = ActionAUROCCallback(eval_freq=1, batch_size=6, n_actions=20)
        # 20 offline rows; online ones come two at a time
        for n_online, n_rows in [(0, 6), (4, 4), (8, 6)]:
            if n_online == 0:
                model.learn_offline(gradient_steps=1)
            else:
                model.learn(4, reset_num_timesteps=False)
            model.logger.name_to_value.clear()
            batches.clear()
            all_actions.clear()
            with monkeypatch.context() as context:
                context.setattr(model.replay_buffer, "_get_samples", recording_samples)
                context.setattr(model.critic, "q_values_of_many", recording_q_values)
                callback.init_callback(model)
                assert callback.on_step()

            (batch,), (actions,) = batches, all_actions
            assert len(np.unique(batch.indices)) == len(batch.indices) == n_rows
            first, n_there = (20, n_online) if n_online else (0, 20)
            assert ((first <= batch.indices) & (batch.indices < first + n_there)).all()
            assert actions.shape == (21, n_rows, 2)
            assert th.equal(actions[0], batch.actions)
            # The whole range, and other actions at each state
            assert -1.0 <= actions[1:].min() < -0.8 < 0.8 < actions[1:].max() <= 1.0
            assert len(np.unique(actions[1:, :, 0])) == 20 * n_rows

            with th.no_grad():
                per_action = [th.stack(model.critic(batch.observations, x)).squeeze(-1).numpy() for x in actions]
            q_values = np.array(per_action).reshape(21, ensemble_size, 2, n_rows).min(axis=2)
            expected = {f"member_{index}": q_values[:, index] for index in range(ensemble_size)}
            expected["ensemble"] = q_values.mean(axis=1)
            values = model.logger.name_to_value
            assert values.keys() == {f"{prefix}/{name}" for prefix in ("auroc", "auroc_per_state") for name in expected}
            for name, q in expected.items():
                of_all_states, of_its_own = q[0][:, None] - q[1:].reshape(1, -1), q[0] - q[1:]
                for prefix, pairs in {"auroc": of_all_states, "auroc_per_state": of_its_own}.items():
                    # A pair may change places where two ways of computing Q-values round differently
                    assert values[f"{prefix}/{name}"] == pytest.approx(np.mean(pairs > 0), abs=2.1 / pairs.size), (
                        prefix,
                        name,
                    )

    def test_every_eval_freq_calls_through_both_phases(self, dataset: Any) -> None:
        model = small_model(CalmEnv(), dataset=dataset)
        logged(model)

        def was_logged(model: Any) -> bool:
            return model.logger.name_to_value.pop("auroc/ensemble", None) is not None

        callback, recorder = ActionAUROCCallback(eval_freq=3, batch_size=4, n_actions=2), Recorder(was_logged)
        model.learn_offline(gradient_steps=4, callback=[callback, recorder], log_interval=None)
        model.learn(6, callback=[callback, recorder], log_interval=1000)
        assert np.flatnonzero(recorder.steps).tolist() == [2, 5, 8]

    def test_without_dataset(self) -> None:
        """The callback is called before the first transition is stored: then there is nothing to measure."""
        model = small_model(CalmEnv())
        logged(model)
        recorder = Recorder(lambda model: "auroc/ensemble" in model.logger.name_to_value)
        model.learn(2, callback=[ActionAUROCCallback(eval_freq=1, batch_size=4, n_actions=2), recorder])
        assert recorder.steps == [False, True]

    def test_training_is_the_same_without(self, dataset: Any) -> None:
        """To the last bit, in both phases."""
        states: list[Any] = []
        modes: list[Any] = []
        policy_kwargs = {"features_extractor_class": DropoutExtractor}
        for callbacks in ([], [ActionAUROCCallback(eval_freq=1, batch_size=4, n_actions=2)]):
            model = small_model(CalmEnv(), dataset=dataset, offline_gradient_steps=4, policy_kwargs=policy_kwargs)
            recorder = Recorder(lambda model: model.policy.training)
            model.learn(8, callback=[*callbacks, recorder])
            states.append(saved_state(model))
            modes.append(recorder.steps)
        assert_same(*states)
        assert modes[0] == modes[1]
        assert set(modes[0]) == {True, False}

    def test_own_seed(self, dataset: Any) -> None:
        values = []
        for seed in (0, 0, 1):
            model = small_model(CalmEnv(), dataset=dataset)
            logged(model)
            callback = ActionAUROCCallback(eval_freq=1, batch_size=4, seed=seed)
            callback.init_callback(model)
            callback.on_step()
            values.append(model.logger.name_to_value["auroc/ensemble"])
        assert values[0] == values[1] != values[2]

    @pytest.mark.parametrize("name", ["eval_freq", "batch_size", "n_actions"])
    def test_wrong_numbers(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"`{name}` must be at least 1, got 0"):
            ActionAUROCCallback(**{name: 0})

    def test_no_ensemble(self) -> None:
        model = SAC("MlpPolicy", CalmEnv())
        with pytest.raises(ValueError, match=r"an ensemble of critics, e.g. an Off2OnSAC, got a SAC"):
            model.learn(2, callback=ActionAUROCCallback())


class OfflineTD3(OfflineToOnline, TD3):  # type: ignore[misc]
    """An algorithm with other networks, and without an entropy coefficient or a second learning rate."""

    offline_gradient_steps = 0
    offline_batch_size = 4
    train = TD3.train

    def train_offline(self, gradient_steps: int, batch_size: int) -> None:
        self._n_offline_updates += gradient_steps

    def _hand_over(self) -> None:
        self._n_updates = 0


def state_of(model: Any) -> Any:
    """All that the guard brings back: copies of networks, optimizers and coefficients, whatever the algorithm."""
    if isinstance(model, Off2OnSAC):
        state = saved_state(model)
        return {name: state[name] for name in ("networks and optimizers", "variables")}
    return deepcopy(model.get_parameters())


class TestCollapseGuard:
    """
    Calls count environment steps, evaluations are at calls 3, 6, 9, ...; the first update comes after the fourth. The guard's
    floor is -10 (the largest actions), its offline return about -5, so its threshold about -7.5.
    """

    @pytest.mark.parametrize("cls", [Off2OnSAC, OfflineTD3])
    def test_restores_every_bit(self, dataset: Any, cls: Any) -> None:
        """After falls in a row too: what is restored is trained on, and must not be the copy itself."""
        if cls is Off2OnSAC:
            model = calm_model(dataset)
        else:
            kwargs: dict[str, Any] = {"learning_starts": 4, "batch_size": 8, "policy_kwargs": {"net_arch": [16]}, "seed": 0}
            model = OfflineTD3("MlpPolicy", CalmEnv(), replay_buffer_class=BalancedReplayBuffer, **kwargs)
            model.set_dataset(dataset)
            for parameter in model.actor.mu.parameters():
                parameter.data *= 0.01
        n_updates = Recorder(lambda model: (model._n_updates, model.replay_buffer.n_online))
        recorder = Recorder(state_of)
        guard = CollapseGuardCallback(floor=-10, max_restores=10, verbose=0)
        callbacks: list[BaseCallback] = [Wreck({9, 12, 18}), evaluation(guard), recorder, n_updates]
        model.learn(19, callback=callbacks)
        states = [None, *recorder.steps]
        assert guard.n_restores == 3
        # What the restored states differ from
        for one, other in [(6, 8), (9, 11), (12, 15), (15, 17)]:
            with pytest.raises(AssertionError):
                assert_same(states[one], states[other])
        assert_same(states[9], states[6])
        assert_same(states[12], states[6])
        assert_same(states[18], states[15])
        # Counters and replay go on
        assert n_updates.steps == sorted(set(n_updates.steps))

    def test_first_good_state_is_the_hand_over(self, dataset: Any) -> None:
        model = calm_model(dataset)
        recorder = Recorder(state_of)
        model.learn(7, callback=[Wreck({6}), evaluation(CollapseGuardCallback(floor=-10)), recorder])
        assert "density_ratio.optimizer" in recorder.starts[0]["networks and optimizers"]
        assert "log_ent_coef" in recorder.starts[0]["variables"]
        assert_same(recorder.steps[5], recorder.starts[0])

    def test_nan_is_a_fall(self, dataset: Any) -> None:
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-10, verbose=0)
        callback = evaluation(guard)
        model.learn(6, callback=callback)
        assert guard.n_restores == 0
        callback.last_mean_reward = float("nan")
        assert guard.on_step()
        assert guard.n_restores == 1

    @pytest.mark.parametrize("min_share", [0.0, 0.5])
    def test_no_restore_without_a_fall(self, dataset: Any, min_share: float) -> None:
        """Then training is the same to the last bit as with the evaluations alone."""
        states: list[Any] = []
        guard = CollapseGuardCallback(min_share, floor=-10.5, verbose=0)
        for callback in (None, guard):
            model = calm_model(dataset)
            # The largest actions are above a floor of -10.5
            wreck = Wreck({9} if min_share == 0.0 else set())
            model.learn(10, callback=[wreck, evaluation(callback)])
            states.append(saved_state(model))
        assert guard.n_restores == 0
        assert_same(*states)

    @pytest.mark.parametrize("offline_return", [-200.0, 800.0])
    @pytest.mark.parametrize("floor", ["argument", "reference score", "lowest return"])
    def test_threshold(self, dataset: Any, offline_return: float, floor: str) -> None:
        rewards = np.where(np.arange(40) < 10, -30.0, -20.0)  # returns of four episodes: -300, and three of -200
        dataset = replace(dataset, rewards=rewards)
        if floor == "reference score":
            dataset = replace(dataset, ref_min_score=-400.0)
        guard = CollapseGuardCallback(0.6, offline_return=offline_return, floor=-500.0 if floor == "argument" else None)
        model = calm_model(dataset)
        rows = logged(model)
        model.learn(6, callback=evaluation(guard))
        value = {"argument": -500.0, "reference score": -400.0, "lowest return": -300.0}[floor]
        assert guard.threshold == pytest.approx(value + 0.6 * (offline_return - value))
        model.logger.dump(0)
        # The first evaluation is before the first update
        assert rows.of("collapse_guard/threshold") == [(0, guard.threshold)]
        assert rows.of("collapse_guard/n_restores") == [(0, float(offline_return == 800.0))]

    @pytest.mark.parametrize("normalized", [False, True])
    def test_offline_return_is_that_of_the_policy_handed_over(
        self, monkeypatch: pytest.MonkeyPatch, dataset: Any, normalized: bool
    ) -> None:
        """Evaluated as the parent does, after the offline phase that the same guard went through."""
        calls = []

        def evaluate(model: Any, env: Any, **kwargs: Any) -> tuple[float, float]:
            calls.append((saved_state(model), env, kwargs))
            if normalized:
                assert_same(env.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
            return -6.0, 1.0

        monkeypatch.setattr("sb3_off2on.callbacks.evaluate_policy", evaluate)
        env: Any = make_vec_env(CalmEnv, n_envs=1)
        eval_env: Any = make_vec_env(CalmEnv, n_envs=1)
        if normalized:
            env, eval_env = VecNormalize(env), VecNormalize(eval_env, training=False)
        model = small_model(env, dataset=dataset, offline_gradient_steps=6)
        guard = CollapseGuardCallback(floor=-10, verbose=0)
        callback = evaluation(guard, eval_env, deterministic=False, n_eval_episodes=1)
        recorder = Recorder(saved_state)
        model.learn(3, callback=[callback, recorder])
        ((state, evaluated_env, kwargs),) = calls
        assert_same(state, recorder.starts[1])
        assert evaluated_env is eval_env
        assert kwargs == {"n_eval_episodes": 1, "deterministic": False, "warn": True}
        assert guard.threshold == -8.0

        # Another offline phase, of which the guard takes no notice, and another policy handed over
        model.learn(3, callback=[Wreck({1}), callback])
        assert guard.n_restores == 1
        n_evaluations = guard.n_calls
        model.learn_offline(gradient_steps=3, callback=[Wreck({1}), callback])
        assert guard.n_calls == n_evaluations + 1
        assert callback.last_mean_reward < guard.threshold
        assert guard.n_restores == 1
        assert len(calls) == 1
        model.learn(3, callback=[callback, recorder])
        assert len(calls) == 2
        assert_same(calls[1][0], recorder.starts[2])
        assert guard.n_restores == 0

    def test_goes_on_in_the_next_learn(self, dataset: Any) -> None:
        """What it knows from the first one is still there after the second initialisation."""
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-10, verbose=0)
        callback, recorder = evaluation(guard), Recorder(state_of)
        model.learn(8, callback=[callback, recorder])
        threshold = guard.threshold
        model.learn(4, callback=[Wreck({1}), callback, recorder], reset_num_timesteps=False)
        assert guard.threshold == threshold
        assert guard.n_restores == 1
        assert_same(recorder.steps[8], recorder.steps[5])

    @pytest.mark.parametrize(
        ("learning_rate", "qf_learning_rate"),
        [(4e-4, None), (4e-4, 2e-4), (LinearSchedule(4e-4, 0.0, 1.0), None), (4e-4, LinearSchedule(2e-4, 1e-4, 1.0))],
        ids=str,
    )
    def test_lower_learning_rates(self, dataset: Any, tmp_path: Path, learning_rate: Any, qf_learning_rate: Any) -> None:
        """From the next update on, and in a model that is saved and loaded."""

        def rates(model: Any) -> list[float]:
            optimizers = [model.actor.optimizer, model.ent_coef_optimizer, model.critic.optimizer]
            return [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

        def schedule(argument: Any, progress: float) -> float:
            return argument(progress) if callable(argument) else argument

        model = calm_model(dataset, learning_rate=learning_rate, qf_learning_rate=qf_learning_rate)
        guard = CollapseGuardCallback(floor=-10, learning_rate_factor=0.1, verbose=0)
        recorder = Recorder(rates)
        model.learn(16, callback=[Wreck({6, 12}), evaluation(guard), recorder])
        # Updates between the calls have the progress of the step before
        for call, factor in [(6, 1.0), (7, 0.1), (12, 0.1), (13, 0.01), (16, 0.01)]:
            progress = 1 - (call - 1) / 16
            actor = factor * schedule(learning_rate, progress)
            critic = factor * schedule(learning_rate if qf_learning_rate is None else qf_learning_rate, progress)
            if call not in (6, 12):  # where the state that came back has rates of its own time
                assert recorder.steps[call - 1] == pytest.approx([actor, actor, critic]), call

        model.save(tmp_path / "model.zip")
        loaded = Off2OnSAC.load(tmp_path / "model.zip", env=CalmEnv(), dataset=dataset)
        loaded.learn(2, reset_num_timesteps=False)
        progress = loaded._current_progress_remaining
        factor = 0.01
        actor = factor * schedule(learning_rate, progress)
        critic = factor * schedule(learning_rate if qf_learning_rate is None else qf_learning_rate, progress)
        assert rates(loaded) == pytest.approx([actor, actor, critic])

    def test_learning_rates_that_stay(self, dataset: Any) -> None:
        model = calm_model(dataset, learning_rate=4e-4)
        guard = CollapseGuardCallback(floor=-10, learning_rate_factor=1.0, verbose=0)
        model.learn(7, callback=[Wreck({6}), evaluation(guard)])
        assert guard.n_restores == 1
        assert model.learning_rate == model.lr_schedule(0.5) == 4e-4

    def test_last_restore_ends_the_training(self, dataset: Any, capsys: pytest.CaptureFixture) -> None:
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-10, max_restores=2)
        callbacks: list[BaseCallback] = [Wreck({6, 12}), evaluation(guard), Recorder(state_of)]
        model.learn(100, callback=callbacks)
        assert model.num_timesteps == 12
        assert_same(state_of(model), callbacks[2].steps[8])  # type: ignore[attr-defined]
        assert "fell below -7.5" in (out := capsys.readouterr().out)
        assert "(restore 1 of 2)" in out
        assert "(restore 2 of 2)" in out
        # Asked to go on, it only stops at another fall
        model.learn(6, callback=callbacks, reset_num_timesteps=False)
        assert model.num_timesteps == 18

    def test_beside_another_callback(self, dataset: Any) -> None:
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-10, verbose=0)
        rows = logged(model)
        children = CallbackList([NormalizedScoreCallback(-10, -5), guard])
        model.learn(9, callback=[Wreck({9}), evaluation(children)])
        assert len(rows.of("eval/normalized_score")) == 3
        assert guard.n_restores == 1

    def test_a_run_that_goes_on_elsewhere(self, dataset: Any, tmp_path: Path) -> None:
        """A fine-tuned model is loaded: its offline policy is gone, so the offline return is given."""
        model = calm_model(dataset)
        model.learn(6)
        model.save(tmp_path / "model.zip")
        loaded = Off2OnSAC.load(tmp_path / "model.zip", env=CalmEnv(), dataset=dataset)
        guard = CollapseGuardCallback(floor=-10, offline_return=-5.5, verbose=0)
        recorder = Recorder(state_of)
        loaded.learn(6, callback=[Wreck({3}), evaluation(guard), recorder], reset_num_timesteps=False)
        assert guard.threshold == -7.75
        assert_same(recorder.steps[2], recorder.starts[0])

    @pytest.mark.parametrize(("eval_freq", "n_envs"), [(4, 2), (7, 1), (0, 1)])
    def test_warns_of_no_evaluations(self, dataset: Any, eval_freq: int, n_envs: int) -> None:
        model = small_model(make_vec_env(CalmEnv, n_envs=n_envs), dataset=dataset)
        guard = CollapseGuardCallback(floor=-20)
        n_calls = -(-6 // n_envs)
        with pytest.warns(UserWarning, match=rf"`eval_freq={eval_freq}` asks for no evaluation in the {n_calls} calls"):
            model.learn(6, callback=evaluation(guard, eval_freq=eval_freq))
        assert guard.n_calls == 0

    def test_evaluations_between_several_learns(self, dataset: Any) -> None:
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-20)
        callback = evaluation(guard, eval_freq=6)
        with pytest.warns(UserWarning, match=r"no evaluation in the 4 calls"):
            model.learn(4, callback=callback)
        # Warnings of the package are errors: the second one has the sixth call
        model.learn(4, callback=callback, reset_num_timesteps=False)
        assert guard.n_calls == 1

    def test_warns_where_nothing_can_be_lost(self, dataset: Any) -> None:
        model = calm_model(dataset)
        guard = CollapseGuardCallback(floor=-2, verbose=0)
        with pytest.warns(
            UserWarning, match=r"the offline return -5\.\d\d is not above the floor -2\.00.*Use a lower `floor`"
        ):
            model.learn(9, callback=[Wreck({6}), evaluation(guard)])
        assert guard.n_restores == 0

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"min_share": 1.1}, r"`min_share` must be in \[0, 1\], got 1.1"),
            ({"min_share": -0.1}, r"`min_share` must be in \[0, 1\], got -0.1"),
            ({"max_restores": 0}, r"`max_restores` must be at least 1, got 0"),
            ({"learning_rate_factor": 0.0}, r"`learning_rate_factor` must be in \(0, 1\], got 0.0"),
            ({"learning_rate_factor": 2.0}, r"`learning_rate_factor` must be in \(0, 1\], got 2.0"),
            ({"offline_return": float("nan")}, r"`offline_return` must be finite, got nan"),
            ({"floor": -float("inf")}, r"`floor` must be finite, got -inf"),
        ],
    )
    def test_wrong_arguments(self, kwargs: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            CollapseGuardCallback(**kwargs)

    def test_no_offline_phase(self) -> None:
        model = SAC("MlpPolicy", CalmEnv())
        with pytest.raises(ValueError, match=r"an offline phase, e.g. an Off2OnSAC, got a SAC"):
            model.learn(3, callback=evaluation(CollapseGuardCallback(floor=0)))

    def test_no_floor(self) -> None:
        model = small_model(CalmEnv())
        with pytest.raises(ValueError, match=r"no dataset to take the floor from: use `CollapseGuardCallback\(floor="):
            model.learn(3, callback=evaluation(CollapseGuardCallback()))

    def test_on_new_best(self, dataset: Any) -> None:
        model = calm_model(dataset)
        callback = EvalCallback(Monitor(CalmEnv()), CollapseGuardCallback(), eval_freq=6, verbose=0)
        with pytest.raises(ValueError, match=r"must be the `callback_after_eval`, not the `callback_on_new_best`"):
            model.learn(6, callback=callback)


@pytest.mark.parametrize(
    "callback", [NormalizedScoreCallback(-10, -5), CollapseGuardCallback(floor=-10)], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("place", ["alone", "in a list", "other event"])
def test_without_evaluations(dataset: Any, callback: BaseCallback, place: str) -> None:
    model = calm_model(dataset)
    outer: Any = {"alone": callback, "in a list": [callback]}.get(place)
    name = type(callback).__name__
    with pytest.raises(ValueError, match=rf"{name} works on evaluations: pass `EvalCallback\(eval_env, callback_after_eval="):
        model.learn(3, callback=EveryNTimesteps(2, callback) if outer is None else outer)
    assert model.num_timesteps == 0


class TestOfflineShare:
    """The probability that a draw falls on given rows of the dataset, against what is drawn."""

    @pytest.mark.parametrize("scheme", ["balanced", "uniform", "online", "offline", "symmetric"])
    def test_against_draws(self, scheme: str) -> None:
        np.random.seed(0)
        dataset = make_dataset(n_episodes=2, length=10)
        rows = np.arange(20) % 3 == 0
        callback = OfflineShareCallback(rows, "third", eval_freq=2)
        model = small_model(dataset=dataset, replay_buffer_kwargs={"scheme": scheme})
        output = Rows()
        model.set_logger(Logger(None, [output]))
        model.learn(8, callback=callback, log_interval=1)
        buffer = model.replay_buffer
        n_rows = buffer.n_offline + buffer.n_online
        assert buffer.n_online == 8
        if scheme == "balanced":
            buffer.update_priorities(np.arange(n_rows), np.random.exponential(size=n_rows))
        indices = buffer.sample(40_000).indices
        drawn = np.isin(indices, np.flatnonzero(rows)).mean()
        assert callback.share() == pytest.approx(drawn, abs=0.01)
        assert (callback.share() == 0) == (scheme == "online")

    def test_logs_the_online_phase(self) -> None:
        model = small_model(dataset=make_dataset(n_episodes=2, length=10), replay_buffer_kwargs={"scheme": "uniform"})
        shares: list[float] = []

        class Reader(BaseCallback):
            def _on_step(self) -> bool:
                if "replay/third_share" in self.logger.name_to_value:
                    shares.append(self.logger.name_to_value["replay/third_share"])
                    del self.logger.name_to_value["replay/third_share"]
                return True

        callbacks: list[BaseCallback] = [OfflineShareCallback(np.arange(20) < 5, "third", eval_freq=2), Reader()]
        model.learn_offline(gradient_steps=2, callback=callbacks, log_interval=None)
        assert shares == []
        model.learn(4, callback=callbacks, log_interval=100)
        assert shares == [5 / 21, 5 / 23]  # SB3 calls back before it stores the step

    def test_nothing_to_draw_from(self) -> None:
        model = small_model(dataset=make_dataset(n_episodes=2, length=10), replay_buffer_kwargs={"scheme": "online"})
        callback = OfflineShareCallback(np.ones(20, bool), "any")
        callback.init_callback(model)
        assert np.isnan(callback.share())

    def test_what_cannot_be(self) -> None:
        with pytest.raises(ValueError, match=r"`eval_freq` must be at least 1, got 0"):
            OfflineShareCallback(np.ones(20, bool), "any", eval_freq=0)
        model = small_model()
        with pytest.raises(ValueError, match=r"OfflineShareCallback needs a model with a dataset: pass `dataset=...`"):
            model.learn(1, callback=OfflineShareCallback(np.ones(20, bool), "any"))
        model = small_model(dataset=make_dataset(n_episodes=2, length=10))
        for rows, got in ((np.ones(19, bool), "bool of shape \\(19,\\)"), (np.arange(20), "int64 of shape \\(20,\\)")):
            with pytest.raises(ValueError, match=rf"one bool for each of the dataset's 20 transitions, got {got}"):
                model.learn(1, callback=OfflineShareCallback(rows, "any"))
