"""Checkpoints: that a run which was stopped, or killed, ends as one that was not, and that files are read safely."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import TinyEnv, assert_same, make_dataset, small_kwargs
from rl_zoo3.utils import SimpleLinearSchedule
from safetensors.torch import save as save_tensors
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch import nn

from sb3_off2on import AWAC, BCQ, Off2OnSAC, checkpoint, resume
from sb3_off2on.callbacks import ResumableCheckpointCallback
from sb3_off2on.checkpoint import decode, encode, find_checkpoints, read_checkpoint, read_newest
from sb3_off2on.priorities import SumTree
from sb3_off2on.schedules import ScaledSchedule

N_OFFLINE, N_ONLINE, EPISODE = 12, 40, 5
ALGORITHMS = (Off2OnSAC, AWAC, BCQ)


class Timed(TinyEnv):
    """Episodes depend on the seed alone: all are truncated after 5 steps."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return self.observation_space.sample(), float(self.np_random.normal()), False, self.n_steps == self.length, {}


def arguments(cls: Any = Off2OnSAC, **kwargs: Any) -> dict[str, Any]:
    """Rollouts of one episode; the first of two."""
    rollouts = {"learning_starts": 2 * EPISODE, "train_freq": EPISODE, "gradient_steps": 2, "buffer_size": 30}
    own = small_kwargs(**{**rollouts, **kwargs})
    if not issubclass(cls, Off2OnSAC):
        for name in ("cql_n_actions", "density_ratio_kwargs"):
            own.pop(name)
    return own


def make(cls: Any = Off2OnSAC, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, Timed() if env is None else env, **arguments(cls, **kwargs))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can cut the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset(4, 20, env=Timed())


def everything(model: Any) -> dict[str, Any]:
    """Copies of what must be the same at the end: all tensors, the replay with its priorities, counters, random numbers."""
    return copied(resume.get_state(model, 0))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, th.Tensor] = {}
    arrays: dict[str, np.ndarray] = {}
    other = ("session", "arguments", "needed", "env_seed", "ep_info_buffer")  # the last holds times of day
    tree = encode({name: value for name, value in state.items() if name not in other}, "x", tensors, arrays)
    return {"tree": tree, "tensors": tensors, "arrays": {name: array.copy() for name, array in arrays.items()}}


