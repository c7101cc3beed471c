"""Saving and loading in the middle of anything: what comes back, what does not, and that training goes on from there."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import IMAGE_SPACE, TinyEnv, assert_same, make_dataset, parameters_of, saved_state, small_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_off2on import Off2OnSAC
from sb3_off2on.buffers import initial_priority
from sb3_off2on.policies import EnsembleCnnPolicy, EnsembleCQLPolicy, EnsembleMultiInputPolicy

MOMENTS = ("fresh", "offline", "online")


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset()


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def model_at(moment: str, dataset: Any, **kwargs: Any) -> Off2OnSAC:
    """A model before its offline phase, after it, or during its online phase."""
    model = small_model(dataset=dataset, **kwargs)
    if moment != "fresh":
        model.learn_offline(gradient_steps=3)
    if moment == "online":
        model.learn(6)
    return model


def saved_and_loaded(model: Off2OnSAC, path: Path, env: Any = None, **kwargs: Any) -> Off2OnSAC:
    model.save(path / "model.zip")
    return Off2OnSAC.load(path / "model.zip", env=pendulum() if env is None else env, device="cpu", **kwargs)


def predictions(model: Any, observations: Any) -> np.ndarray:
    actions, _ = model.predict(observations, deterministic=True)
    th.manual_seed(0)
    stochastic, _ = model.predict(observations)
    return np.array([actions, stochastic])


@pytest.mark.parametrize("moment", MOMENTS)
class TestThreeMoments:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"ent_coef": 0.1},
            {"cql_target_action_gap": 1.0, "calql": True},
            {"replay_buffer_kwargs": {"scheme": "uniform"}},
            {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "critic_layer_norm": True}},
        ],
        ids=str,
    )
    def test_everything_comes_back(self, dataset: Any, tmp_path: Path, moment: str, kwargs: dict[str, Any]) -> None:
        """Networks, targets, optimizers, coefficients, counters and predictions are equal to the last bit."""
        model = model_at(moment, dataset, **kwargs)
        loaded = saved_and_loaded(model, tmp_path)
        assert_same(saved_state(loaded), saved_state(model))
        assert {"density_ratio", "density_ratio.optimizer", "offline_ent_coef_optimizer"} <= set(loaded.get_parameters())
        observations = dataset.observations[:20]
        np.testing.assert_array_equal(predictions(loaded, observations), predictions(model, observations))

    def test_optimizers_step_what_was_loaded(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        """Training goes on in the loaded networks and coefficients, not in copies of them."""
        loaded = saved_and_loaded(model_at(moment, dataset), tmp_path)
        loaded.set_dataset(dataset)
        before = saved_state(loaded)
        loaded.learn_offline(gradient_steps=1)
        assert not th.equal(loaded.offline_log_ent_coef, before["variables"]["offline_log_ent_coef"])
        for name, parameter in loaded.policy.named_parameters():
            assert not th.equal(parameter, before["networks and optimizers"]["policy"][name]), name
        loaded.learn(4)
        assert loaded.log_ent_coef is not None
        assert loaded.log_ent_coef.item() != 0.0

    def test_load_trains_nothing(self, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        model = model_at(moment, dataset, offline_gradient_steps=5)
        model.save(tmp_path / "model.zip")

        def fail(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("load() must not train")

        for name in ("train", "train_offline", "learn", "learn_offline", "_hand_over", "set_dataset"):
            monkeypatch.setattr(Off2OnSAC, name, fail)
        Off2OnSAC.load(tmp_path / "model.zip", env=pendulum(), device="cpu")

    def test_training_asks_for_the_dataset(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        """Its source is named, and nothing happens before."""
        loaded = saved_and_loaded(model_at(moment, dataset), tmp_path)
        before = saved_state(loaded)
        with pytest.raises(ValueError, match=r"was trained with the dataset .*'source': 'arrays'.*call `model.set_dataset"):
            loaded.learn(10)
        with pytest.raises(ValueError, match=r"was trained with the dataset .*'source': 'arrays'.*call `model.set_dataset"):
            loaded.learn_offline(gradient_steps=10)
        assert_same(saved_state(loaded), before)

    def test_another_dataset_is_refused(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        loaded = saved_and_loaded(model_at(moment, dataset), tmp_path)
        with pytest.raises(ValueError, match=r"`dataset` is not the one this model was trained with: got .* expected "):
            loaded.set_dataset(make_dataset(seed=1))
        assert loaded.dataset is None
        loaded.set_dataset(make_dataset())  # the same rows, loaded again
        assert len(loaded.dataset or []) == len(dataset)

    def test_the_same_dataset_goes_on(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        loaded = saved_and_loaded(model_at(moment, dataset), tmp_path)
        loaded.set_dataset(dataset)
        loaded.learn_offline(gradient_steps=2)
        assert loaded._n_offline_updates == (2 if moment == "fresh" else 5)
        loaded.learn(5, reset_num_timesteps=False)
        assert loaded._n_updates == 9
        for name, parameter in loaded.policy.named_parameters():
            assert th.isfinite(parameter).all(), name

    def test_size_of_the_file(self, tmp_path: Path, moment: str) -> None:
        """A dataset ten times as large, with the returns that Cal-QL keeps of it, does not make the file larger."""
        sizes = []
        for n_episodes in (4, 40):
            model = model_at(moment, make_dataset(n_episodes), calql=True)
            model.save(tmp_path / f"{n_episodes}.zip")
            sizes.append((tmp_path / f"{n_episodes}.zip").stat().st_size)
        assert abs(sizes[1] - sizes[0]) < 10_000

    def test_without_environment(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        """Enough to predict."""
        model = model_at(moment, dataset)
        model.save(tmp_path / "model")
        loaded = Off2OnSAC.load(tmp_path / "model", device="cpu")
        assert loaded.get_env() is None
        observations = dataset.observations[:20]
        np.testing.assert_array_equal(predictions(loaded, observations), predictions(model, observations))

    def test_in_place(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        """``set_parameters()`` of a file, and ``get_parameters()`` of a model, into one that exists."""
        model = model_at(moment, dataset)
        model.save(tmp_path / "model.zip")
        sources: list[Any] = [str(tmp_path / "model.zip"), model.get_parameters()]
        for source in sources:
            other = small_model(dataset=dataset, seed=1)
            other.set_parameters(source, device="cpu")
            assert_same(other.get_parameters(), model.get_parameters())


class TestGoingOn:
    def test_same_run_as_without_saving(self, dataset: Any, tmp_path: Path) -> None:
        """With model, replay buffer and dataset, a resumed run does the same updates as one that was never stopped."""
        model = model_at("online", dataset)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        loaded.set_dataset(dataset)
        loaded.set_logger(configure(None, []))
        for run in (model, loaded):
            np.random.seed(5)
            th.manual_seed(5)
            run._current_progress_remaining = 0.5
            run.train(gradient_steps=4, batch_size=8)
        assert_same(saved_state(loaded), saved_state(model))
        indices = np.arange(len(dataset) + 6)
        np.testing.assert_array_equal(loaded.replay_buffer.priorities(indices), model.replay_buffer.priorities(indices))
        assert loaded.replay_buffer.default_priority == model.replay_buffer.default_priority

    def test_offline_phase_goes_on(self, dataset: Any, tmp_path: Path) -> None:
        model = model_at("offline", dataset, calql=True)
        loaded = saved_and_loaded(model, tmp_path)
        loaded.set_dataset(dataset)
        loaded.set_logger(configure(None, []))
        for run in (model, loaded):
            np.random.seed(5)
            th.manual_seed(5)
            run._current_progress_remaining = 0.5
            run.train_offline(gradient_steps=3, batch_size=8)
        assert_same(saved_state(loaded)["networks and optimizers"], saved_state(model)["networks and optimizers"])

    @pytest.mark.parametrize("dataset_first", [False, True])
    def test_no_second_first_update(
        self, dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset_first: bool
    ) -> None:
        """Neither hand-over nor first update come again, and ``_n_updates`` goes on."""
        model = model_at("online", dataset)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path)
        for attach in (True, False) if dataset_first else (False, True):
            if attach:
                loaded.set_dataset(dataset)
            else:
                loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        monkeypatch.setattr(loaded, "_hand_over", lambda: pytest.fail("the agents were handed over before"))
        random_actions: list[Any] = []
        monkeypatch.setattr(loaded.action_space, "sample", lambda: random_actions.append(1))
        assert (loaded.num_timesteps, loaded._n_updates) == (3 + 6, 8 + 2)
        loaded.learn(3, reset_num_timesteps=False)
        assert (loaded.num_timesteps, loaded._n_updates) == (3 + 9, 8 + 5)
        assert loaded.replay_buffer.n_online == 9
        assert not random_actions

    def test_hand_over_comes_after_loading(self, dataset: Any, tmp_path: Path) -> None:
        """Saved between the phases: the online phase starts as it would have."""
        loaded = saved_and_loaded(model_at("offline", dataset), tmp_path)
        loaded.set_dataset(dataset)
        loaded.learn(6)
        assert (loaded.num_timesteps, loaded._n_offline_updates, loaded._n_updates) == (3 + 6, 3, 8 + 2)

    def test_fresh_model_pretrains_in_learn(self, dataset: Any, tmp_path: Path) -> None:
        loaded = saved_and_loaded(model_at("fresh", dataset, offline_gradient_steps=3), tmp_path)
        loaded.set_dataset(dataset)
        loaded.learn(6)
        assert (loaded.num_timesteps, loaded._n_offline_updates, loaded._n_updates) == (3 + 6, 3, 8 + 2)

    def test_pretrained_members(self, dataset: Any, tmp_path: Path) -> None:
        """A model assembled from agents trained elsewhere stays one."""
        model = small_model(dataset=dataset)
        for index in range(2):
            model.set_member(index, model.policy.get_member(index))
        loaded = saved_and_loaded(model, tmp_path)
        loaded.set_dataset(dataset)
        loaded.learn(5)
        assert (loaded.num_timesteps, loaded._n_updates) == (5, 8 + 1)

    def test_without_the_replay_buffer(self, dataset: Any, tmp_path: Path) -> None:
        """Where only the model was saved, the online rows collected anew start at P0 again, as fresh rows should."""
        loaded = saved_and_loaded(model_at("online", dataset), tmp_path)
        loaded.set_dataset(dataset)
        p0 = initial_priority(len(dataset), 4, loaded.initial_online_fraction)
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded.replay_buffer.default_priority == pytest.approx(p0)

    def test_without_dataset(self, tmp_path: Path) -> None:
        """A model that never met a dataset needs none."""
        model = small_model()
        model.learn(6)
        loaded = saved_and_loaded(model, tmp_path)
        assert_same(saved_state(loaded), saved_state(model))
        loaded.learn(6, reset_num_timesteps=False)
        assert loaded.num_timesteps == 12

    def test_dataset_after_loading(self, dataset: Any, tmp_path: Path) -> None:
        """A model that never met a dataset can meet one after loading."""
        loaded = saved_and_loaded(small_model(), tmp_path)
        loaded.learn_offline(dataset, gradient_steps=2)
        loaded.learn(5)
        assert (loaded.num_timesteps, loaded._n_updates) == (7, 9)

    def test_more_environments(self, dataset: Any, tmp_path: Path) -> None:
        loaded = saved_and_loaded(model_at("offline", dataset), tmp_path, env=make_vec_env("Pendulum-v1", n_envs=2))
        loaded.set_dataset(dataset)
        loaded.learn(6)
        assert (loaded.n_envs, loaded.replay_buffer.n_online, loaded._n_updates) == (2, 6, 9)

    def test_vec_normalize(self, tmp_path: Path) -> None:
        env = VecNormalize(DummyVecEnv([TinyEnv]))
        dataset = make_dataset(env=TinyEnv())
        model = small_model(env, dataset=dataset)
        model.learn_offline(gradient_steps=2).learn(5)
        env.save(str(tmp_path / "statistics.pkl"))
        env = VecNormalize.load(str(tmp_path / "statistics.pkl"), DummyVecEnv([TinyEnv]))
        loaded = saved_and_loaded(model, tmp_path, env=env)
        statistics: Any = env.obs_rms
        count = statistics.count
        loaded.set_dataset(dataset)
        assert statistics.count == count  # the dataset does not count twice
        # Without its rows, it collects as many as before its first update
        loaded.learn(2, reset_num_timesteps=False)
        assert loaded.replay_buffer.n_online == loaded.learning_starts == 4
        assert loaded._n_updates == 8 + 1 + 1


class TestArguments:
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize(("saved", "changed"), [("balanced", "uniform"), ("uniform", "balanced"), ("online", "symmetric")])
    def test_another_scheme(self, dataset: Any, tmp_path: Path, moment: str, saved: str, changed: str) -> None:
        model = model_at(moment, dataset, replay_buffer_kwargs={"scheme": saved})
        loaded = saved_and_loaded(model, tmp_path, replay_buffer_kwargs={"scheme": changed})
        assert loaded.replay_buffer.scheme == changed
        loaded.set_dataset(dataset)
        loaded.learn(5, reset_num_timesteps=False)
        if changed == "balanced":
            p0 = initial_priority(len(dataset), 4, loaded.initial_online_fraction)
            assert loaded.replay_buffer.default_priority == pytest.approx(p0)

    @pytest.mark.parametrize(("saved", "changed"), [("balanced", "uniform"), ("uniform", "balanced")])
    def test_another_scheme_with_the_buffer(self, dataset: Any, tmp_path: Path, saved: str, changed: str) -> None:
        """The rows are the file's, the scheme is the model's."""
        model = model_at("online", dataset, replay_buffer_kwargs={"scheme": saved})
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path, replay_buffer_kwargs={"scheme": changed})
        loaded.set_dataset(dataset)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        loaded.learn(2, reset_num_timesteps=False)
        assert loaded.replay_buffer.n_online == 8
        assert loaded.replay_buffer.scheme == changed

    @pytest.mark.parametrize(("saved", "changed"), [("cpu", None), (None, "cpu")])
    def test_buffer_of_another_device(self, dataset: Any, tmp_path: Path, saved: str | None, changed: str | None) -> None:
        """The rows are the file's, where they are kept is the model's."""
        model = model_at("online", dataset, replay_buffer_kwargs={"buffer_device": saved})
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path, replay_buffer_kwargs={"buffer_device": changed})
        loaded.set_dataset(dataset)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        assert str(loaded.replay_buffer.buffer_device) == str(changed)
        loaded.learn(2, reset_num_timesteps=False)
        assert loaded.replay_buffer.n_online == 8

    @pytest.mark.parametrize("as_file", [True, False])
    def test_parameters_alone(self, dataset: Any, tmp_path: Path, as_file: bool) -> None:
        """SB3's ``set_parameters()``, into a model that has not met the dataset yet."""
        model = model_at("online", dataset)
        model.save(tmp_path / "model")
        fresh = small_model(seed=1)
        fresh.set_parameters(str(tmp_path / "model") if as_file else model.get_parameters())  # type: ignore[arg-type]
        assert_same(model.get_parameters(), fresh.get_parameters())
        # A part of them alone
        model.set_parameters({"policy": small_model(seed=2).policy.state_dict()}, exact_match=False)  # type: ignore[dict-item]

    @pytest.mark.parametrize("ent_coef", [0.1, "0.1"])
    def test_a_learned_entropy_coefficient_stays_learned(self, dataset: Any, tmp_path: Path, ent_coef: Any) -> None:
        model = model_at("offline", dataset)
        with pytest.raises(TypeError, match=r"`ent_coef='?0\.1'?` is fixed, but the entropy .* is learned: give 'auto'"):
            saved_and_loaded(model, tmp_path, ent_coef=ent_coef)
        assert saved_and_loaded(model, tmp_path, ent_coef="auto_0.1").ent_coef == "auto_0.1"

    @pytest.mark.parametrize("moment", ["offline", "online"])
    def test_a_fixed_entropy_coefficient_can_be_another(self, dataset: Any, tmp_path: Path, moment: str) -> None:
        model = model_at(moment, dataset, ent_coef=0.2)
        loaded = saved_and_loaded(model, tmp_path, ent_coef=0.01, dataset=dataset)
        assert loaded.ent_coef_tensor == pytest.approx(0.01)
        loaded.learn(6)
        assert loaded.ent_coef_tensor == pytest.approx(0.01)
        learned = saved_and_loaded(model, tmp_path, ent_coef="auto_0.3", dataset=dataset)
        assert learned.log_ent_coef is not None
        assert learned.log_ent_coef.exp().item() == pytest.approx(0.3)
        learned.learn(6)
        assert learned.log_ent_coef.exp().item() != pytest.approx(0.3, abs=1e-6)

    def test_another_learning_rate_of_the_density_ratio(self, dataset: Any, tmp_path: Path) -> None:
        kwargs = {"net_arch": [16], "learning_rate": 1e-2}
        loaded = saved_and_loaded(model_at("online", dataset), tmp_path, density_ratio_kwargs=kwargs)
        assert loaded.density_ratio is not None
        assert loaded.density_ratio.optimizer.param_groups[0]["lr"] == 1e-2

    def test_other_arguments(self, dataset: Any, tmp_path: Path) -> None:
        model = model_at("offline", dataset)
        loaded = saved_and_loaded(
            model,
            tmp_path,
            learning_rate=1e-5,
            qf_learning_rate=2e-5,
            offline_learning_rate=3e-5,
            offline_qf_learning_rate=4e-5,
            learning_starts=5,
            first_update_multiplier=3,
            target_q="mean",
            cql_alpha=1.0,
        )
        loaded.set_dataset(dataset)
        loaded.learn_offline(gradient_steps=1)
        rates = [network.optimizer.param_groups[0]["lr"] for network in (loaded.actor, loaded.critic)]
        assert rates == [pytest.approx(3e-5), pytest.approx(4e-5)]
        loaded.learn(5)
        rates = [network.optimizer.param_groups[0]["lr"] for network in (loaded.actor, loaded.critic)]
        assert rates == [pytest.approx(1e-5), pytest.approx(2e-5)]
        assert (loaded._n_updates, loaded.target_q, loaded.cql_alpha) == (15, "mean", 1.0)

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [({"target_q": "x"}, "`target_q` must be 'member' or 'mean'"), ({"cql_temp": 0}, "`cql_temp` must be above 0")],
    )
    def test_wrong_arguments(self, dataset: Any, tmp_path: Path, kwargs: dict[str, Any], match: str) -> None:
        model = model_at("fresh", dataset)
        with pytest.raises(ValueError, match=match):
            saved_and_loaded(model, tmp_path, **kwargs)

    def test_another_ensemble_size(self, dataset: Any, tmp_path: Path) -> None:
        """SB3's rule for all arguments of the policy."""
        with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
            saved_and_loaded(model_at("fresh", dataset), tmp_path, policy_kwargs={"ensemble_size": 3})

    @pytest.mark.parametrize("saved_with_dataset", [False, True])
    def test_dataset_as_argument(self, dataset: Any, tmp_path: Path, saved_with_dataset: bool) -> None:
        """``load(..., dataset=...)`` is as good as ``set_dataset()``, also for a model that had none."""
        model = model_at("offline", dataset) if saved_with_dataset else small_model()
        loaded = saved_and_loaded(model, tmp_path, dataset=dataset)
        assert_same(loaded.policy.state_dict(), model.policy.state_dict())
        loaded.learn_offline(gradient_steps=1)
        loaded.learn(4)
        assert loaded._n_updates == 8

    @pytest.mark.parametrize(
        ("observation_space", "policy"),
        [
            (spaces.Dict(image=IMAGE_SPACE, speed=spaces.Box(-1, 1, (1,))), "MultiInputPolicy"),
            (IMAGE_SPACE, "CnnPolicy"),
        ],
        ids=["dict", "images"],
    )
    def test_observations(self, tmp_path: Path, observation_space: spaces.Space, policy: str) -> None:
        env = TinyEnv(observation_space)
        dataset = make_dataset(2, 10, env=env)
        model = small_model(env, policy, dataset=dataset, learning_starts=2, batch_size=4)
        model.learn_offline(gradient_steps=1).learn(3)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path, env=TinyEnv(observation_space))
        assert_same(saved_state(loaded), saved_state(model))
        loaded.set_dataset(dataset)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded._n_updates == 4 + 2


