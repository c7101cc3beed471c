"""The phase that SB3's off-policy algorithms lack: learning from a dataset before the first environment step."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.logger import KVWriter, configure
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import configure_logger, safe_mean, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_off2on.buffers import BalancedReplayBuffer, BalancedReplayBufferSamples
from sb3_off2on.datasets import OfflineDataset, load_dataset
from sb3_off2on.guard import Guarded
from sb3_off2on.policies import EnsembleCQLPolicy
from sb3_off2on.resume import Resumable, iterate_callbacks, set_session
from sb3_off2on.workers import close_dead_workers, watched_workers

SelfOfflineToOnline = TypeVar("SelfOfflineToOnline", bound="OfflineToOnline")

# What trains, in the order in which it is called
CALLS = ("learn_offline", "fit_fqe", "learn")
# The paper's 1000 epochs of 1000 updates
PUBLISHED_OFFLINE_STEPS = 1_000_000
# Optimizers divide by small numbers: much larger ones overflow in float32
MAX_LEARNING_RATE = 1e6
# Online updates between two looks at the progress bar
STEPS_PER_DISPLAY = 50


class TensorReader(KVWriter):
    """
    First output of a logger, which turns recorded tensors into numbers for the others. So an accelerator need not finish
    each update before the next begins, and whoever dumps the logs, a callback too, writes scalars.
    """

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        for key, value in key_values.items():
            if isinstance(value, th.Tensor) and value.ndim == 0:
                key_values[key] = value.item()

    def close(self) -> None:
        """Part of the interface: there is no file to close."""


class OfflineToOnline(Resumable, Guarded):
    """
    Mixin that puts an offline phase before an SB3 off-policy algorithm's ``learn()``. The algorithm brings
    ``train_offline()``, its own ``train()``, and ``_hand_over()``; or, where both phases do the same, ``_update()`` and
    ``_optimizers()``.

    One counter runs through both phases: ``num_timesteps`` counts gradient steps offline and environment steps online, and
    goes on where the offline phase ended. So checkpoints keep distinct names, and logs share one axis. In both phases,
    callbacks are called once for ``n_envs`` of its steps.
    """

    policy: EnsembleCQLPolicy
    # Class attributes, so that a model that never meets a dataset carries no trace of one
    dataset: OfflineDataset | None = None
    dataset_info: dict[str, Any] | None = None
    pretrained: bool = False
    offline_gradient_steps: int
    offline_batch_size: int
    first_update_multiplier: int
    replay_buffer: BalancedReplayBuffer | None
    _n_offline_updates: int = 0
    _handed_over: bool = False
    _n_first_steps: int = 0
    _tb_log_name: str | None = None
    _dataset_params: ClassVar[list[str]] = ["dataset"]

    # ------------------------------------------------------------------ what the algorithm brings

    def _update(self, replay_data: BalancedReplayBufferSamples, per_member: bool) -> dict[str, th.Tensor]:
        """
        One step of all optimizers, for algorithms that do the same in both phases.

        :param replay_data: ``batch_size`` rows, or ``ensemble_size * batch_size`` rows if ``per_member``
        :param per_member: whether the members are independent agents, each with rows of its own (those of member 0 first)
        :return: what to log, as means over members and critics: tensors without dimensions, see ``TensorReader``; nothing if a
            fault ended the update
        """
        raise NotImplementedError()

    def _optimizers(self) -> list[th.optim.Optimizer]:
        """:return: those that ``_update()`` steps, all with the learning rate of the algorithm"""
        raise NotImplementedError()

    def train_offline(self, gradient_steps: int, batch_size: int) -> None:
        """
        Sample the dataset and do the updates of the offline phase, counted in ``_n_offline_updates``. What it logs may be
        tensors without dimensions.

        :param gradient_steps: number of updates
        :param batch_size: rows per update and member
        """
        assert self.replay_buffer is not None
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        learning_rate = self.lr_schedule(self._current_progress_remaining)
        for optimizer in self._optimizers():
            update_learning_rate(optimizer, learning_rate)
        for _ in range(gradient_steps):
            # Each member learns from a minibatch of its own: the first `batch_size` rows are member 0's
            n_rows = self.policy.ensemble_size * batch_size
            replay_data = self.replay_buffer.sample_offline(n_rows, env=self._vec_normalize_env)
            self._n_offline_updates += 1
            if self._has_fault(replay_data, self.policy.ensemble_size):
                continue
            for name, value in self._update(replay_data, per_member=True).items():
                self.logger.record_mean(f"offline/{name}", value)  # type: ignore[arg-type]
        self.logger.record("offline/learning_rate", learning_rate)

    def _hand_over(self) -> None:
        """Make the agents of the offline phase ready for the first online step. Without more, their optimizers go on."""
        if self.pretrained:
            self._n_updates = 0

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Sample the replay and do the updates of the online phase, counted in ``_n_updates``.

        :param gradient_steps: number of updates that SB3 asks for
        :param batch_size: rows per update, the same for all members
        """
        assert self.replay_buffer is not None
        gradient_steps = self._online_gradient_steps(gradient_steps)
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        for _ in self._steps_shown(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            if self._has_fault(replay_data):
                continue
            for name, value in self._update(replay_data, per_member=False).items():
                self.logger.record_mean(f"train/{name}", value)  # type: ignore[arg-type]
            if self.dataset is not None:
                is_offline = th.as_tensor(replay_data.indices < self.replay_buffer.n_offline)
                self.logger.record_mean("replay/offline_fraction", is_offline.double().mean())  # type: ignore[arg-type]
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # ------------------------------------------------------------------ the members

    def get_member(self, index: int) -> dict[str, dict[str, th.Tensor]]:
        """
        :param index: which member
        :return: copies of the state dicts of its networks (``actor``, ``critic``, ``critic_target`` and, with BCQ,
            ``actor_target`` and ``vae``); those of ``Off2OnSAC`` are what SB3's networks load
        :raises ValueError: if there is no such member
        """
        return self.policy.get_member(index)

    def set_member(self, index: int, member: dict[str, dict[str, th.Tensor]]) -> None:
        """
        Make an agent that was trained elsewhere a member of the ensemble, see ``EnsembleCQLPolicy.set_member``. The model
        counts as pretrained: its actions are played from the first step on. The optimizers of all members begin anew.

        :param index: which member
        :param member: state dicts as ``get_member`` returns them; those of target networks can be missing
        :raises ValueError: if there is no such member, or the parameters do not fit
        """
        self.policy.set_member(index, member)
        # Nothing that was gathered about the parameters before holds for the new ones. The members' optimizers are one
        self.policy.reset_optimizers()
        self.pretrained, self._handed_over = True, False

    # ------------------------------------------------------------------ what the algorithms check alike

    def _check_at_least(self, **minima: float) -> None:
        """
        :param minima: names of arguments and the smallest value of each
        :raises ValueError: if one is below it, or not finite
        """
        for name, minimum in minima.items():
            self._check_number(name)
            if not getattr(self, name) >= minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}")
            if getattr(self, name) == math.inf:
                raise ValueError(f"`{name}` must be finite, got inf")

    def _check_number(self, name: str) -> None:
        """
        :param name: name of an argument
        :raises TypeError: if it is not a number
        """
        if not isinstance(getattr(self, name), (int, float, np.number)):
            raise TypeError(f"`{name}` must be a number, got {getattr(self, name)!r}")

    def _check_integers(self, *names: str) -> None:
        """
        Make integers of arguments like 1e6, which is how YAML files have them.

        :param names: names of arguments
        :raises ValueError: if one has a fraction
        """
        for name in names:
            self._check_number(name)
            if not float(getattr(self, name)).is_integer():
                raise ValueError(f"`{name}` must be an integer, got {getattr(self, name)}")
            setattr(self, name, int(getattr(self, name)))

    def _replay_without_priorities(self) -> None:
        """
        For algorithms that estimate no density ratio: a uniform replay unless another one is asked for.

        :raises ValueError: if that is the balanced one
        """
        self.replay_buffer_kwargs = {"scheme": "uniform", **self.replay_buffer_kwargs}
        if self.replay_buffer_kwargs["scheme"] == "balanced":
            raise ValueError(
                f"`replay_buffer_kwargs=dict(scheme='balanced')` needs density ratios, which {type(self).__name__} does not "
                "estimate: choose 'uniform', 'online', 'offline' or 'symmetric', or use Off2OnSAC"
            )

    def _check_common_arguments(self) -> None:
        """
        What SB3 does not check, or only asserts.

        :raises TypeError: if an argument is not of the type that it must be
        :raises ValueError: if it is out of its range
        """
        self._check_at_least(learning_starts=0, buffer_size=1, batch_size=1, gradient_steps=-1)
        self._check_integers("offline_gradient_steps", "offline_batch_size", "learning_starts", "buffer_size", "batch_size")
        self._check_integers("gradient_steps")
        for name in ("gamma", "tau"):
            self._check_number(name)
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}")
        for name, rate in vars(self).items():
            if not name.endswith("learning_rate") or callable(rate) or (rate is None and name == "qf_learning_rate"):
                continue
            self._check_number(name)
            if not 0 <= rate <= MAX_LEARNING_RATE:
                raise ValueError(f"`{name}` must be in [0, {MAX_LEARNING_RATE:g}], got {rate}")
        freq = self.train_freq
        frequency, unit = freq if isinstance(freq, tuple) and len(freq) == 2 else (freq, "step")
        if (
            not isinstance(frequency, (int, np.integer))
            or frequency < 1
            or unit not in (*TrainFrequencyUnit, "step", "episode")
        ):
            raise ValueError(f"`train_freq` must be a number of steps, or such as (1, 'episode'), at least 1, got {freq!r}")
        if self.on_fault not in ("raise", "skip"):
            raise ValueError(f"`on_fault` must be 'raise' or 'skip', got {self.on_fault!r}")
        self._check_number("max_abs_q")
        if not self.max_abs_q > 0:
            raise ValueError(f"`max_abs_q` must be above 0, got {self.max_abs_q}: use math.inf for no limit")

    def _check_arguments(self) -> None:
        """
        Check the arguments that only this algorithm has, if there are any.

        :raises TypeError: if one is not of the type that it must be
        :raises ValueError: if it is out of its range
        """

    def _setup_model(self) -> None:
        # Here rather than in the constructor, for the arguments of load()
        self._check_arguments()
        self._check_common_arguments()
        super()._setup_model()
        assert isinstance(self.train_freq, TrainFreq)
        # SB3 raises this after the first rollout, which counts steps here
        if self.n_envs > 1 and self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError(
                f"`train_freq=({self.train_freq.frequency}, 'episode')` needs a single environment, but there are "
                f"{self.n_envs}: give `train_freq` in steps"
            )
        if self.dataset is not None:
            self.set_dataset(self.dataset)

    # ------------------------------------------------------------------ the dataset

    def set_dataset(self, dataset: Any) -> None:
        """
        Attach the dataset, at first or again after loading (a saved model holds its source and fingerprint, not its rows).

        :param dataset: whatever ``load_dataset`` takes
        :raises ValueError: if its spaces are not the environment's, or it is not the dataset the model was trained with
        """
        assert self.replay_buffer is not None
        dataset = load_dataset(dataset).for_spaces(self.observation_space, self.action_space)
        info = dataset.info
        if self.dataset_info is not None and self.dataset_info["fingerprint"] != info["fingerprint"]:
            raise ValueError(
                f"`dataset` is not the one this model was trained with: got {info}, expected {self.dataset_info}. "
                "Load that one, or start a new model, whose members can be those of this one (`set_member`, `get_member`)"
            )
        self._attach_dataset(dataset)
        self.dataset, self.dataset_info = dataset, info
        self._seed_vec_normalize()

    def _attach_dataset(self, dataset: OfflineDataset) -> None:
        assert self.replay_buffer is not None
        is_new = self.replay_buffer.dataset_info is None
        self.replay_buffer.set_offline_data(dataset)
        if is_new:
            self._reset_priorities()

    def _reset_priorities(self) -> None:
        """Give the rows of both parts their initial priorities, where the replay has some."""

    def load_replay_buffer(self, path: Any, truncate_last_traj: bool = True) -> None:
        """
        SB3's. The rows are the file's, the scheme stays the model's.

        :raises ValueError: if the file holds another class of buffer, or one of another dataset; nothing changes then
        """
        own = self.replay_buffer
        expected = {
            "obs_shape": get_obs_shape(self.observation_space),
            "action_space": self.action_space,
            "n_envs": self.n_envs,
        }
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            if not isinstance(self.replay_buffer, BalancedReplayBuffer):
                raise ValueError(
                    f"The file holds a {type(self.replay_buffer).__name__}, which cannot have an offline part: "
                    "only a BalancedReplayBuffer can be loaded. `load_dataset` takes the buffer as a dataset"
                )
            for name, value in expected.items():
                if getattr(self.replay_buffer, name) != value:
                    raise ValueError(
                        f"The buffer in the file has `{name}={getattr(self.replay_buffer, name)}`, "
                        f"but this model has {value}: load the buffer that belongs to it"
                    )
            # A user may have dropped the model's own buffer before, to save memory
            scheme = self.replay_buffer.scheme if own is None else own.scheme
            if own is not None and self.replay_buffer.buffer_device != own.buffer_device:
                self.replay_buffer.set_buffer_device(own.buffer_device)
            if own is not None:
                self.replay_buffer.random_shift = own.random_shift
            new_scheme = self.replay_buffer.scheme != scheme
            self.replay_buffer.set_scheme(scheme)
            # The pickle holds no copy of the dataset: give it the rows that this model has
            if self.dataset is not None:
                self._attach_dataset(self.dataset)
            if new_scheme:
                self._reset_priorities()
        except BaseException:
            self.replay_buffer = own
            raise

    def _seed_vec_normalize(self) -> None:
        """
        Give ``VecNormalize`` the dataset's statistics where it has none of its own: those of an environment that was only
        reset are of a few observations, and would throw all rows to its clipping bounds.
        """
        env, dataset = self._vec_normalize_env, self.dataset
        # Every step counts as a return, a reset does not
        if env is None or dataset is None or env.ret_rms.count >= 1:
            return
        frames: Any = dataset.frames
        obs_rms: Any = getattr(env, "obs_rms", None)
        parts = [(obs_rms, frames)] if not isinstance(obs_rms, dict) else [(obs_rms[key], frames[key]) for key in obs_rms]
        for statistics, part in parts:
            if statistics is not None:
                for start in range(0, len(part), 1024):
                    statistics.update(part[start : start + 1024])
        returns, discounted = [], 0.0
        for reward, end in zip(dataset.rewards.tolist(), dataset.episode_ends.tolist(), strict=True):
            discounted = env.gamma * discounted + reward
            returns.append(discounted)
            discounted = 0.0 if end else discounted
        env.ret_rms.update(np.array(returns))

    def _prepare_dataset(self) -> None:
        if self.env is None:
            raise ValueError("The model has no environment: pass `env` to load(), or call `model.set_env(...)`")
        assert self.replay_buffer is not None
        if self.offline_gradient_steps > 0 and self.dataset_info is None and not self.pretrained:
            raise ValueError(
                f"`offline_gradient_steps={self.offline_gradient_steps}` needs a dataset: "
                "pass `dataset=...` or call `model.set_dataset(...)`"
            )
        if self.dataset_info is not None and self.dataset is None:
            raise ValueError(
                f"This model was trained with the dataset {self.dataset_info}, which a saved model does not contain: "
                "call `model.set_dataset(...)` with it before training"
            )
        if self.dataset is None and self.replay_buffer.scheme in ("offline", "symmetric"):
            raise ValueError(
                f"`replay_buffer_kwargs=dict(scheme={self.replay_buffer.scheme!r})` needs a dataset: "
                "pass `dataset=...` or call `model.set_dataset(...)`, or choose 'uniform'"
            )
        # The environment may have come after the dataset
        self._seed_vec_normalize()

    @classmethod
    def load(
        cls: type[SelfOfflineToOnline],
        path: Any,
        env: GymEnv | None = None,
        device: Any = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfOfflineToOnline:
        """SB3's; a ``dataset`` among ``kwargs`` is attached with ``set_dataset()``."""
        dataset = kwargs.pop("dataset", None)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        if dataset is not None:
            model.set_dataset(dataset)
        return model

    # ------------------------------------------------------------------ the offline phase

    @classmethod
    def pretrain_offline(
        cls: type[SelfOfflineToOnline],
        dataset: Any,
        env: GymEnv | str | None = None,
        *,
        policy: str | type[BasePolicy] | None = None,
        offline_gradient_steps: int = PUBLISHED_OFFLINE_STEPS,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        progress_bar: bool = False,
        download: bool = False,
        **kwargs: Any,
    ) -> SelfOfflineToOnline:
        """
        A model trained on a dataset, ready for ``learn()``.

        :param dataset: whatever ``load_dataset`` takes, e.g. a Minari id
        :param env: the environment to fine-tune in; by default the one that the dataset was recorded in
        :param policy: by default ``MultiInputPolicy``, ``CnnPolicy`` or ``MlpPolicy``, as the observations ask for
        :param offline_gradient_steps: number of updates (the paper: 1000 epochs of 1000)
        :param callback: see ``learn_offline``
        :param log_interval: see ``learn_offline``
        :param progress_bar: see ``learn_offline``
        :param download: whether Minari may download the dataset
        :param kwargs: arguments of the algorithm's constructor
        :return: the trained model
        :raises ValueError: if the dataset cannot be loaded or does not fit the environment
        """
        if kwargs.get("gradient_steps", -1) > 0 and offline_gradient_steps == PUBLISHED_OFFLINE_STEPS:
            warnings.warn(
                f"`gradient_steps={kwargs['gradient_steps']}` is the number of online updates after each rollout, as in SB3. "
                f"Updates from the dataset are `offline_gradient_steps`, here {offline_gradient_steps}"
            )
        dataset = load_dataset(dataset, download=download)
        if env is None:
            env = dataset.make_env()
        model = cls(policy or default_policy(dataset.observation_space), env, dataset=dataset, **kwargs)  # type: ignore[call-arg]
        return model.learn_offline(None, offline_gradient_steps, callback, log_interval, progress_bar)

    def learn_offline(
        self: SelfOfflineToOnline,
        dataset: Any = None,
        gradient_steps: int = PUBLISHED_OFFLINE_STEPS,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        progress_bar: bool = False,
        tb_log_name: str | None = None,
    ) -> SelfOfflineToOnline:
        """
        Train on the dataset, without a step in the environment. ``num_timesteps`` counts the updates. As everywhere in SB3,
        a call of the callbacks stands for ``n_envs`` time steps; a callback that returns False stops the phase.

        :param dataset: whatever ``load_dataset`` takes; not needed where the model has one already
        :param gradient_steps: number of updates, on top of those done before
        :param callback: callback(s) called after every ``n_envs`` updates
        :param log_interval: number of updates between two logs; ``None`` for no logs
        :param progress_bar: display a progress bar
        :param tb_log_name: name of the run for TensorBoard, by default that of ``learn()``, which goes on in the same run
        :return: the trained model
        :raises ValueError: if there is no dataset, or it does not fit the environment
        """
        train = partial(self.train_offline, batch_size=self.offline_batch_size)
        self._offline_call("learn_offline", train, dataset, gradient_steps, callback, log_interval, progress_bar, tb_log_name)
        return self

    def _offline_call(
        self,
        name: str,
        train: Callable[..., None],
        dataset: Any,
        gradient_steps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        progress_bar: bool,
        tb_log_name: str | None,
    ) -> None:
        """
        A public method that makes updates from the dataset; the other parameters as ``learn_offline``.

        :param name: of the method
        :param train: makes the updates, as many as its argument ``gradient_steps`` says
        """
        if gradient_steps < 1 or not float(gradient_steps).is_integer():
            raise ValueError(f"`gradient_steps` must be an integer of at least 1, got {gradient_steps}")
        if log_interval is not None and log_interval < 1:
            raise ValueError(f"`log_interval` must be at least 1, got {log_interval}: use None for no logs")
        if dataset is not None:
            self.set_dataset(dataset)
        self._prepare_dataset()
        if self.dataset is None:
            raise ValueError("There is no dataset to learn from: pass `dataset=...` or call `model.set_dataset(...)`")
        with self._hooks(callback):
            interrupted, _ = self._to_complete or (name, 0)
            if CALLS.index(interrupted) > CALLS.index(name) and gradient_steps <= self._n_offline_updates:
                warnings.warn(
                    f"Nothing to do in `{name}(gradient_steps={gradient_steps})`: the checkpoint that this model was loaded "
                    f"from is of a later `{interrupted}()`, after {self._n_offline_updates} updates of the offline phase"
                )
            else:
                self._learn_offline(name, train, int(gradient_steps), callback, log_interval, progress_bar, tb_log_name)

    def _learn_offline(
        self,
        name: str,
        train: Callable[..., None],
        gradient_steps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        progress_bar: bool,
        tb_log_name: str | None,
    ) -> bool:
        """:return: whether no callback stopped the phase; parameters as ``_offline_call``"""
        interrupted, start = self._to_complete or ("", 0)
        if interrupted != name:
            start = self._n_offline_updates
        self._call, self._to_complete = (name, start), None
        n_done = self._n_offline_updates - start

        tb_log_name = tb_log_name or type(self).__name__
        total_timesteps, callback = self._setup_learn(
            gradient_steps - n_done,
            callback,
            reset_num_timesteps=self.num_timesteps == 0,
            tb_log_name=tb_log_name,
            progress_bar=progress_bar,
            reset_env=False,
        )
        # What SB3's callbacks read in `locals`: no episode ends here
        dones: np.ndarray = np.zeros(self.n_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.n_envs)]
        callback.on_training_start(locals(), globals())

        continue_training = True
        while n_done < gradient_steps and continue_training:
            self._current_progress_remaining = 1.0 - n_done / gradient_steps
            # SB3's callbacks take a call for `n_envs` time steps: progress bars count so, and so are frequencies given
            n_updates = min(self.n_envs, gradient_steps - n_done)
            n_before = self._n_offline_updates
            try:
                train(gradient_steps=n_updates)
            finally:  # one that a fault or Ctrl-C ended counts in both
                self.num_timesteps += self._n_offline_updates - n_before
            n_done += n_updates
            self.pretrained, self._handed_over = True, False
            callback.update_locals(locals())
            continue_training = callback.on_step()
            if log_interval is not None:
                is_last = n_done == gradient_steps or not continue_training  # or they would appear among the online logs
                is_due = self._n_offline_updates % log_interval < n_updates or is_last
                # Not again what a callback has just logged
                if is_due and self.logger.name_to_value:
                    self.dump_logs()
            self._between_steps()

        if log_interval is None:  # what nobody logged is not for the online phase to log
            for values in (self.logger.name_to_value, self.logger.name_to_count, self.logger.name_to_excluded):
                for key in [key for key in values if key.startswith("offline/")]:
                    del values[key]
        callback.on_training_end()
        return continue_training

    # ------------------------------------------------------------------ the online phase

    def learn(
        self: SelfOfflineToOnline,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOfflineToOnline:
        """
        SB3's ``learn()``; ``tb_log_name`` is the name of the algorithm unless given. A model that was built with ``dataset``
        and ``offline_gradient_steps`` goes through its offline phase first, or through what is left of it, logged every 1000
        updates unless ``log_interval`` is ``None``; a callback that stops that phase stops here.

        :raises ValueError: if the model was trained with a dataset that is not attached
        """
        tb_log_name = tb_log_name or type(self).__name__
        self._prepare_dataset()
        with self._hooks(callback), watched_workers(self.env):
            interrupted, start = self._to_complete or (None, 0)
            offline_start = start if interrupted == "learn_offline" else self._n_offline_updates
            gradient_steps = self.offline_gradient_steps - offline_start
            is_due = self.dataset is not None and gradient_steps > 0 and not self._handed_over
            if is_due:
                train = partial(self.train_offline, batch_size=self.offline_batch_size)
                interval = None if log_interval is None else 1000
                if not self._learn_offline(
                    "learn_offline", train, gradient_steps, callback, interval, progress_bar, tb_log_name
                ):
                    return self
            if not self._handed_over:
                assert self.replay_buffer is not None
                if self.dataset is not None and not self.pretrained and self.replay_buffer.scheme == "balanced":
                    warnings.warn(
                        "Nothing was pretrained, as `offline_gradient_steps` is 0: the dataset only serves the replay. To "
                        "learn from it first, set that number or call `learn_offline()`"
                    )
                self._hand_over()
                self._handed_over, self._n_first_steps = True, 0
                # Straight after an offline phase the counter and the logger go on; a later reset goes back to its end
                reset_num_timesteps = reset_num_timesteps and self._n_offline_updates == 0
            if interrupted == "learn":
                n_done, reset_num_timesteps = self.num_timesteps - start, False
                if n_done >= total_timesteps:
                    warnings.warn(
                        f"Nothing to do in `learn({total_timesteps})`: the checkpoint that this model was loaded from was "
                        f"written after {n_done} steps of that call. Another call trains on"
                    )
                total_timesteps = max(total_timesteps - n_done, 0)
            else:
                start = self._n_offline_updates if reset_num_timesteps else self.num_timesteps
            self._call, self._to_complete = ("learn", start), None
            return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: Any,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        SB3's, but pretrained agents play from the first step on (SB3 would play random actions before ``learning_starts``),
        and with them or a dataset the first rollout ends at ``learning_starts`` environment steps (or the next multiple of
        ``n_envs``).

        :raises RuntimeError: if the worker of an environment died; its ``SubprocVecEnv`` is closed then
        """
        self._between_steps()
        if replay_buffer.n_online == 0:  # a model that was loaded without its rows begins with as many again
            self._n_first_steps = 0
        # A callback may have stopped the first rollout before
        missing = self.learning_starts - self._n_first_steps
        if missing > 0 and (self.pretrained or self.dataset is not None):
            train_freq = TrainFreq(math.ceil(missing / env.num_envs), TrainFrequencyUnit.STEP)
        self._in_rollout, self._env_seed = True, None
        try:
            rollout = super().collect_rollouts(
                env,
                callback,
                train_freq,
                replay_buffer,
                action_noise,
                learning_starts=0 if self.pretrained else learning_starts,
                log_interval=log_interval,
            )
        except (EOFError, ConnectionError) as error:
            dead_workers = close_dead_workers(env)
            if not dead_workers:
                raise
            self._last_obs, self._in_rollout = None, False
            self._between_steps()  # a signal that ended the workers, too, gets its checkpoint
            raise RuntimeError(
                f"The worker of environment {' and '.join(dead_workers)}. What it printed tells why. The model is as it was "
                "after the last complete step: it can be saved, and set_env() gives it new environments"
            ) from error
        finally:
            self._in_rollout = False
        # SB3's learn() trains once `num_timesteps > learning_starts`, strictly, and after a reset of the counter anew. With
        # something from before the online phase, what counts is that the first rollout is complete
        gradient_steps = self.gradient_steps if self.gradient_steps >= 0 else rollout.episode_timesteps
        sb3_waits = self.num_timesteps <= self.learning_starts
        is_due = (self.pretrained or self.dataset is not None) and self._n_first_steps >= self.learning_starts
        if sb3_waits and is_due and rollout.continue_training and gradient_steps > 0:
            self.train(gradient_steps, self.batch_size)
        return rollout

    def _on_step(self) -> None:
        self._n_first_steps += self.n_envs
        self._between_steps()

    def _online_gradient_steps(self, gradient_steps: int) -> int:
        """
        The paper trains ``first_update_multiplier`` times longer on the first online samples (section D.1), with an update for
        each of the ``learning_starts``.

        :param gradient_steps: number of updates that SB3 asks for
        :return: number of updates to do
        """
        if self.pretrained and self._n_updates == 0:
            return self.first_update_multiplier * (self.learning_starts or gradient_steps)
        return gradient_steps

    def _steps_shown(self, gradient_steps: int) -> Iterator[int]:
        """
        Count the updates of one call of ``train()``, each when it is done, so that an interrupted call is not made again. As
        there can be thousands between two environment steps, which SB3's progress bar counts, its description tells how far
        they are.

        :param gradient_steps: number of updates
        :return: their numbers, from 0
        """
        bars = []
        if gradient_steps > STEPS_PER_DISPLAY:
            callbacks = iterate_callbacks(self._callback)
            bars = [callback.pbar for callback in callbacks if isinstance(callback, ProgressBarCallback)]
        for gradient_step in range(gradient_steps):
            if gradient_step % STEPS_PER_DISPLAY == 0:
                for bar in bars:
                    bar.set_description(f"update {gradient_step:,} of {gradient_steps:,}")
            yield gradient_step
            self._n_updates += 1
        for bar in bars:
            bar.set_description(None)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
        reset_env: bool = True,
    ) -> tuple[int, BaseCallback]:
        self._sound_normalization = self._normalization()
        is_custom_logger = self._custom_logger
        if not is_custom_logger:
            self._setup_logger(reset_num_timesteps, tb_log_name)
        if not reset_env:
            self._last_obs = {}  # anything but None, which would make SB3 reset the environments
        elif (reset_num_timesteps or self._last_obs is None) and self._env_seed is not None and self.env is not None:
            self.env.seed(self._env_seed)  # once more, as a model that was loaded has been reset before
        try:
            self._custom_logger = True
            total_timesteps, callback = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps and reset_env, tb_log_name, progress_bar
            )
        finally:
            self._custom_logger = is_custom_logger
            if not reset_env:
                self._last_obs = None
        if not any(isinstance(output, TensorReader) for output in self.logger.output_formats):
            self.logger.output_formats.insert(0, TensorReader())
        if reset_num_timesteps:
            self.num_timesteps = self._num_timesteps_at_start = self._n_offline_updates
            self._total_timesteps = total_timesteps = total_timesteps + self._n_offline_updates
        self._callback = callback
        if self._session is not None:
            set_session(self, self._session, callback)
            self._session = None
        return total_timesteps, callback

    def _setup_logger(self, reset_num_timesteps: bool, tb_log_name: str) -> None:
        """
        SB3's logger. But a run that goes on, as the online phase does, stays in its own folder: SB3 would take the latest one
        of that name, and runs side by side that share ``tensorboard_log`` would write into each other's.
        """
        folder = self._session and self._session["log_folder"]
        if folder and self.tensorboard_log is not None and tb_log_name == self._tb_log_name:
            outputs = ["stdout", "tensorboard"] if self.verbose >= 1 else ["tensorboard"]
            self._logger = configure(os.path.join(self.tensorboard_log, Path(folder).name), outputs)
            return
        is_ours = self.tensorboard_log is not None and tb_log_name == self._tb_log_name and hasattr(self, "_logger")
        if reset_num_timesteps or not is_ours:
            is_new = reset_num_timesteps or hasattr(self, "_logger")
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, is_new)
        self._tb_log_name = tb_log_name

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # The schedules of the online phase run over the online steps
        super()._update_current_progress_remaining(
            num_timesteps - self._n_offline_updates, total_timesteps - self._n_offline_updates
        )
        # The first rollout can be longer than a short learn()
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def dump_logs(self) -> None:
        """SB3's, with the normalized score of the mean return where the dataset has reference scores."""
        has_scores = self.dataset is not None and None not in (self.dataset.ref_min_score, self.dataset.ref_max_score)
        if has_scores and self.ep_info_buffer and self.ep_info_buffer[0]:
            assert self.dataset is not None
            mean_return = safe_mean([ep_info["r"] for ep_info in self.ep_info_buffer])
            self.logger.record("rollout/normalized_score", self.dataset.normalized_score(mean_return))
        if self.n_skipped_steps > 0:
            self.logger.record("rollout/n_skipped_steps", self.n_skipped_steps)
        if self.n_skipped_updates > 0:
            self.logger.record("train/n_skipped_updates", self.n_skipped_updates)
        super().dump_logs()

    def _excluded_save_params(self) -> list[str]:
        not_saved = ["_callback", "_session", "_sound_normalization", "_checkpoint_folder"]
        return [*super()._excluded_save_params(), *self._dataset_params, *not_saved]


def default_policy(observation_space: spaces.Space) -> str:
    """
    :param observation_space: as it is for the user, images with channels first or last
    :return: name of the policy for it
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


def check_replay_arguments(replay_buffer_class: type[ReplayBuffer] | None, n_steps: int) -> type[BalancedReplayBuffer]:
    """
    :param replay_buffer_class: as given to the constructor
    :param n_steps: as given to the constructor
    :return: the class, ``BalancedReplayBuffer`` by default
    :raises ValueError: if the class cannot hold an offline part, or ``n_steps`` is not 1
    """
    replay_buffer_class = BalancedReplayBuffer if replay_buffer_class is None else replay_buffer_class
    if not issubclass(replay_buffer_class, BalancedReplayBuffer):
        raise ValueError(
            f"`replay_buffer_class={replay_buffer_class.__name__}` cannot hold an offline part: "
            "use BalancedReplayBuffer or a class derived from it"
        )
    if n_steps != 1:
        raise ValueError(
            f"`n_steps={n_steps}` is not supported, set it to 1: the replay with an offline part draws single transitions"
        )
    return replay_buffer_class


def check_action_space(env: GymEnv | str | None, verbose: int = 0) -> GymEnv | None:
    """
    SB3 states these requirements as assertions; a user's mistake deserves an error that says what to do.

    :param env: environment or its id
    :param verbose: see ``maybe_make_env``
    :return: the environment
    :raises ValueError: if its actions are not continuous and bounded
    """
    if env is None:
        return None
    env = maybe_make_env(env, verbose)
    action_space = env.action_space
    if not isinstance(action_space, spaces.Box):
        hint = ": use DQN or QR-DQN for those" if isinstance(action_space, spaces.Discrete) else ""
        raise ValueError(f"The actions of `env` must be continuous (a Box space), got {action_space}{hint}")
    if not np.all(np.isfinite([action_space.low, action_space.high])):
        raise ValueError(
            f"The action space of `env` must be bounded, got {action_space}: give it finite bounds, "
            "e.g. with `gymnasium.wrappers.TransformAction`"
        )
    return env