def train(model: Any, dataset: Any, callback: Any = None) -> Any:
    """The script that is started again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing to do in `learn")
        model.learn_offline(dataset, N_OFFLINE, callback=callback)
        return model.learn(N_ONLINE, callback=callback)


def disturb() -> None:
    """Another process has other random numbers."""
    random.seed(123)
    np.random.seed(123)
    th.manual_seed(123)


def vec_normalize(n_envs: int = 1, cls: Any = DummyVecEnv) -> Callable[[], VecNormalize]:
    kwargs = {"start_method": "fork"} if cls is SubprocVecEnv else {}
    return lambda: VecNormalize(cls([lambda: Monitor(Timed()) for _ in range(n_envs)], **kwargs))


def dict_space() -> spaces.Dict:
    return spaces.Dict({"a/b": spaces.Box(-1, 1, (2,)), "c": spaces.Box(-1, 1, (1,))})


CASES: dict[str, dict[str, Any]] = {
    "Off2OnSAC": {},
    "AWAC": {"cls": AWAC},
    "BCQ": {"cls": BCQ},
    "fixed alpha, lagrange, calql": {"ent_coef": 0.1, "cql_target_action_gap": 1.0, "calql": True},
    "schedules": {
        name: LinearSchedule(1e-2, 1e-3, 1.0)
        for name in ("learning_rate", "qf_learning_rate", "offline_learning_rate", "offline_qf_learning_rate")
    },
    "symmetric": {"replay_buffer_kwargs": {"scheme": "symmetric"}},
    "noise": {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.1 * np.ones(2))},
    "VecNormalize": {"make_env": vec_normalize()},
    "two environments": {"make_env": vec_normalize(2), "action_noise": NormalActionNoise(np.zeros(2), np.ones(2))},
    "rows on a device": {"replay_buffer_kwargs": {"buffer_device": "cpu"}},
    "policy": {"policy_kwargs": {"activation_fn": nn.Tanh, "optimizer_class": th.optim.AdamW, "n_critics": 3}},
    "no seed": {"seed": None},
    "dict": {"make_env": lambda: Timed(dict_space()), "policy": "MultiInputPolicy"},
}


class TestExactResume:
    @pytest.mark.parametrize("case", CASES)
    def test_from_every_checkpoint(self, tmp_path: Path, dataset: Any, case: str) -> None:
        """
        A run writes checkpoints at each offline update and after each online episode. From every one of them, the same script
        ends in the same state, to the last bit.
        """
        kwargs = dict(CASES[case])
        cls, make_env = kwargs.pop("cls", Off2OnSAC), kwargs.pop("make_env", Timed)
        if case == "dict":
            dataset = make_dataset(4, 20, env=make_env())
        callback = ResumableCheckpointCallback(tmp_path / "run", save_freq=1, keep=100)
        model = train(make(cls, make_env(), **kwargs), dataset, callback)
        expected = everything(model)
        checkpoints = find_checkpoints(tmp_path / "run")
        n_episodes = N_ONLINE // EPISODE // model.n_envs - 1  # there are none within the first rollout
        assert len(checkpoints) >= N_OFFLINE // model.n_envs + n_episodes
        # Some for most, all for one
        for path in checkpoints if case == "Off2OnSAC" else random.Random(0).sample(checkpoints, 3):
            disturb()
            loaded = cls.load_checkpoint(path, make_env(), dataset, device="cpu")
            train(loaded, dataset, ResumableCheckpointCallback(tmp_path / "other" / path.name, save_freq=1))
            assert_same(everything(loaded), expected, path.name)

    def test_subprocesses(self, tmp_path: Path, dataset: Any) -> None:
        """Their environments are seeded as those of this process."""
        make_env = vec_normalize(2, SubprocVecEnv)
        model = make(env=make_env()).learn_offline(dataset, 2)
        model.learn(20)
        path = model.save_checkpoint(tmp_path)
        model.learn(20, reset_num_timesteps=False)
        loaded = Off2OnSAC.load_checkpoint(path, make_env(), dataset, device="cpu")
        loaded._to_complete = None  # the second call was another one
        loaded.learn(20, reset_num_timesteps=False)
        assert_same(everything(loaded), everything(model))
        for each in (model.env, loaded.env):
            assert each is not None
            each.close()

    def test_offline_phase_of_learn(self, tmp_path: Path, dataset: Any) -> None:
        """``learn()`` of a model with ``offline_gradient_steps`` is one call of two phases."""

        def run(resume: str | None, folder: str) -> Any:
            model = make(dataset=dataset, offline_gradient_steps=N_OFFLINE, offline_learning_rate=LinearSchedule(1e-2, 0, 1.0))
            return model.learn(N_ONLINE, callback=ResumableCheckpointCallback(tmp_path / folder, 3, keep=50, resume=resume))

        expected = everything(run(None, "run"))
        for number, path in enumerate(find_checkpoints(tmp_path / "run")[::3]):
            shutil.copytree(path, tmp_path / str(number) / path.name)
            disturb()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Nothing to do in `learn")
                assert_same(everything(run("auto", str(number))), expected, path.name)

    def test_fitted_q_evaluation(self, tmp_path: Path, dataset: Any) -> None:
        """Three calls, of which a checkpoint may interrupt each."""

        def run(resume: str | None, folder: str) -> Any:
            callback = ResumableCheckpointCallback(tmp_path / folder, 2, keep=50, resume=resume)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Nothing to do in `")
                model = make().learn_offline(dataset, 4, callback=callback)
                return model.fit_fqe(gradient_steps=6, callback=callback).learn(20, callback=callback)

        model = run(None, "run")
        assert model.num_timesteps == 4 + 6 + 20
        expected = everything(model)
        for number, path in enumerate(find_checkpoints(tmp_path / "run")):
            shutil.copytree(path, tmp_path / str(number) / path.name)
            disturb()
            assert_same(everything(run("auto", str(number))), expected, path.name)

    def test_before_the_first_step(self, tmp_path: Path, dataset: Any) -> None:
        """The first reset is yet to come, in the run that goes on and in the one that is resumed."""
        cases: dict[str, dict[str, Any]] = {"seed": {}, "no seed": {"seed": None}}
        for name, kwargs in cases.items():
            model = make(**kwargs)
            model.save_checkpoint(tmp_path / name)
            expected = everything(model.learn(20))
            disturb()
            loaded = Off2OnSAC.load_checkpoint(tmp_path / name, Timed(), device="cpu")
            assert_same(everything(loaded.learn(20)), expected)

    def test_checkpoints_change_nothing_offline(self, tmp_path: Path, dataset: Any) -> None:
        """And online only the seed of the episode after each: in the first rollout there is none."""
        states = [
            everything(make().learn_offline(dataset, 5, callback=callback).learn(2 * EPISODE))
            for callback in (None, ResumableCheckpointCallback(tmp_path, 1))
        ]
        assert len(find_checkpoints(tmp_path)) == 2
        assert_same(states[0], states[1])

    def test_seeds_of_episodes(self, tmp_path: Path) -> None:
        """Between two checkpoints without a step there is no reset, and two at the same random numbers have other seeds."""
        model = make()
        model.learn(EPISODE)
        read = [read_checkpoint(model.save_checkpoint(tmp_path)) for _ in range(2)]
        assert read[0]["env_seed"] == read[1]["env_seed"]
        observation = model._last_obs
        generator = np.random.get_state()
        model.learn(EPISODE, reset_num_timesteps=False)
        np.random.set_state(generator)
        assert read_checkpoint(model.save_checkpoint(tmp_path))["env_seed"] != read[0]["env_seed"]
        assert not np.array_equal(model._last_obs, observation)

    def test_within_an_episode(self, tmp_path: Path, dataset: Any) -> None:
        """The environment goes on undisturbed, and the run that is resumed begins an episode: it is sound, but another."""
        models = [make(train_freq=3, learning_starts=3).learn_offline(dataset, 3).learn(12) for _ in range(2)]
        state = read_checkpoint(models[0].save_checkpoint(tmp_path))
        np.testing.assert_array_equal(models[0]._last_obs, models[1]._last_obs)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, device="cpu")
        assert_same(everything(loaded), copied(state))
        loaded.learn(24)
        assert loaded.num_timesteps == 3 + 24
        assert loaded.replay_buffer.n_online == 24
        assert loaded._last_obs is not None

    def test_within_a_step(self, tmp_path: Path, dataset: Any) -> None:
        """A callback's own checkpoint comes before SB3 has stored the step. The run goes on as if there had been none."""

        class Save(BaseCallback):
            def _on_step(self) -> bool:
                self.model.save_checkpoint(tmp_path)  # type: ignore[attr-defined]
                return True

        states = [everything(make().learn_offline(dataset, 3).learn(20, callback=callback)) for callback in (None, Save())]
        assert_same(states[0], states[1])
        assert read_checkpoint(find_checkpoints(tmp_path)[0])["replay"]["pos"] == 19

    def test_waits_for_the_end_of_the_episode(self, tmp_path: Path, dataset: Any) -> None:
        """But no longer than another ``save_freq`` calls."""
        model = make(train_freq=1, learning_starts=1).learn_offline(dataset, 3)
        model.learn(20, callback=ResumableCheckpointCallback(tmp_path / "short", save_freq=4, keep=20))
        steps = [int(path.name.split("_")[1]) - 3 for path in find_checkpoints(tmp_path / "short")]
        assert steps == [20, 15, 10, 5]
        model = make(train_freq=1, learning_starts=1, env=Timed(length=50)).learn_offline(dataset, 3)
        model.learn(20, callback=ResumableCheckpointCallback(tmp_path / "long", save_freq=4, keep=20))
        steps = [int(path.name.split("_")[1]) - 3 for path in find_checkpoints(tmp_path / "long")]
        assert steps == [20, 16, 8]