class TestReplayBuffer:
    @pytest.mark.parametrize("with_dataset", [False, True])
    def test_round_trip(self, dataset: Any, tmp_path: Path, with_dataset: bool) -> None:
        """Priorities, p0 and the ring come back, also where the ring has been overwritten; the dataset's rows stay outside."""
        model = model_at("offline", dataset, buffer_size=10)
        model.learn(14)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        loaded = saved_and_loaded(model, tmp_path)
        if with_dataset:
            loaded.set_dataset(dataset)
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
        one, other = model.replay_buffer, loaded.replay_buffer
        assert other.has_offline == with_dataset
        assert (other.pos, other.full, other.n_online, other.n_offline) == (4, True, 10, len(dataset))
        indices = np.arange(len(dataset) + 10)
        np.testing.assert_array_equal(other.priorities(indices), one.priorities(indices))
        assert len(np.unique(one.priorities(indices))) > 5
        assert other.default_priority == one.default_priority != 1.0
        for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name), err_msg=name)
        if not with_dataset:
            with pytest.raises(ValueError, match="needs the dataset 'arrays', which is not saved with the buffer"):
                other.sample(4)
            loaded.set_dataset(dataset)
            np.testing.assert_array_equal(loaded.replay_buffer.priorities(indices), one.priorities(indices))
        np.random.seed(0)
        expected = one.sample(16)
        np.random.seed(0)
        drawn = other.sample(16)
        np.testing.assert_array_equal(drawn.indices, expected.indices)
        assert_same(drawn[:5], expected[:5])

    def test_size_of_the_file(self, tmp_path: Path) -> None:
        """Apart from a priority for each of its rows, the dataset leaves nothing in the file."""
        sizes = []
        for n_episodes in (4, 40):
            model = model_at("online", make_dataset(n_episodes))
            file = io.BytesIO()
            save_to_pkl(file, model.replay_buffer)
            sizes.append(len(file.getvalue()))
        assert sizes[1] - sizes[0] < 8 * 36 * 50 + 2_000

    def test_buffer_of_another_dataset(self, dataset: Any, tmp_path: Path) -> None:
        """Refused, and the model keeps the buffer that it has."""
        model_at("online", make_dataset(seed=1)).save_replay_buffer(tmp_path / "buffer.pkl")
        model = model_at("online", dataset)
        buffer = model.replay_buffer
        with pytest.raises(ValueError, match=r"The buffer was saved with the dataset 'arrays'.*which is not 'arrays'"):
            model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert model.replay_buffer is buffer

    def test_buffer_without_offline_part(self, dataset: Any, tmp_path: Path) -> None:
        """Of a run that began without a dataset: its rows serve beside the dataset of this model."""
        model = small_model()
        model.learn(6)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        other = model_at("offline", dataset)
        other.load_replay_buffer(tmp_path / "buffer.pkl")
        assert (other.replay_buffer.n_online, other.replay_buffer.n_offline) == (6, len(dataset))
        other.learn(4)
        assert other._n_updates == 8

    @pytest.mark.parametrize("with_dataset", [False, True])
    def test_buffer_of_sb3(self, dataset: Any, tmp_path: Path, with_dataset: bool) -> None:
        """A plain ``ReplayBuffer`` cannot hold an offline part: the error says what can be done with it."""
        model = model_at("fresh", dataset if with_dataset else None)
        buffer = ReplayBuffer(10, model.observation_space, model.action_space)
        save_to_pkl(tmp_path / "buffer.pkl", buffer)
        with pytest.raises(ValueError, match="BalancedReplayBuffer"):
            model.load_replay_buffer(tmp_path / "buffer.pkl")

    def test_buffer_of_another_environment(self, tmp_path: Path) -> None:
        small_model(DummyVecEnv([TinyEnv, TinyEnv])).save_replay_buffer(tmp_path / "buffer.pkl")
        model = small_model()
        own = model.replay_buffer
        with pytest.raises(ValueError, match=r"`action_space=.*load the buffer that belongs to it"):
            model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert model.replay_buffer is own

    def test_not_a_buffer(self, tmp_path: Path) -> None:
        save_to_pkl(tmp_path / "buffer.pkl", {"observations": 0})
        model = small_model()
        own = model.replay_buffer
        with pytest.raises(AssertionError):  # SB3's own
            model.load_replay_buffer(tmp_path / "buffer.pkl")
        assert model.replay_buffer is own

    def test_checkpoints(self, dataset: Any, tmp_path: Path) -> None:
        """The files of ``CheckpointCallback(save_replay_buffer=True)`` of both phases load, and training goes on."""
        callback = CheckpointCallback(save_freq=3, save_path=str(tmp_path), save_replay_buffer=True)
        model = small_model(dataset=dataset, offline_gradient_steps=3)
        model.learn(6, callback=callback)
        for n_steps in (3, 6, 9):
            loaded = Off2OnSAC.load(tmp_path / f"rl_model_{n_steps}_steps", env=pendulum(), device="cpu")
            loaded.load_replay_buffer(tmp_path / f"rl_model_replay_buffer_{n_steps}_steps")
            loaded.set_dataset(dataset)
            assert loaded.num_timesteps == n_steps
            loaded.learn(4, reset_num_timesteps=False)
            assert loaded._n_updates >= 8
            assert loaded._n_offline_updates == 3

    def test_checkpoint_in_the_offline_phase(self, dataset: Any, tmp_path: Path) -> None:
        """One in the middle of the phase that ``learn()`` starts: the missing updates can be done."""
        callback = CheckpointCallback(save_freq=2, save_path=str(tmp_path))
        small_model(dataset=dataset, offline_gradient_steps=5).learn(1, callback=callback)
        loaded = Off2OnSAC.load(tmp_path / "rl_model_2_steps", env=pendulum(), device="cpu")
        loaded.set_dataset(dataset)
        loaded.learn_offline(gradient_steps=3)
        assert (loaded._n_offline_updates, loaded.num_timesteps) == (5, 5)


