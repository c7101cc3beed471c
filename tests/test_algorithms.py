"""What every algorithm of the package keeps: both phases, saving and loading, seeds, callbacks, spaces, and clear errors."""

import gc
import json
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE_SPACE, TinyEnv, assert_same, make_dataset, parameters_of, small_kwargs
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.td3.policies import TD3Policy
from test_offline import FakeBar

from sb3_off2on import AWAC, BCQ, Off2OnSAC, load_dataset

ALGORITHMS = (Off2OnSAC, AWAC, BCQ)
DOCS = Path(__file__).parents[1] / "docs" / "modules"
COUNTERS = ("num_timesteps", "_n_updates", "_n_offline_updates", "_episode_num", "pretrained", "_handed_over")


class FrozenExtractor(FlattenExtractor):
    """A linear encoder that is not trained."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space)
        self.linear = th.nn.Linear(self.features_dim, self.features_dim).requires_grad_(False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(super().forward(observations))


Algorithm = type[Off2OnSAC] | type[AWAC] | type[BCQ]


@pytest.fixture(params=ALGORITHMS, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset(2, 30)


def kwargs_of(cls: Algorithm, **kwargs: Any) -> dict[str, Any]:
    """Updates of a few milliseconds; the first one online (of 8) is at 4 environment steps."""
    if cls is Off2OnSAC:
        return small_kwargs(**kwargs)
    common = {name: value for name, value in small_kwargs().items() if name not in ("cql_n_actions", "density_ratio_kwargs")}
    own: dict[str, Any] = {"n_target_actions": 3} if cls is BCQ else {}
    policy_kwargs = {"vae_net_arch": [16], "n_candidates": 4} if cls is BCQ else {}
    policy_kwargs = {**common.pop("policy_kwargs"), **policy_kwargs, **kwargs.pop("policy_kwargs", {})}
    return {**common, **own, "policy_kwargs": policy_kwargs, **kwargs}


def make(cls: Algorithm, env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, env, **kwargs_of(cls, **kwargs))


def state_of(model: Any) -> dict[str, Any]:
    """Everything that training changes and that a saved model must bring back."""
    return {
        "networks": parameters_of(model.policy),
        "optimizers": {name: deepcopy(value) for name, value in model.get_parameters().items() if "optimizer" in name},
        "counters": {name: getattr(model, name) for name in COUNTERS},
        "dataset": model.dataset_info,
    }


class TestPhases:
    def test_both_move_every_network(self, cls: Algorithm, dataset: Any) -> None:
        model = make(cls, dataset=dataset)
        for learn in (lambda: model.learn_offline(gradient_steps=3), lambda: model.learn(6)):
            before = parameters_of(model.policy)
            learn()
            for name, parameter in model.policy.named_parameters():
                assert not th.equal(before[name], parameter), name
                assert th.isfinite(parameter).all(), name
        assert (model.num_timesteps, model._n_offline_updates, model._n_updates) == (3 + 6, 3, 8 + 2)

    def test_one_gradient_of_each_critic_an_update(self, cls: Algorithm, dataset: Any) -> None:
        """The actor's loss needs the critics' values, but none of their gradients."""
        model = make(cls, dataset=dataset)
        model.learn_offline(gradient_steps=1)
        model.learn(4)
        n_gradients = [0] * len(list(model.critic.parameters()))
        for index, parameter in enumerate(model.critic.parameters()):

            def count(_: th.Tensor, index: int = index) -> None:
                n_gradients[index] += 1

            parameter.register_hook(count)
        model.train_offline(2, batch_size=8)
        model.train(3, batch_size=8)
        assert n_gradients == [2 + 3] * len(n_gradients)

    def test_long_updates_hold_nothing(self, cls: Algorithm, dataset: Any) -> None:
        """
        Within one call of ``train()``, as many tensors live at its last update as at its third. Even a scalar that stays, in
        a list for the log, keeps the memory around it from being used again: half a MB an update at full size.
        """
        model = make(cls, dataset=dataset)
        model.learn(4)
        n_living = []
        sample = model.replay_buffer.sample

        def count_and_sample(*args: Any, **kwargs: Any) -> Any:
            gc.collect()  # what other tests have left
            n_living.append(sum(issubclass(type(thing), th.Tensor) for thing in gc.get_objects()))
            return sample(*args, **kwargs)

        model.replay_buffer.sample = count_and_sample
        model.train(6, batch_size=8)
        assert n_living[5] == n_living[2]

    def test_progress_of_long_updates(self, cls: Algorithm, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """SB3's bar counts environment steps; how far the first update is, minutes at full size, it tells as well."""
        monkeypatch.setattr("stable_baselines3.common.callbacks.tqdm", FakeBar)
        monkeypatch.setattr(FakeBar, "bars", [])
        model = make(cls, dataset=dataset, first_update_multiplier=30)
        model.learn_offline(gradient_steps=1)
        model.learn(6, progress_bar=True)
        (bar,) = FakeBar.bars
        # After 4 of 6 steps; the others are followed by one update each
        assert bar.descriptions == [(4, "update 0 of 120"), (4, "update 50 of 120"), (4, "update 100 of 120"), (4, None)]

    def test_targets_start_as_copies(self, cls: Algorithm) -> None:
        policy = make(cls).policy
        for name in ("actor", "critic"):
            if hasattr(policy, f"{name}_target"):
                assert_same(parameters_of(getattr(policy, f"{name}_target")), parameters_of(getattr(policy, name)))

    def test_minibatches_and_modes(self, cls: Algorithm, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        Offline, each member has a minibatch of its own; online, there is one for all. Networks are in training mode meanwhile,
        but for the targets, and in evaluation mode to act.
        """
        model = make(cls, dataset=dataset, offline_batch_size=5, batch_size=7)
        modules = [getattr(model.policy, name) for name in ("actor", "critic", "vae") if hasattr(model.policy, name)]
        targets = [getattr(model.policy, f"{name}_target", model.critic_target) for name in ("actor", "critic")]
        n_rows = []

        def spy(name: str) -> None:
            method = getattr(model.replay_buffer, name)

            def recording(batch_size: int, **kwargs: Any) -> Any:
                assert all(module.training for module in modules)
                assert not any(module.training for module in targets)
                n_rows.append((name, batch_size))
                return method(batch_size, **kwargs)

            monkeypatch.setattr(model.replay_buffer, name, recording)

        for name, learn in (
            ("sample_offline", lambda: model.learn_offline(gradient_steps=1)),
            ("sample", lambda: model.learn(4)),
        ):
            spy(name)
            model.predict(dataset.observations[0])
            assert not any(module.training for module in modules)
            learn()
        assert n_rows[0] == ("sample_offline", 2 * 5)
        assert [n for name, n in n_rows if name == "sample"] == [7] * 8

    def test_no_random_actions_and_first_update_at_learning_starts(
        self, cls: Algorithm, dataset: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make(cls, dataset=dataset, train_freq=10, first_update_multiplier=3)
        model.learn_offline(gradient_steps=2)
        calls = []
        monkeypatch.setattr(model.action_space, "sample", lambda: pytest.fail("a random action"))
        monkeypatch.setattr(
            model, "train", lambda gradient_steps, batch_size: calls.append(model._online_gradient_steps(gradient_steps))
        )
        model.learn(4)
        assert model.replay_buffer.size() == 4
        assert calls == [3 * 4]

    def test_without_dataset(self, cls: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
        """An online algorithm, with SB3's random warm-up."""
        model = make(cls)
        n_random = 0
        sample = model.action_space.sample

        def counting() -> Any:
            nonlocal n_random
            n_random += 1
            return sample()

        monkeypatch.setattr(model.action_space, "sample", counting)
        before = parameters_of(model.actor)
        model.learn(8)
        assert n_random == 4
        assert model._n_updates == 4
        assert not th.equal(parameters_of(model.actor)[next(iter(before))], before[next(iter(before))])

    def test_learn_pretrains_first(self, cls: Algorithm, dataset: Any) -> None:
        one = make(cls, dataset=dataset, offline_gradient_steps=3).learn(6)
        two = make(cls, dataset=dataset).learn_offline(gradient_steps=3).learn(6)
        assert_same(state_of(one), state_of(two))

    def test_pretrain_offline(self, cls: Algorithm, dataset: Any) -> None:
        kwargs = {name: value for name, value in kwargs_of(cls).items() if name != "gradient_steps"}
        model: Any = cls.pretrain_offline(dataset, offline_gradient_steps=3, **kwargs)
        assert isinstance(model, cls)
        assert (model._n_offline_updates, model.pretrained) == (3, True)
        model.learn(4)
        assert model._n_updates == 8

    def test_second_offline_phase(self, cls: Algorithm, dataset: Any) -> None:
        model = make(cls, dataset=dataset)
        for _ in range(2):
            model.learn_offline(gradient_steps=2).learn(5, reset_num_timesteps=False)
        assert (model._n_offline_updates, model._n_updates, model.num_timesteps) == (4, 8 + 1, 2 * (2 + 5))

    @pytest.mark.parametrize("scheme", ["uniform", "online", "offline", "symmetric"])
    def test_replay_schemes(self, cls: Algorithm, dataset: Any, scheme: str) -> None:
        model = make(cls, dataset=dataset, replay_buffer_kwargs={"scheme": scheme})
        model.learn_offline(gradient_steps=1).learn(5)
        fraction = model.logger.name_to_value["replay/offline_fraction"]
        expected = {"online": 0.0, "offline": 1.0, "symmetric": 0.5}
        assert fraction == expected[scheme] if scheme in expected else 0.5 < fraction <= 1

    def test_better_than_the_behaviour(self, cls: Algorithm) -> None:
        """Uniform actions, of which those close to 0.6 pay, in episodes of one step: offline, the agents find them."""

        def reward_of(action: np.ndarray) -> np.ndarray:
            return 1 - 4 * (action - 0.6) ** 2

        rng = np.random.default_rng(0)
        n = 2000
        observations, actions = rng.uniform(-1, 1, (2, n, 1)).astype(np.float32)
        env = TinyEnv(spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)))
        arrays: dict[str, Any] = {
            "observations": observations,
            "next_observations": observations,
            "actions": actions,
            "rewards": reward_of(actions[:, 0]),
            "terminations": np.ones(n, dtype=bool),
            "truncations": np.zeros(n, dtype=bool),
            "observation_space": env.observation_space,
            "action_space": env.action_space,
        }
        own: dict[Any, dict[str, Any]] = {
            Off2OnSAC: {"cql_alpha": 0.1, "offline_learning_rate": 3e-3, "offline_qf_learning_rate": 3e-3, "ent_coef": 0.01},
            AWAC: {"awac_lambda": 0.2, "learning_rate": 1e-2},
            BCQ: {"learning_rate": 3e-3, "policy_kwargs": {"n_candidates": 20}},
        }
        model = make(cls, env, dataset=load_dataset(arrays), offline_batch_size=64, **own[cls])
        model.learn_offline(gradient_steps=120, log_interval=None)
        played, _ = model.predict(np.linspace(-1, 1, 21, dtype=np.float32)[:, None], deterministic=True)
        assert arrays["rewards"].mean() < -1.5
        assert np.mean(reward_of(played)) > 0.25