class TestCallsAfterLoading:
    def test_that_first_call_only(self, tmp_path: Path, dataset: Any) -> None:
        model = make().learn_offline(dataset, 4)
        model.save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, device="cpu")
        loaded.learn_offline(gradient_steps=6)
        assert loaded._n_offline_updates == 6
        loaded.learn_offline(gradient_steps=6)
        assert loaded._n_offline_updates == 12

        loaded.learn(20)
        loaded.save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, device="cpu")
        with pytest.warns(UserWarning, match=r"Nothing to do in `learn_offline\(gradient_steps=12\)`.*after 12 updates"):
            loaded.learn_offline(gradient_steps=12)
        loaded.learn(30)
        assert loaded.num_timesteps == 12 + 30
        loaded.learn(10, reset_num_timesteps=False)
        assert loaded.num_timesteps == 12 + 40

    def test_nothing_left(self, tmp_path: Path, dataset: Any) -> None:
        make().learn_offline(dataset, 4).learn(20).save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, device="cpu")
        with pytest.warns(UserWarning, match=r"Nothing to do in `learn\(20\)`: .* after 20 steps of that call. Another call"):
            loaded.learn(20)
        assert loaded.num_timesteps == 24

    def test_more_offline_updates(self, tmp_path: Path, dataset: Any) -> None:
        """More of them than were done are asked for: no word of the checkpoint's online phase."""
        make().learn_offline(dataset, 4).learn(10).save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, device="cpu")
        loaded.learn_offline(gradient_steps=7)
        assert loaded._n_offline_updates == 11
        assert not loaded._handed_over

    def test_newest_of_the_folder_and_one_of_it(self, tmp_path: Path, dataset: Any) -> None:
        model = make().learn_offline(dataset, 4)
        first = model.save_checkpoint(tmp_path)
        model.learn_offline(gradient_steps=2)
        model.save_checkpoint(tmp_path)
        for folder, n_updates in ((tmp_path, 6), (first, 4)):
            assert Off2OnSAC.load_checkpoint(folder, Timed(), dataset)._n_offline_updates == n_updates

    def test_dataset_by_its_source(self, tmp_path: Path) -> None:
        def env() -> Timed:
            return Timed(spaces.Box(-np.inf, np.inf, (3,)))

        dataset = make_dataset(4, 20, env=Timed())
        arrays = {name: getattr(dataset, name) for name in ("observations", "next_observations", "actions", "rewards")}
        flags = {name: getattr(dataset, name) for name in ("terminations", "truncations")}
        np.savez(tmp_path / "data.npz", **arrays, **flags)
        make(env=env()).learn_offline(str(tmp_path / "data.npz"), 2).save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, env())
        assert loaded.dataset is not None
        assert len(loaded.dataset) == 80
        os.remove(tmp_path / "data.npz")
        with pytest.raises(ValueError, match=r"was trained with the dataset .*data.npz.*: pass `dataset=...`"):
            Off2OnSAC.load_checkpoint(tmp_path, env())
        with pytest.raises(ValueError, match=r"the dataset's fingerprint differs"):
            Off2OnSAC.load_checkpoint(tmp_path, env(), make_dataset(4, 20, seed=1, env=env()))


class TestModelsOfSaves:
    """A model from SB3's ``load()`` is in the middle of its training, but not in that of the folder's checkpoints."""

    def test_goes_on_or_is_refused(self, tmp_path: Path, dataset: Any) -> None:
        make().learn_offline(dataset, 4).save(tmp_path / "model")

        def load() -> Any:
            return Off2OnSAC.load(tmp_path / "model", Timed(), dataset=dataset)

        first = load().learn(20, callback=ResumableCheckpointCallback(tmp_path / "run", 5, resume="auto"))
        with pytest.raises(ValueError, match=r"holds checkpoints, the newest is .*_24_steps: go on from it"):
            load().learn(20, callback=ResumableCheckpointCallback(tmp_path / "run", 5))
        with pytest.warns(UserWarning, match=r"Nothing to do in `learn\(20\)`"):
            again = load().learn(20, callback=ResumableCheckpointCallback(tmp_path / "run", 5, resume="auto"))
        assert_same(everything(again), everything(first))

    def test_foreign_names_are_left_out(self, tmp_path: Path, dataset: Any) -> None:
        """Of the model, and of callbacks, of which one has a folder that it deletes from."""
        model = make().learn_offline(dataset, 2)
        state = read_checkpoint(model.save_checkpoint(tmp_path / "run"))
        state["counters"]["tensorboard_log"] = "elsewhere"
        state["variables"]["actor.mu.bias"] = th.ones(1)
        state["session"]["callbacks"] = [("ResumableCheckpointCallback", {"n_calls": 7, "folder": "elsewhere"})]
        resume.set_state(model, state)
        callback = ResumableCheckpointCallback(tmp_path / "run", 5)
        resume.set_session(model, state["session"], callback)
        assert (model.tensorboard_log, callback.n_calls, callback.folder) == (None, 7, tmp_path / "run")