class TestPolicyAlone:
    @pytest.mark.parametrize("kwargs", [{}, {"critic_layer_norm": True, "n_critics": 3, "ensemble_size": 3}], ids=str)
    def test_mlp(self, dataset: Any, tmp_path: Path, kwargs: dict[str, Any]) -> None:
        model = model_at("offline", dataset, policy_kwargs=kwargs)
        model.policy.save(str(tmp_path / "policy.pth"))
        loaded = EnsembleCQLPolicy.load(str(tmp_path / "policy.pth"), device="cpu")
        assert_same(parameters_of(loaded), parameters_of(model.policy))
        observations = dataset.observations[:20]
        np.testing.assert_array_equal(predictions(loaded, observations), predictions(model, observations))
        assert loaded.ensemble_size == model.policy.ensemble_size

    @pytest.mark.parametrize(
        ("observation_space", "policy"),
        [
            (spaces.Dict(position=spaces.Box(-1, 1, (3,)), speed=spaces.Box(-1, 1, (1,))), "MultiInputPolicy"),
            (IMAGE_SPACE, "CnnPolicy"),
        ],
        ids=["dict", "images"],
    )
    def test_others(self, tmp_path: Path, observation_space: spaces.Space, policy: str) -> None:
        model = small_model(TinyEnv(observation_space), policy)
        model.policy.save(str(tmp_path / "policy.pth"))
        policy_class = EnsembleCnnPolicy if policy == "CnnPolicy" else EnsembleMultiInputPolicy
        loaded = policy_class.load(str(tmp_path / "policy.pth"), device="cpu")
        assert_same(parameters_of(loaded), parameters_of(model.policy))
        observation = model.observation_space.sample()
        np.testing.assert_array_equal(predictions(loaded, observation), predictions(model, observation))