class TestSaving:
    @pytest.mark.parametrize("moment", ["fresh", "offline", "online"])
    def test_everything_comes_back_and_training_goes_on_alike(
        self, cls: Algorithm, dataset: Any, tmp_path: Path, moment: str
    ) -> None:
        model = make(cls, dataset=dataset)
        if moment != "fresh":
            model.learn_offline(gradient_steps=2)
        if moment == "online":
            model.learn(5)
        model.save(tmp_path / "model.zip")
        loaded: Any = cls.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
        assert_same(state_of(loaded), state_of(model))
        loaded.set_dataset(dataset)
        observations = dataset.observations[:20]
        for deterministic in (True, False):
            predictions = []
            for each in (model, loaded):
                th.manual_seed(0)
                predictions.append(each.predict(observations, deterministic=deterministic)[0])
            np.testing.assert_array_equal(*predictions)
        for each in (model, loaded):
            set_random_seed(0)
            each.learn_offline(gradient_steps=2)
        assert_same(state_of(loaded), state_of(model))

    def test_with_the_replay_buffer(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        model = make(cls, dataset=dataset).learn_offline(gradient_steps=2).learn(5)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded: Any = cls.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu", dataset=dataset)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        loaded.set_logger(configure(None, []))
        for each in (model, loaded):
            set_random_seed(0)
            each.train(gradient_steps=2, batch_size=8)
        assert_same(state_of(loaded), state_of(model))

    def test_file_holds_no_network_twice(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        """Aliases of the policy's networks are left out of the pickled attributes, and so is the dataset."""
        model = make(cls, dataset=dataset).learn_offline(gradient_steps=1)
        excluded = set(model._excluded_save_params())
        modules = {name for name, value in vars(model).items() if isinstance(value, th.nn.Module)}
        assert modules <= excluded | {"density_ratio"}
        assert "dataset" in excluded

    def test_policy_alone(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        own: dict[Any, dict[str, Any]] = {
            Off2OnSAC: {},
            AWAC: {"actor_weight_decay": 0.01},
            BCQ: {"phi": 0.3, "latent_dim": 3, "latent_clip": 0.7},
        }
        model = make(cls, dataset=dataset, policy_kwargs={"n_critics": 1, "critic_layer_norm": True, **own[cls]})
        model.learn_offline(gradient_steps=2)
        model.policy.save(tmp_path / "policy.pth")
        loaded = type(model.policy).load(tmp_path / "policy.pth", device="cpu")
        assert_same(parameters_of(loaded), parameters_of(model.policy))
        for name, value in own[cls].items():
            assert getattr(loaded, name) == value
        np.testing.assert_array_equal(
            loaded.predict(dataset.observations[:9], deterministic=True)[0],
            model.predict(dataset.observations[:9], deterministic=True)[0],
        )

    @pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
    def test_actor_alone(self, cls: Algorithm, policy: str, tmp_path: Path) -> None:
        """SB3's way to deploy: ``model.actor.save()``."""
        model = make(cls, "Pendulum-v1" if policy == "MlpPolicy" else TinyEnv(IMAGE_SPACE), policy, buffer_size=10)
        networks = [model.actor, model.vae] if cls is BCQ else [model.actor]
        for network in networks:
            network.save(tmp_path / "network.pth")
            loaded = type(network).load(tmp_path / "network.pth", device="cpu")
            assert_same(parameters_of(loaded), parameters_of(network))
            obs, _ = model.policy.obs_to_tensor(model.env.reset())
            actions = th.ones(2, 1, 1, model.action_space.shape[0])
            inputs = (obs,) if cls is not BCQ else (obs, 2 if network is model.vae else actions, False)
            outputs = []
            for same in (network, loaded):
                set_random_seed(0)
                outputs.append(same(*inputs).detach())
            assert_same(*outputs)

    def test_wrong_arguments_of_load(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        """They are checked as those of the constructor."""
        make(cls, dataset=dataset).save(tmp_path / "model.zip")
        with pytest.raises(ValueError, match="`offline_batch_size` must be at least 1, got 0"):
            cls.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu", offline_batch_size=0)

    def test_training_asks_for_the_dataset(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        make(cls, dataset=dataset).save(tmp_path / "model.zip")
        loaded = cls.load(tmp_path / "model.zip", env=gym.make("Pendulum-v1"), device="cpu")
        with pytest.raises(ValueError, match=r"was trained with the dataset .*call `model.set_dataset"):
            loaded.learn(1)


class TestSeeds:
    def test_same_seed_same_run(self, cls: Algorithm, dataset: Any) -> None:
        runs = [state_of(make(cls, dataset=dataset, seed=s).learn_offline(gradient_steps=2).learn(6)) for s in (3, 3, 4)]
        assert_same(runs[0], runs[1])
        with pytest.raises(AssertionError):
            assert_same(runs[0], runs[2])

    def test_members_differ(self, cls: Algorithm) -> None:
        model = make(cls)
        one, other = (model.policy.get_member(index) for index in range(2))
        for network, state in one.items():
            assert any(not th.equal(value, other[network][name]) for name, value in state.items()), network


class TestCallbacks:
    def test_one_counter_through_both_phases(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        checkpoints = CheckpointCallback(save_freq=4, save_path=str(tmp_path))
        evaluations = EvalCallback(
            make_vec_env(lambda: gym.make("Pendulum-v1", max_episode_steps=3)),
            eval_freq=6,
            n_eval_episodes=1,
            log_path=str(tmp_path),
            verbose=0,
            warn=False,
        )
        model = make(cls, dataset=dataset)
        model.learn_offline(gradient_steps=6, callback=[checkpoints, evaluations])
        model.learn(6, callback=[checkpoints, evaluations])
        assert sorted(path.name for path in tmp_path.glob("*.zip")) == [f"rl_model_{n}_steps.zip" for n in (12, 4, 8)]
        assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [6, 12]

    @pytest.mark.parametrize(("last", "expected"), [(2, (2, 2, 0)), (7, (7, 4, 0)), (10, (10, 4, 9))])
    def test_returning_false_stops(self, cls: Algorithm, dataset: Any, last: int, expected: tuple[int, ...]) -> None:
        """In the offline phase, in the warm-up, and later."""
        model = make(cls, dataset=dataset, offline_gradient_steps=4)
        model.learn(20, callback=lambda *_: model.num_timesteps < last)
        assert (model.num_timesteps, model._n_offline_updates, model._n_updates) == expected

    def test_learning_rates_follow_each_phase(self, cls: Algorithm, dataset: Any) -> None:
        def schedule(progress: float) -> float:
            return 1e-3 * progress

        offline = {"offline_learning_rate": schedule, "offline_qf_learning_rate": schedule}
        own: dict[str, Any] = offline if cls is Off2OnSAC else {}
        model = make(cls, dataset=dataset, learning_rate=schedule, **own)
        rates: list[float] = []

        def record(*_: Any) -> bool:
            networks = [getattr(model.policy, name) for name in ("actor", "critic", "vae") if hasattr(model.policy, name)]
            (rate,) = {network.optimizer.param_groups[0]["lr"] for network in networks}
            rates.append(rate)
            return True

        model.learn_offline(gradient_steps=4, callback=record)
        np.testing.assert_allclose(rates, 1e-3 * np.array([1, 0.75, 0.5, 0.25]))
        rates.clear()
        model.learn(8, callback=record)
        # At step 6 the last update was the one after 5 of 8 steps
        np.testing.assert_allclose(rates[5:], 1e-3 * np.array([3, 2, 1]) / 8, atol=1e-12)

    def test_logged_keys_are_documented(self, cls: Algorithm, dataset: Any) -> None:
        page = (DOCS / {Off2OnSAC: "off2on_sac.md", AWAC: "awac.md", BCQ: "bcq.md"}[cls]).read_text()
        model = make(cls, dataset=dataset)
        seen: set[str] = set()

        def collect(*_: Any) -> bool:
            seen.update(model.logger.name_to_value)
            return True

        model.learn_offline(gradient_steps=2, log_interval=None, callback=collect)
        model.learn(5, log_interval=10**6)
        seen |= set(model.logger.name_to_value)
        own = {name for name in seen if name.split("/")[0] in ("offline", "replay", "density_ratio")}
        if cls is not Off2OnSAC:  # whose others are SAC's
            own |= {name for name in seen if name.startswith("train/")} - {"train/n_updates", "train/learning_rate"}
        assert {"offline/critic_loss", "offline/actor_loss", "offline/learning_rate", "replay/offline_fraction"} <= own
        undocumented = {name for name in own if f"`{name}`" not in page}
        assert not undocumented

    def test_callbacks_log_numbers_in_both_phases(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        """Updates record tensors, and outputs write what stands behind them."""
        model = make(cls, dataset=dataset)
        model.set_logger(configure(str(tmp_path), ["json"]))
        model.learn_offline(gradient_steps=2, callback=lambda *_: model.logger.dump(1) or True)
        model.learn(8, callback=lambda *_: model.logger.dump(2) or True)
        rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
        for key in ("offline/critic_loss", "train/critic_loss", "replay/offline_fraction"):
            values = [row[key] for row in rows if key in row]
            assert values
            assert all(isinstance(value, float) for value in values)

    def test_name_of_the_run(self, cls: Algorithm, dataset: Any, tmp_path: Path) -> None:
        model = make(cls, dataset=dataset, tensorboard_log=str(tmp_path))
        model.learn_offline(gradient_steps=1).learn(4)
        assert [path.name for path in tmp_path.iterdir()] == [f"{cls.__name__}_1"]


class TestPolicies:
    def test_frozen_features_stay(self, cls: Algorithm, dataset: Any) -> None:
        """As with SAC: a pretrained encoder that must not change."""
        model = make(cls, dataset=dataset, policy_kwargs={"features_extractor_class": FrozenExtractor})
        before = parameters_of(model.policy)
        model.learn_offline(gradient_steps=2).learn(5)
        # Not those of the target networks, which average equal numbers
        frozen = [name for name in before if "features_extractor" in name and "linear" in name and "target" not in name]
        assert len(frozen) >= 4
        assert_same({name: model.policy.state_dict()[name] for name in frozen}, {name: before[name] for name in frozen})

    def test_compile_mode(self, cls: Algorithm) -> None:
        """Compilation itself waits for the first call."""
        model = make(cls, policy_kwargs={"compile_mode": "default"})
        assert model.policy.compile_mode == "default"
        assert all(network._compiled_call_impl is not None for network in model.policy._stacked_networks())

    def test_single_agents_become_an_ensemble(self, cls: Algorithm) -> None:
        """With the arguments of the single agents but for their number."""
        single = make(cls, policy_kwargs={"ensemble_size": 1})
        ensemble = make(cls, policy_kwargs={"ensemble_size": 3})
        member = single.get_member(0)
        ensemble.set_member(2, member)
        assert_same(ensemble.get_member(2), member)

    def test_set_member_starts_anew(self, cls: Algorithm, dataset: Any) -> None:
        """What was gathered about the old parameters is gone, and the new ones are played."""
        model = make(cls, dataset=dataset).learn_offline(gradient_steps=2)
        optimizers = ["actor.optimizer", "critic.optimizer", *(["vae.optimizer"] if cls is BCQ else [])]
        rates = {name: model.get_parameters()[name]["param_groups"] for name in optimizers}
        model.set_member(0, model.get_member(1))
        for name in optimizers:
            assert not model.get_parameters()[name]["state"]
            assert_same(model.get_parameters()[name]["param_groups"], rates[name])
        new = make(cls)
        new.set_member(0, model.get_member(0))
        assert new.pretrained

    def test_hand_over_keeps_what_the_baselines_learned(self, cls: Algorithm, dataset: Any) -> None:
        """Only Off2OnSAC starts its online phase with fresh optimizers."""
        model = make(cls, dataset=dataset).learn_offline(gradient_steps=2)
        before = state_of(model)
        model._hand_over()
        after = state_of(model)
        if cls is Off2OnSAC:
            assert not after["optimizers"]["actor.optimizer"]["state"]
        else:
            assert_same(after["networks"], before["networks"])
            assert_same(after["optimizers"], before["optimizers"])


class TestEnvironments:
    def test_several(self, cls: Algorithm, dataset: Any) -> None:
        model = make(cls, make_vec_env("Pendulum-v1", n_envs=3), dataset=dataset)
        model.learn_offline(gradient_steps=2).learn(12)
        assert (model.replay_buffer.n_online, model._n_updates) == (12, 8 + 2)

    def test_vec_normalize(self, cls: Algorithm) -> None:
        model = make(cls, VecNormalize(DummyVecEnv([TinyEnv])), dataset=make_dataset(2, 30, env=TinyEnv()))
        normalizers = []
        for name in ("sample", "sample_offline"):
            draw = getattr(model.replay_buffer, name)

            def spy(batch_size: int, env: Any = None, draw: Any = draw) -> Any:
                normalizers.append(env)
                return draw(batch_size, env=env)

            setattr(model.replay_buffer, name, spy)
        model.learn_offline(gradient_steps=2).learn(6)
        assert len(normalizers) >= 2 + model._n_updates
        assert set(normalizers) == {model.get_vec_normalize_env()}

    @pytest.mark.parametrize(
        ("observation_space", "policy"),
        [
            (spaces.Dict(image=IMAGE_SPACE, speed=spaces.Box(-1, 1, (1,))), "MultiInputPolicy"),
            (IMAGE_SPACE, "CnnPolicy"),
        ],
        ids=["dict", "images"],
    )
    def test_observations(self, cls: Algorithm, tmp_path: Path, observation_space: spaces.Space, policy: str) -> None:
        env = TinyEnv(observation_space)
        dataset = make_dataset(2, 6, env=env)
        kwargs = {"learning_starts": 2, "batch_size": 3, "offline_batch_size": 3, "buffer_size": 20}
        model = make(cls, env, policy, dataset=dataset, first_update_multiplier=1, **kwargs)
        before = parameters_of(model.policy)
        model.learn_offline(gradient_steps=1).learn(3)
        for name, parameter in model.policy.named_parameters():
            assert not th.equal(before[name], parameter), name
        model.save(tmp_path / "model.zip")
        loaded: Any = cls.load(tmp_path / "model.zip", env=TinyEnv(observation_space), device="cpu")
        assert_same(state_of(loaded), state_of(model))
        observation = env.observation_space.sample()
        actions, _ = loaded.predict(observation, deterministic=True)
        assert env.action_space.contains(actions)
        np.testing.assert_array_equal(actions, model.predict(observation, deterministic=True)[0])

    def test_policy_that_fits_the_dataset(self, cls: Algorithm) -> None:
        """pretrain_offline() chooses the policy by its observations."""
        kwargs = {name: value for name, value in kwargs_of(cls, buffer_size=20).items() if name != "gradient_steps"}
        for space, name in ((IMAGE_SPACE, "CnnPolicy"), (spaces.Dict(x=spaces.Box(-1, 1, (1,))), "MultiInputPolicy")):
            env = TinyEnv(space)
            model = cls.pretrain_offline(make_dataset(2, 6, env=env), env, offline_gradient_steps=1, **kwargs)
            assert type(model.policy) is cls.policy_aliases[name]


class TestArguments:
    def test_are_those_of_sb3_then_ours(self, cls: Algorithm) -> None:
        """In the order of SB3's base class as SAC, TD3 and others have it; what is ours comes behind all of SB3's."""
        ours = list(signature(cls.__init__).parameters)
        of_sac = list(signature(SAC.__init__).parameters)
        common = [
            name for name in of_sac if name in signature(OffPolicyAlgorithm.__init__).parameters or name == "_init_setup_model"
        ]
        n_sb3 = ours.index("_init_setup_model") + 1
        without_sde = [name for name in common if "sde" not in name]
        assert [name for name in ours[:n_sb3] if name in without_sde] == without_sde
        assert set(ours[:n_sb3]) <= set(of_sac)
        assert not set(ours[n_sb3:]) & set(of_sac)

    def test_are_documented(self, cls: Algorithm) -> None:
        for name in list(signature(cls.__init__).parameters)[1:]:
            assert f":param {name}:" in (cls.__doc__ or ""), name

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"n_steps": 3}, "`n_steps=3` is not supported, set it to 1"),
            ({"replay_buffer_class": ReplayBuffer}, "`replay_buffer_class=ReplayBuffer` cannot hold an offline part"),
            ({"replay_buffer_kwargs": {"scheme": "best"}}, "Unknown scheme='best', it must be one of 'balanced'"),
            ({"optimize_memory_usage": True}, "does not support optimize_memory_usage=True"),
            ({"offline_batch_size": 0}, "`offline_batch_size` must be at least 1, got 0"),
            ({"offline_gradient_steps": -1}, "`offline_gradient_steps` must be at least 0, got -1"),
            ({"first_update_multiplier": 0}, "`first_update_multiplier` must be at least 1, got 0"),
            ({"first_update_multiplier": 1.5}, "`first_update_multiplier` must be an integer, got 1.5"),
            ({"policy_kwargs": {"ensemble_size": 0}}, "`ensemble_size` must be an integer of at least 1, got 0"),
            ({"policy_kwargs": {"n_critics": 0}}, "`n_critics` must be an integer of at least 1, got 0"),
        ],
        ids=str,
    )
    def test_that_are_wrong(self, cls: Algorithm, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make(cls, **kwargs)

    @pytest.mark.parametrize("cls", [AWAC, BCQ])
    def test_balanced_replay_needs_density_ratios(self, cls: Algorithm) -> None:
        match = rf"scheme='balanced'\)` needs density ratios, which {cls.__name__} does not estimate: choose 'uniform'"
        with pytest.raises(ValueError, match=match):
            make(cls, replay_buffer_kwargs={"scheme": "balanced"})
        assert make(cls, replay_buffer_kwargs={"handle_timeout_termination": False}).replay_buffer.scheme == "uniform"

    @pytest.mark.parametrize(
        ("space", "match"),
        [
            (spaces.Discrete(3), r"must be continuous \(a Box space\), got Discrete\(3\)"),
            (spaces.Box(-np.inf, np.inf, (1,)), r"must be bounded, got Box\(-inf, inf"),
        ],
        ids=["discrete", "unbounded"],
    )
    def test_actions(self, cls: Algorithm, space: spaces.Space, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make(cls, TinyEnv(action_space=space))

    def test_policy_of_another_algorithm(self, cls: Algorithm) -> None:
        with pytest.raises(ValueError, match=r"`policy` must be a name or derived from \w+, got TD3Policy"):
            cls(TD3Policy, "Pendulum-v1")  # type: ignore[arg-type]

    def test_dataset_of_another_environment(self, cls: Algorithm, dataset: Any) -> None:
        model = make(cls, TinyEnv())
        with pytest.raises(ValueError, match="is not the environment's"):
            model.learn_offline(dataset, gradient_steps=1)
        assert model.dataset is None

    def test_nothing_to_learn_from(self, cls: Algorithm) -> None:
        with pytest.raises(ValueError, match=r"no dataset to learn from: pass `dataset=...` or call `model.set_dataset"):
            make(cls).learn_offline(gradient_steps=1)
        with pytest.raises(ValueError, match=r"`offline_gradient_steps=5` needs a dataset"):
            make(cls, offline_gradient_steps=5).learn(1)