class TestSession:
    """What surrounds the model."""

    def test_logs_and_callbacks(self, tmp_path: Path, dataset: Any) -> None:
        """Means since the last log go on, evaluations are gathered on, and TensorBoard's run is the same."""

        def evaluation() -> EvalCallback:
            eval_callback = EvalCallback(
                DummyVecEnv([lambda: Monitor(Timed())]),
                eval_freq=4,
                n_eval_episodes=1,
                log_path=str(tmp_path / "eval"),
                verbose=0,
            )
            return eval_callback

        tensorboard = str(tmp_path / "tensorboard")
        model = make(tensorboard_log=tensorboard).learn_offline(dataset, 3)
        make(tensorboard_log=tensorboard).learn_offline(dataset, 1)  # another run beside it
        callback = evaluation()
        model.learn(25, callback=[callback], log_interval=100)
        assert model.logger.name_to_value["train/actor_loss"] != 0
        model.logger.record_mean("mean", 1.0, exclude="stdout")
        model.logger.record_mean("tensor", th.tensor(2.0))
        model.save_checkpoint(tmp_path / "run")

        loaded = Off2OnSAC.load_checkpoint(tmp_path / "run", Timed(), dataset)
        other = evaluation()
        loaded.learn(30, callback=[other], log_interval=100)
        assert loaded.logger.dir == model.logger.dir == os.path.join(tensorboard, "Off2OnSAC_1")
        assert other.n_calls == 30
        assert other.evaluations_timesteps == [*callback.evaluations_timesteps, 3 + 28]
        assert other.best_mean_reward >= callback.best_mean_reward
        assert [*(loaded.ep_info_buffer or [])][:5] == [*(model.ep_info_buffer or [])]

        loaded = Off2OnSAC.load_checkpoint(tmp_path / "run", Timed(), dataset)
        with pytest.warns(UserWarning, match=r"Nothing to do"):
            loaded.learn(25)
        loaded.logger.record_mean("mean", 2.0)
        assert loaded.logger.name_to_value["mean"] == 1.5
        assert loaded.logger.name_to_value["tensor"] == th.tensor(2.0)

    def test_callbacks_of_another_kind(self, tmp_path: Path, dataset: Any) -> None:
        class Count(BaseCallback):
            def _on_step(self) -> bool:
                return True

        class Other(Count):
            pass

        model = make().learn_offline(dataset, 3, callback=[Count(), Count()])
        model.save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset)
        callbacks: list[BaseCallback] = [Other(), Count()]
        loaded.learn_offline(gradient_steps=5, callback=callbacks)
        assert [callback.n_calls for callback in callbacks] == [2, 5]

    def test_random_states(self, tmp_path: Path) -> None:
        def draw(model: Any) -> list[Any]:
            return [random.random(), np.random.rand(), th.rand(1).item(), *model.action_space.sample()]

        model = make()
        model.save_checkpoint(tmp_path)
        expected = draw(model)
        disturb()
        assert draw(Off2OnSAC.load_checkpoint(tmp_path, Timed())) == expected


def small_checkpoint(folder: Path) -> Path:
    return make().learn(EPISODE).save_checkpoint(folder)


def sealed(path: Path) -> None:
    """Write the manifest anew, as an attacker would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": checkpoint.hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class TestDamage:
    def test_each_file(self, tmp_path: Path) -> None:
        """Whichever is cut off, has a flipped bit or is gone: an error names it, and the newest good checkpoint is taken."""
        model = make().learn(EPISODE)
        good, bad = [model.save_checkpoint(tmp_path / "run") for _ in range(2)]
        shutil.copytree(bad, tmp_path / "copy")
        names = sorted(path.name for path in bad.iterdir())
        assert {"manifest.json", "state.json", "tensors.safetensors"} < set(names)
        rng = random.Random(0)
        for name in names:
            data = (bad / name).read_bytes()
            at = rng.randrange(len(data))
            flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            for damaged in (data[: len(data) // 2], b"", flipped, None):
                if damaged is None:
                    os.remove(bad / name)
                else:
                    (bad / name).write_bytes(damaged)
                with pytest.raises(ValueError, match=r"cannot be read|is missing|bytes instead of|the checksum") as error:
                    read_checkpoint(bad)
                if name != "manifest.json":
                    assert name in str(error.value)
                with pytest.warns(UserWarning, match=rf"Going back to .*{good.name}: .*{bad.name}"):
                    newest = read_newest(tmp_path / "run")
                assert newest is not None
                assert newest[0] == good
                (bad / name).write_bytes(data)
        assert_same(read_checkpoint(bad), read_checkpoint(tmp_path / "copy"))

    def test_all_damaged(self, tmp_path: Path) -> None:
        (small_checkpoint(tmp_path) / "state.json").write_text("{")
        with pytest.raises(ValueError, match=r"state.json has 1 bytes instead of \d+: the checkpoint is damaged"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())
        model = make()
        before = everything(model)
        with pytest.raises(ValueError, match=r"the checkpoint is damaged"):
            model.resume(tmp_path)
        assert_same(everything(model), before)

    def test_missing_package_and_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The newest is not damaged then, so no older one takes its place."""
        model = make(learning_rate=SimpleLinearSchedule(1e-3))
        for _ in range(2):
            model.save_checkpoint(tmp_path)
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "rl_zoo3.utils")
            patch.setitem(sys.modules, "rl_zoo3", None)
            with pytest.raises(ModuleNotFoundError, match=r"holds a SimpleLinearSchedule, which needs rl_zoo3.*: install it"):
                Off2OnSAC.load_checkpoint(tmp_path, Timed())
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "rl_zoo3.utils")
            assert Off2OnSAC.load_checkpoint(tmp_path, Timed()).lr_schedule(0.5) == 5e-4

        def fail(data: bytes) -> None:
            raise MemoryError("too large")

        monkeypatch.setattr(checkpoint, "load_tensors", fail)
        with pytest.raises(MemoryError, match=r"^too large$"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())

    def test_half_written_and_foreign_folders(self, tmp_path: Path) -> None:
        path = small_checkpoint(tmp_path)
        path.rename(path.with_name(f".{path.name}.partial"))
        (tmp_path / "rl_model_20_steps").mkdir()
        assert read_newest(tmp_path) is None
        with pytest.raises(ValueError, match=r"There is no checkpoint in .*: start a new model, or name the folder"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())
        small_checkpoint(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"000001_5_steps", "rl_model_20_steps"}

    def test_another_format(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = small_checkpoint(tmp_path)
        monkeypatch.setattr(checkpoint, "FORMAT", 2)
        with pytest.raises(ValueError, match=r"manifest.json cannot be read: it is of format 1, this version reads 2"):
            read_checkpoint(path)


class TestFullDisk:
    def test_at_every_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the file, the earlier checkpoint stays, nothing half-written does, and training goes on."""
        models = [make(), make()]
        for model in models:
            model.learn(EPISODE)
        earlier, _ = [model.save_checkpoint(tmp_path / name) for model, name in zip(models, "ab", strict=True)]
        write, failures = checkpoint._HashedFile.write, []
        for fail_at in range(100):
            n_writes = 0

            def full(self: Any, data: Any, fail_at: int = fail_at) -> int:
                nonlocal n_writes
                n_writes += 1
                if n_writes > fail_at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(self, data)

            monkeypatch.setattr(checkpoint._HashedFile, "write", full)
            try:
                models[0].save_checkpoint(tmp_path / "a", keep=1)
                break
            except OSError as error:
                failures.append(str(error))
            assert list((tmp_path / "a").iterdir()) == [earlier]
            read_checkpoint(earlier)
        assert len(failures) > 10
        for name in ("state.json", "tensors.safetensors", "replay.rows.rewards.npy", "manifest.json"):
            assert any(f"No space left on device: no checkpoint was written: '{tmp_path}" in f and name in f for f in failures)
        for model in models:
            model.learn(EPISODE, reset_num_timesteps=False)
        assert_same(everything(models[0]), everything(models[1]))

    def test_limit_of_the_system(self, tmp_path: Path) -> None:
        """A real one: no file may be larger than 20 kB."""
        model = make(policy_kwargs={"net_arch": [64]}).learn(EPISODE)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            with pytest.raises(OSError, match=r"File too large: no checkpoint was written: .*tensors.safetensors"):
                model.save_checkpoint(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert list(tmp_path.iterdir()) == []

    def test_unwritable_folder(self, tmp_path: Path) -> None:
        """A file in its place, which stops root as well; the callback finds out before anything is trained."""
        (tmp_path / "file").write_text("")
        model = make()
        with pytest.raises(OSError, match=r"file"):
            model.save_checkpoint(tmp_path / "file")
        with pytest.raises(OSError, match=r"file"):
            model.learn(EPISODE, callback=ResumableCheckpointCallback(tmp_path / "file", 5))
        assert model.num_timesteps == 0


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


class TestSafeLoading:
    def test_malicious_pickles(self, tmp_path: Path) -> None:
        """In the place of every file, with checksums that fit: nothing runs. As one file's array of objects neither."""
        path, trace = small_checkpoint(tmp_path / "run"), tmp_path / "trace"
        pickle.loads(pickle.dumps(Bomb(trace)))
        assert trace.exists()  # it would work
        trace.unlink()
        np.save(tmp_path / "objects.npy", np.array([Bomb(trace)], dtype=object), allow_pickle=True)
        th.save({"state": Bomb(trace)}, tmp_path / "model.pt")
        bombs = [pickle.dumps(Bomb(trace)), (tmp_path / "objects.npy").read_bytes(), (tmp_path / "model.pt").read_bytes()]
        for name in sorted(file.name for file in path.iterdir()):
            for bomb in bombs:
                shutil.copytree(path, tmp_path / "bad" / path.name)
                (tmp_path / "bad" / path.name / name).write_bytes(bomb)
                if name != "manifest.json":
                    sealed(tmp_path / "bad" / path.name)
                with pytest.raises(ValueError, match=rf"{name} cannot be read"):
                    Off2OnSAC.load_checkpoint(tmp_path / "bad", Timed())
                shutil.rmtree(tmp_path / "bad")
        assert not trace.exists()

    @pytest.mark.parametrize(
        "value",
        [
            {"__class__": "os.system"},
            {"__class__": "subprocess.Popen"},
            {"__class__": "builtins.eval"},
            {"__class__": "test_checkpoint.OwnSchedule"},
            {"__class__": "torch.nn.os.system"},
            {"__class__": "torch.nn.modules.module.OrderedDict"},
            {"__class__": "sb3_off2on.checkpoint.Path"},
            {"__object__": "pathlib.Path", "attributes": {}},
            {"__object__": "torch.optim.adam.Adam.__init__", "attributes": {}},
        ],
        ids=str,
    )
    def test_classes(self, tmp_path: Path, value: Any) -> None:
        """Only networks, optimizers, buffers and known schedules and noises can be named."""
        path = small_checkpoint(tmp_path)
        text = json.loads((path / "state.json").read_text())
        text["arguments"]["policy_kwargs"]["activation_fn"] = value
        (path / "state.json").write_text(json.dumps(text))
        sealed(path)
        with pytest.raises(ValueError, match=r"state.json cannot be read: The class '.*' is not one that"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())

    def test_nothing_is_imported(self, tmp_path: Path) -> None:
        name = "stable_baselines3.her.goal_selection_strategy_that_is_not_imported"
        assert checkpoint._find_class(f"{name}.Class") is None
        assert name not in sys.modules

    def test_files_elsewhere(self, tmp_path: Path) -> None:
        """Names of files stay within the checkpoint."""
        path = small_checkpoint(tmp_path)
        np.save(tmp_path / "secret.npy", np.zeros(3))
        for state in ({"x": {"__array__": "../secret.npy"}}, {"x": {"__tensor__": "none"}}):
            (path / "state.json").write_text(json.dumps(state))
            sealed(path)
            with pytest.raises(ValueError, match=r"state.json cannot be read"):
                read_checkpoint(path)

    def test_dataset_that_is_a_pickle(self, tmp_path: Path, dataset: Any) -> None:
        """The source is a file's word: a pickle is loaded where the user asks for it alone."""
        path, trace = make().learn_offline(dataset, 1).save_checkpoint(tmp_path / "run"), tmp_path / "trace"
        (tmp_path / "data.pkl").write_bytes(pickle.dumps(Bomb(trace)))
        state = json.loads((path / "state.json").read_text())
        state["dataset"]["source"] = str(tmp_path / "data.pkl")
        (path / "state.json").write_text(json.dumps(state))
        sealed(path)
        with pytest.raises(ValueError, match=r"is a pickle, and loading one can run any code"):
            Off2OnSAC.load_checkpoint(path, Timed())
        assert not trace.exists()


class OwnSchedule:
    def __call__(self, progress_remaining: float) -> float:
        return 1e-3 * progress_remaining


class OwnOff2OnSAC(Off2OnSAC):
    """With an argument of its own, and the others passed on."""

    def __init__(self, *args: Any, own: int = 1, **kwargs: Any) -> None:
        self.own = own
        super().__init__(*args, **kwargs)


class TestArguments:
    def test_values(self) -> None:
        value = {
            "numbers": [None, True, 1, 1.5, float("inf"), np.float32(0.1), np.int64(3), np.zeros(()), "text"],
            "keys": {0: "a", (1, 2): "b", "__tensor__": "c"},
            "tuples": ((1, [2]), ()),
            "arrays": {"/a b": np.arange(6).reshape(2, 3)[:, ::-1], "empty": np.zeros((0, 3), np.uint8)},
            "tensors": [th.arange(4.0).view(2, 2).T, th.tensor(3, dtype=th.int64), th.tensor([True])],
            "classes": [nn.ReLU, th.optim.AdamW, Off2OnSAC.policy_aliases["MlpPolicy"]],
            "device": th.device("cpu"),
        }
        tensors: dict[str, th.Tensor] = {}
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps(encode(value, "x", tensors, arrays))
        decoded = decode(json.loads(text), tensors, arrays.__getitem__)
        assert_same(decoded, {**value, "device": "cpu"})
        assert [type(number) for number in decoded["numbers"][5:8]] == [np.float32, np.int64, np.float64]
        schedule = ScaledSchedule(LinearSchedule(1.0, 0.5, 1.0), 0.5)
        assert decode(encode(schedule, "x", {}, {}), {}, arrays.__getitem__)(0.0) == 0.25

    @pytest.mark.parametrize("value", [lambda x: x, OwnSchedule(), OwnSchedule, {1, 2}, np.array([None]), object(), os.system])
    def test_what_a_checkpoint_cannot_hold(self, value: Any) -> None:
        with pytest.raises(TypeError):
            encode([value], "x", {}, {})

    def test_missing_ones_are_named(self, tmp_path: Path) -> None:
        make(learning_rate=lambda progress: 1e-3 * progress, qf_learning_rate=OwnSchedule()).save_checkpoint(tmp_path)
        with pytest.raises(ValueError, match=r"does not hold .*lambda.*folder, env, learning_rate=\.\.\., qf_learning"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), learning_rate=0.5, qf_learning_rate=OwnSchedule())
        assert loaded.lr_schedule(1) == 0.5

    def test_own_algorithm(self, tmp_path: Path) -> None:
        make(OwnOff2OnSAC, own=3, cql_n_actions=4).save_checkpoint(tmp_path)
        loaded = OwnOff2OnSAC.load_checkpoint(tmp_path, Timed())
        assert (loaded.own, loaded.cql_n_actions) == (3, 4)
        with pytest.raises(ValueError, match=r"is a checkpoint of OwnOff2OnSAC: use `OwnOff2OnSAC.load_checkpoint`"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed())

    def test_changed_on_purpose(self, tmp_path: Path) -> None:
        small_checkpoint(tmp_path)
        assert Off2OnSAC.load_checkpoint(tmp_path, Timed(), gamma=0.5).gamma == 0.5
        with pytest.raises(ValueError, match=r"Rows of \(5, 1, 3\) float32 do not fit a buffer of \(4, 1, 3\)"):
            Off2OnSAC.load_checkpoint(tmp_path, Timed(), buffer_size=4)

    def test_another_entropy_coefficient(self, tmp_path: Path, dataset: Any) -> None:
        fixed = make(dataset=dataset, ent_coef=0.2, offline_ent_coef=0.2).learn_offline(gradient_steps=2)
        fixed.save_checkpoint(tmp_path)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, ent_coef=0.4)
        assert loaded.ent_coef_tensor == pytest.approx(0.4)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, ent_coef="auto_0.3", offline_ent_coef="auto")
        assert loaded.log_ent_coef is not None
        assert loaded.log_ent_coef.exp().item() == pytest.approx(0.3)
        assert loaded.offline_log_ent_coef.tolist() == [0, 0]
        loaded.learn_offline(gradient_steps=4)
        assert 0 not in loaded.offline_log_ent_coef.tolist()
        loaded.learn(2 * EPISODE)
        assert loaded.log_ent_coef.exp().item() != pytest.approx(0.3, abs=1e-6)

    def test_policy_kwargs_stay(self, tmp_path: Path) -> None:
        """Their optimizers' settings would be those of the checkpoint."""
        make(AWAC).save_checkpoint(tmp_path)
        policy_kwargs = {**make(AWAC).policy_kwargs, "actor_weight_decay": 0.3}
        with pytest.raises(ValueError, match=r"is of another model: `policy_kwargs` differs"):
            AWAC.load_checkpoint(tmp_path, Timed(), policy_kwargs=policy_kwargs)

    @pytest.mark.parametrize(("before", "after"), [("uniform", "balanced"), ("balanced", "online")])
    @pytest.mark.parametrize("how", ["set_scheme", "argument"])
    def test_another_scheme(self, tmp_path: Path, dataset: Any, before: str, after: str, how: str) -> None:
        """Whether it changed before the checkpoint or with it."""
        kwargs = {"scheme": before}
        model = make(dataset=dataset, offline_gradient_steps=2, replay_buffer_kwargs=kwargs).learn(3 * EPISODE)
        if how == "set_scheme":
            model.replay_buffer.set_scheme(after)
            if after == "balanced":
                model.replay_buffer.update_priorities(np.arange(3), np.array([1.0, 2.0, 3.0]))
        model.save_checkpoint(tmp_path)
        changed: dict[str, Any] = {"replay_buffer_kwargs": {"scheme": after}} if how == "argument" else {}
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset, **changed)
        assert loaded.replay_buffer.scheme == after
        if after == "balanced":
            rows = np.arange(len(dataset) + 3 * EPISODE)
            priorities = loaded.replay_buffer.priorities(rows)
            if how == "set_scheme":
                np.testing.assert_array_equal(priorities, model.replay_buffer.priorities(rows))
            else:  # as at the hand-over, where they are reset
                assert set(priorities[: len(dataset)]) == {1.0}
                assert set(priorities[len(dataset) :]) == {loaded.replay_buffer.default_priority}
                assert loaded.replay_buffer.default_priority > 1
        loaded.learn(5 * EPISODE)
        assert loaded.replay_buffer.n_online == 5 * EPISODE

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"gamma": 0.5}, r"`gamma` differs, 0.99 there and 0.5 here"),
            ({"policy_kwargs": {"net_arch": [8]}}, r"`policy_kwargs` differs"),
            ({"env": Timed(length=5, action_space=spaces.Box(-2, 2, (2,)))}, r"the action space differs"),
            ({"env": Timed(spaces.Box(-1, 1, (4,)))}, r"the observation space differs"),
            ({"env": DummyVecEnv([Timed] * 2)}, r"the number of environments differs, 1 there and 2 here"),
            ({"env": VecNormalize(DummyVecEnv([Timed]))}, r"the statistics of VecNormalize differs"),
            ({"dataset": True}, r"the dataset's fingerprint differs, None there"),
            ({"cls": AWAC}, r"the algorithm differs, Off2OnSAC there and AWAC here"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_another_model(self, tmp_path: Path, dataset: Any, other: dict[str, Any], message: str) -> None:
        """Nothing of a model changes that does not fit."""
        small_checkpoint(tmp_path)
        model = make(**{**other, **({"dataset": dataset} if "dataset" in other else {})})
        before = everything(model)
        with pytest.raises(ValueError, match=rf"000001_5_steps: The checkpoint is of another model: {message}.*Make"):
            model.learn(EPISODE, callback=ResumableCheckpointCallback(tmp_path, 5, resume="auto"))
        assert_same(everything(model), before)

    def test_another_architecture(self, tmp_path: Path) -> None:
        path = small_checkpoint(tmp_path)
        state = read_checkpoint(path)
        state["parameters"]["policy"].popitem()
        with pytest.raises(ValueError, match=r"The checkpoint is of another model: 'critic.* in its policy is another one"):
            resume.check_state(make(), state)

    def test_keep(self, tmp_path: Path) -> None:
        model = make()
        with pytest.raises(ValueError, match=r"`keep` must be at least 1, or None for all, got 0"):
            model.save_checkpoint(tmp_path, keep=0)
        for _ in range(4):
            model.save_checkpoint(tmp_path)
        model.save_checkpoint(tmp_path, keep=2)
        assert sorted(os.listdir(tmp_path)) == ["000004_0_steps", "000005_0_steps"]


def test_rebuilt_sum_tree_is_the_same() -> None:
    """Nodes are sums of their children, in whatever order these were set."""
    rng = np.random.default_rng(0)
    tree = SumTree(70_000)
    tree.fill(0, 60_000, rng.exponential(size=60_000))
    for _ in range(50):
        tree.update(rng.integers(0, 60_000, 256), rng.exponential(size=256))
    rebuilt = SumTree(70_000)
    rebuilt.fill(0, 60_000, tree.leaves[:60_000])
    for level, expected in zip(rebuilt._levels, tree._levels, strict=True):
        np.testing.assert_array_equal(level, expected)


class TestCallback:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"save_freq": 0}, r"`save_freq` must be at least 1, got 0"),
            ({"save_freq": 1, "keep": 0}, r"`keep` must be at least 1, got 0"),
            ({"save_freq": 1, "resume": "yes"}, r"`resume` must be 'auto' or None, got 'yes'"),
        ],
    )
    def test_arguments(self, tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ResumableCheckpointCallback(tmp_path, **kwargs)

    def test_another_algorithm(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"needs a model with an offline phase, e.g. an Off2OnSAC, got a SAC"):
            SAC("MlpPolicy", Timed()).learn(1, callback=ResumableCheckpointCallback(tmp_path, 1))

    def test_folder_of_another_run(self, tmp_path: Path) -> None:
        """A new model would mix its checkpoints with those of the run before."""
        small_checkpoint(tmp_path)
        with pytest.raises(ValueError, match=r"holds checkpoints, the newest is 000001_5_steps: go on from it with"):
            make().learn(5, callback=ResumableCheckpointCallback(tmp_path, 5))
        Off2OnSAC.load_checkpoint(tmp_path, Timed()).learn(10, callback=ResumableCheckpointCallback(tmp_path, 5))

    def test_frequency_and_prints(self, tmp_path: Path, dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
        callback = ResumableCheckpointCallback(tmp_path, save_freq=5, keep=9, resume="auto", verbose=2)
        make().learn_offline(dataset, 12, callback=[callback])
        assert [path.name for path in reversed(find_checkpoints(tmp_path))] == [
            "000001_5_steps",
            "000002_10_steps",
            "000003_12_steps",
        ]
        assert f"Saving checkpoint to {tmp_path}/000003_12_steps\n" in capsys.readouterr().out
        model = make().learn_offline(dataset, 14, callback=ResumableCheckpointCallback(tmp_path, 5, resume="auto", verbose=1))
        assert model.num_timesteps == 14
        assert f"Going on at 12 steps from {tmp_path}\n" in capsys.readouterr().out


class Raise(BaseCallback):
    """A signal, or several, at the end of a step."""

    def __init__(self, signum: int, at: int, times: int = 1):
        super().__init__()
        self.signum, self.at, self.times = signum, at, times

    def _on_step(self) -> bool:
        if self.n_calls == self.at:
            for _ in range(self.times):
                signal.raise_signal(self.signum)
        return True


class TestSignals:
    @pytest.fixture(autouse=True)
    def ctrl_c_is_heard(self) -> Iterator[None]:
        """Also where the tests were started in the background."""
        old = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, old)

    def test_ctrl_c(self, tmp_path: Path, dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """Offline, the resumed run ends as one that nobody interrupted."""
        callback = ResumableCheckpointCallback(tmp_path, 100, resume="auto", verbose=1)
        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(KeyboardInterrupt):
            make().learn_offline(dataset, N_OFFLINE, callback=[callback, Raise(signal.SIGINT, 7)])
        assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert [path.name for path in find_checkpoints(tmp_path)] == ["000001_7_steps"]
        assert "SIGINT: stopping after the next checkpoint" in capsys.readouterr().out
        model = train(make(), dataset, ResumableCheckpointCallback(tmp_path, 100, resume="auto"))
        expected = train(make(), dataset, ResumableCheckpointCallback(tmp_path / "other", 100))
        assert_same(everything(model), everything(expected))

    def test_sigterm_in_a_rollout(self, tmp_path: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The step under way is stored first. What the signal did before, it does after."""

        def handler(signum: int, frame: Any) -> None:
            raise SystemExit(signum)

        old = signal.signal(signal.SIGTERM, handler)
        try:
            model = make().learn_offline(dataset, 3)
            with pytest.raises(SystemExit):
                model.learn(N_ONLINE, callback=[ResumableCheckpointCallback(tmp_path, 100), Raise(signal.SIGTERM, 7)])
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, old)
        loaded = Off2OnSAC.load_checkpoint(tmp_path, Timed(), dataset)
        assert (loaded.num_timesteps, loaded.replay_buffer.n_online, loaded._n_first_steps) == (10, 7, 7)
        loaded.learn(N_ONLINE)
        assert (loaded.num_timesteps, loaded.replay_buffer.n_online) == (3 + N_ONLINE, 30)

    def test_second_one_stops_at_once(self, tmp_path: Path) -> None:
        callback = ResumableCheckpointCallback(tmp_path, 100)
        with pytest.raises(KeyboardInterrupt):
            make().learn(10, callback=[callback, Raise(signal.SIGINT, 3, times=2)])
        assert find_checkpoints(tmp_path) == []

    def test_disk_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "file")

        monkeypatch.setattr(checkpoint, "_write_file", full)
        with (
            pytest.warns(UserWarning, match=r"Stopped without a checkpoint: .*No space left on device: 'file'"),
            pytest.raises(KeyboardInterrupt),
        ):
            make().learn(10, callback=[ResumableCheckpointCallback(tmp_path, 100), Raise(signal.SIGINT, 3)])

    def test_handlers_come_back_after_an_error(self, tmp_path: Path) -> None:
        class Fail(BaseCallback):
            def _on_step(self) -> bool:
                raise RuntimeError("own")

        before = signal.getsignal(signal.SIGINT)
        callback = ResumableCheckpointCallback(tmp_path, 1)
        with pytest.raises(RuntimeError, match=r"own"):
            make().learn(5, callback=[callback, Fail()])
        assert signal.getsignal(signal.SIGINT) is before
        callback.on_training_end()  # as RL Zoo does then
        assert find_checkpoints(tmp_path) == []

    def test_ignored_ones_stay_ignored(self, tmp_path: Path) -> None:
        """As in a process that was put into the background."""
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            make().learn(10, callback=[ResumableCheckpointCallback(tmp_path, 100), Raise(signal.SIGINT, 3)])
        finally:
            signal.signal(signal.SIGINT, old)


def run_in_process(folder: Path, connection: Any) -> None:
    """The script that is killed: writes are slow, so that many kills hit one."""
    th.set_num_threads(1)
    os.fsync = lambda descriptor: time.sleep(0.002)  # type: ignore[assignment]
    dataset = make_dataset(4, 20, env=Timed())
    connection.send("ready")
    model = train(make(), dataset, ResumableCheckpointCallback(folder / "run", 4, resume="auto"))
    tensors, arrays = {}, {}  # type: ignore[var-annotated]
    encode({"parameters": model.get_parameters(), "replay": model.replay_buffer.get_state()}, "x", tensors, arrays)
    tensors |= {name: th.as_tensor(array.copy()) for name, array in arrays.items()}
    (folder / "result").write_bytes(save_tensors(tensors))


def is_writing(folder: Path) -> bool:
    try:
        return any(folder.glob(".*.partial/*"))
    except FileNotFoundError:  # it was, and is done
        return False


def test_killed_at_20_moments(tmp_path: Path) -> None:
    """Ten at random, ten while a checkpoint is written: the end is that of the run without kills, to the last bit."""
    context = multiprocessing.get_context("fork")  # others would import PyTorch 22 times

    def start(folder: Path) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_in_process, args=(folder, theirs))
        process.start()
        ours.recv()
        return process

    def finish(folder: Path) -> tuple[bytes, float]:
        begin = time.monotonic()
        process = start(folder)
        process.join()
        assert process.exitcode == 0
        return (folder / "result").read_bytes(), time.monotonic() - begin

    for name in ("quiet", "killed"):
        (tmp_path / name).mkdir()
    expected, duration = finish(tmp_path / "quiet")
    folder, rng, n_half_written = tmp_path / "killed", random.Random(0), 0
    for number in range(20):
        process = start(folder)
        if number % 2 == 0:
            time.sleep(rng.uniform(0, duration / 5))
        else:
            while not is_writing(folder / "run"):
                time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        n_half_written += any((folder / "run").glob(".*.partial"))
    assert n_half_written >= 5  # a few may be complete between the look and the kill
    assert not (folder / "result").exists()
    assert finish(folder)[0] == expected
