"""What the next update of a model depends on, into a checkpoint and back: training goes on where it was interrupted."""

import os
import random
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TrainFreq

from sb3_off2on.checkpoint import encode, read_newest, write_checkpoint
from sb3_off2on.datasets import load_dataset

SelfResumable = TypeVar("SelfResumable", bound="Resumable")

_COUNTERS = (
    "num_timesteps",
    "_total_timesteps",
    "_current_progress_remaining",
    "_episode_num",
    "_n_updates",
    "_n_offline_updates",
    "_n_fqe_updates",
    "_n_first_steps",
    "pretrained",
    "_handed_over",
    "_call",
    "_tb_log_name",
)
# Not the algorithm's: they may differ in the run that goes on
_FREE_ARGUMENTS = ("verbose", "tensorboard_log", "seed", "stats_window_size", "action_noise")
# What SB3's callbacks count and gather
_CALLBACK_STATE = (
    "n_calls",
    "last_time_trigger",
    "no_improvement_evals",
    "last_best_mean_reward",
    "best_mean_reward",
    "last_mean_reward",
    "evaluations_timesteps",
    "evaluations_results",
    "evaluations_length",
    "evaluations_successes",
)


def iterate_callbacks(callback: Any) -> Iterator[BaseCallback]:
    """
    :param callback: what SB3 takes as ``callback``
    :return: it and all below it, always in the same order
    """
    if isinstance(callback, BaseCallback):
        yield callback
    children = [*callback] if isinstance(callback, list) else [*getattr(callback, "callbacks", [])]
    children += [getattr(callback, name, None) for name in ("callback", "callback_on_new_best")]
    for child in children:
        if child is not None:
            yield from iterate_callbacks(child)


def get_arguments(model: Any) -> dict[str, Any]:
    """
    :param model: an SB3 model, whose attributes have the names of its constructor's arguments
    :return: those arguments, but for what belongs to a machine or has its own place: environment, device, dataset
    """
    names: dict[str, None] = {}
    for base in type(model).__mro__:
        if "__init__" in vars(base):
            parameters = signature(vars(base)["__init__"]).parameters.values()
            names |= {p.name: None for p in parameters if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}
            if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
                break
    attributes = {"policy": "policy_class", "stats_window_size": "_stats_window_size"}
    arguments = {name: getattr(model, attributes.get(name, name), ...) for name in names}
    for name in ("self", "env", "device", "dataset", "_init_setup_model"):
        arguments.pop(name, None)
    if isinstance(train_freq := arguments.get("train_freq"), TrainFreq):
        arguments["train_freq"] = (train_freq.frequency, train_freq.unit.value)
    return arguments


def _encodable(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """:return: the arguments that a checkpoint can hold, and why it cannot hold the others"""
    held, others = {}, {}
    for name, value in arguments.items():
        try:
            encode(value, name, {}, {})
            held[name] = value
        except TypeError as error:
            others[name] = str(error)
    return held, others


def get_state(model: Any, env_seed: int) -> dict[str, Any]:
    """
    All that the next update depends on. Tensors and arrays are the model's own, not copies.

    :param model: an ``OfflineToOnline``
    :param env_seed: seed from which its environment starts the next episodes
    :return: what ``encode()`` takes
    """
    held, needed = _encodable(get_arguments(model))
    return {
        "algorithm": type(model).__name__,
        "spaces": [str(model.observation_space), str(model.action_space)],
        "n_envs": model.n_envs,
        "arguments": held,
        "needed": needed,
        "dataset": model.dataset_info,
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]},
        "counters": {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)},
        "ep_info_buffer": [_encodable(ep_info)[0] for ep_info in model.ep_info_buffer or []],
        "ep_success_buffer": [*(model.ep_success_buffer or [])],
        "replay": model.replay_buffer.get_state(),
        "env_seed": env_seed,
        "vec_normalize": _statistics(model),
        "random": _get_random_states(model),
        "session": _get_session(model),
    }


def check_state(model: Any, state: dict[str, Any], changed: Collection[str] = ()) -> None:
    """
    :param model: to be filled
    :param state: what is read
    :param changed: names of arguments that are meant to differ
    :raises ValueError: if the state is not one of this model, with what differs; nothing is done to the model
    """
    own, _ = _encodable(get_arguments(model))
    pairs = {
        "the algorithm": (state["algorithm"], type(model).__name__),
        "the observation space": (state["spaces"][0], str(model.observation_space)),
        "the action space": (state["spaces"][1], str(model.action_space)),
        "the number of environments": (state["n_envs"], model.n_envs),
        "the dataset's fingerprint": tuple(info and info["fingerprint"] for info in (state["dataset"], model.dataset_info)),
        "the statistics of VecNormalize": ([*state["vec_normalize"]], [*_statistics(model)]),
    }
    for name, value in own.items():
        # As with SB3's load(), `policy_kwargs` must be the same: optimizers take their settings from what is read
        if name in state["arguments"] and (name == "policy_kwargs" or name not in (*_FREE_ARGUMENTS, *changed)):
            pairs[f"`{name}`"] = tuple(encode(x, name, {}, {}) for x in (state["arguments"][name], value))
    for name, (expected, got) in pairs.items():
        if expected != got:
            raise ValueError(
                f"The checkpoint is of another model: {name} differs, {expected} there and {got} here. Make this model alike, "
                "choose another folder, or change arguments with `load_checkpoint(folder, env, name=value)`"
            )
    shapes = [
        {name: tensor.shape for name, tensor in parameters["policy"].items()}
        for parameters in (state["parameters"], model.get_parameters())
    ]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"The checkpoint is of another model: {names[0]!r} in its policy is another one, see `policy_kwargs`")


def set_state(model: Any, state: dict[str, Any], changed: Collection[str] = ()) -> None:
    """
    Fill a model that ``check_state()`` has passed, with its dataset attached.

    :param model: an ``OfflineToOnline``; its environment starts new episodes
    :param state: what was read
    :param changed: names of arguments that are meant to differ
    """
    replay = state["replay"]
    if "replay_buffer_kwargs" not in changed:  # `set_scheme()` may have changed it
        model.replay_buffer.set_scheme(replay["scheme"])
    model.replay_buffer.set_state(replay)
    if replay["priorities"] is None and model.dataset is not None:
        model._reset_priorities()
    model.set_parameters(state["parameters"])
    # Names are the model's own: a file that somebody made up sets nothing else
    for name in model._get_torch_save_params()[1]:
        if name in state["variables"]:  # not where a coefficient is learned that was fixed before
            # In place, because an optimizer holds the variable
            recursive_getattr(model, name).data = state["variables"][name].to(model.device)
    for name in _COUNTERS:
        if name in state["counters"]:
            setattr(model, name, state["counters"][name])
    for name in ("ep_info_buffer", "ep_success_buffer"):
        setattr(model, name, deque(state[name], maxlen=model._stats_window_size))
    for name, attributes in _statistics(model).items():
        attributes.update(state["vec_normalize"][name])
    model._start_episodes(state["env_seed"], update_statistics=False)
    model._session = state["session"]
    # Last, as all of the above may draw
    _set_random_states(model, state["random"])


def _statistics(model: Any) -> dict[str, dict[str, Any]]:
    """:return: the attributes of ``VecNormalize``'s running means by name, to read and to write; none without it"""
    env = model.get_vec_normalize_env()
    if env is None:
        return {}
    obs_rms = getattr(env, "obs_rms", {})
    parts = obs_rms if isinstance(obs_rms, dict) else {"": obs_rms}
    return {"rewards": vars(env.ret_rms), **{f"observations {key}".strip(): vars(part) for key, part in parts.items()}}


def _get_random_states(model: Any) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_available() else [],
        "action_space": model.action_space.np_random.bit_generator.state,
    }


def _set_random_states(model: Any, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(states["torch"])
    if th.cuda.is_available() and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all(states["cuda"])
    model.action_space.np_random.bit_generator.state = states["action_space"]


def _get_session(model: Any) -> dict[str, Any]:
    """:return: the state of what a call of ``learn()`` sets up around the model: logger and callbacks"""
    logger = getattr(model, "_logger", None)
    log = {}
    if logger is not None:
        names = logger.name_to_value
        log = {name: (names[name], logger.name_to_count.get(name, 0), logger.name_to_excluded[name]) for name in names}
    callbacks = [
        (type(callback).__name__, {name: vars(callback)[name] for name in _CALLBACK_STATE if name in vars(callback)})
        for callback in iterate_callbacks(model._callback)
    ]
    folder = None if logger is None or logger.dir is None else Path(logger.dir).name
    return {"log_folder": folder, "log": _encodable(log)[0], "callbacks": callbacks}


def set_session(model: Any, session: dict[str, Any], callback: BaseCallback) -> None:
    """
    :param model: whose logger and callbacks are set up
    :param session: what ``get_state()`` held of them
    :param callback: all of them; those that are of another kind than before stay as they are
    """
    for name, (value, count, excluded) in session["log"].items():
        model.logger.name_to_value[name] = value.to(model.device) if isinstance(value, th.Tensor) else value
        model.logger.name_to_count[name] = count
        model.logger.name_to_excluded[name] = excluded
    for child, (name, attributes) in zip(iterate_callbacks(callback), session["callbacks"], strict=False):
        if type(child).__name__ == name:
            vars(child).update({name: attributes[name] for name in _CALLBACK_STATE if name in attributes})


class Resumable(OffPolicyAlgorithm):
    """Mixin of ``OfflineToOnline``: checkpoints, and going on from them."""

    # The last call of learn() or learn_offline() and the counter at its start; and the one that a checkpoint interrupted
    _call: tuple[str, int] | None = None
    _to_complete: tuple[str, int] | None = None
    # What a checkpoint holds of the logger and the callbacks, until there are some
    _session: dict[str, Any] | None = None
    _callback: BaseCallback | None = None
    # Where checkpoints of this model are
    _checkpoint_folder: Path | None = None
    # The seed of the environment's last reset, as long as no step was taken since
    _env_seed: int | None = None
    _in_rollout: bool = False

    def set_dataset(self, dataset: Any) -> None:
        """See ``OfflineToOnline``."""
        raise NotImplementedError()

    def save_checkpoint(self, folder: str | os.PathLike[str], keep: int | None = None) -> Path:
        """
        Write all that the next update depends on, so that training can go on as if it had never stopped: exactly in the
        offline phase, and in the online phase between two rollouts where an episode has ended in every environment.

        There, the environments start their next episodes here and now from a seed that the checkpoint holds, as what their
        random numbers were before they reset themselves is not known. Anywhere else, episodes under way are lost to the
        run that goes on, which begins new ones.

        :param folder: gets a folder for this checkpoint, beside those written before
        :param keep: how many checkpoints to keep, this one among them; all by default
        :return: the folder of the checkpoint
        :raises OSError: if it cannot be written, with the name of the file; model and earlier checkpoints are as they were
        :raises ValueError: if ``keep`` is below 1
        """
        if keep is not None and keep < 1:
            raise ValueError(f"`keep` must be at least 1, or None for all, got {keep}")
        seed = self._env_seed
        if seed is None:
            # From NumPy's generator, which does not move on: checkpoints change no draw of the training
            generator = np.random.RandomState()
            generator.set_state(np.random.get_state())
            seed = (int(generator.randint(2**31 - 1)) + self.num_timesteps) % 2**31
            if self.env is not None and self._at_episode_start:
                try:
                    self._start_episodes(seed)
                except (EOFError, OSError):  # of workers that ended, as they do at a Ctrl-C
                    self._last_obs = None
        path = write_checkpoint(folder, get_state(self, seed), self.num_timesteps, keep)
        self._checkpoint_folder = path.parent.resolve()
        return path

    @classmethod
    def load_checkpoint(
        cls: type[SelfResumable],
        folder: str | os.PathLike[str],
        env: GymEnv | str,
        dataset: Any = None,
        device: th.device | str = "auto",
        **kwargs: Any,
    ) -> SelfResumable:
        """
        A model that goes on where ``save_checkpoint()`` was called. The first call of ``learn_offline()`` or ``learn()``
        completes the interrupted one: its number of steps is the total, of which those done before are a part. After that,
        calls are what they always are.

        Python's, NumPy's and PyTorch's random numbers go on from the checkpoint's, too.

        :param folder: where checkpoints were written: the newest that is not damaged is taken; or one of them
        :param env: the environment to learn from, made and wrapped as before
        :param dataset: the dataset the model was trained with; not needed where it was loaded by an id or from a file
        :param device: where to put the model
        :param kwargs: arguments of the constructor which are to be others than before, or which a checkpoint cannot hold
            (functions and classes of your own)
        :return: the model
        :raises ValueError: if there is no checkpoint, none that is not damaged, one of another algorithm or environment, or
            an argument is missing
        """
        newest = read_newest(folder)
        if newest is None:
            raise ValueError(
                f"There is no checkpoint in {str(folder)!r}: start a new model, or name the folder that holds some"
            )
        path, state = newest
        if state["algorithm"] != cls.__name__:
            raise ValueError(f"{path} is a checkpoint of {state['algorithm']}: use `{state['algorithm']}.load_checkpoint`")
        missing = {name: reason for name, reason in state["needed"].items() if name not in kwargs}
        if missing:
            raise ValueError(
                f"{path} does not hold these arguments, which only a pickle could: {missing}. "
                f"Pass them: `load_checkpoint(folder, env, {', '.join(f'{name}=...' for name in missing)})`"
            )
        model = cls(env=env, device=device, **{**state["arguments"], **kwargs})
        info = state["dataset"]
        if info is not None:
            try:
                dataset = load_dataset(info["source"] if dataset is None else dataset)
            except ValueError as error:
                raise ValueError(f"{path} was trained with the dataset {info}: pass `dataset=...`. {error}") from error
            model.set_dataset(dataset)
        model._restore(path, state, kwargs)
        return model

    def resume(self: SelfResumable, folder: str | os.PathLike[str]) -> bool:
        """
        Bring a new model, with its dataset attached, to where the newest checkpoint is, see ``load_checkpoint()``.

        :param folder: where checkpoints are written
        :return: whether there was one
        :raises ValueError: if all are damaged, or the newest is one of another model; nothing changes then
        """
        newest = read_newest(folder)
        if newest is not None:
            self._restore(*newest)
        return newest is not None

    def _restore(self, path: Path, state: dict[str, Any], changed: Any = ()) -> None:
        try:
            check_state(self, state, changed)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        set_state(self, state, changed)
        self._to_complete = self._call
        self._checkpoint_folder = path.parent.resolve()

    @property
    def _at_episode_start(self) -> bool:
        """Whether no episode would be cut if all environments were reset now."""
        return self._last_obs is None or (not self._in_rollout and bool(np.all(self._last_episode_starts)))

    def _start_episodes(self, seed: int, update_statistics: bool = True) -> None:
        """
        Reset the environments.

        :param seed: determines their episodes from here on
        :param update_statistics: whether the first observations are new to ``VecNormalize``
        """
        assert self.env is not None
        normalize = self._vec_normalize_env
        was_training = normalize is not None and normalize.training
        if normalize is not None:
            normalize.training = was_training and update_statistics
        self.env.seed(seed)
        self._env_seed = seed
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)
        if normalize is not None:
            normalize.training = was_training
            self._last_original_obs = normalize.get_original_obs()

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        self._env_seed = seed

    @contextmanager
    def _hooks(self, callback: MaybeCallback) -> Iterator[None]:
        """Tell callbacks that ask for it when a call begins, before anything is set up, and when it ends, by an error too."""
        hooks: list[Any] = [child for child in iterate_callbacks(callback) if hasattr(child, "on_call_start")]
        try:
            for child in hooks:
                child.on_call_start(self)
            yield
        finally:
            for child in hooks:
                child.on_call_end()

    def _between_steps(self) -> None:
        """Tell callbacks that ask for it that everything about the last update or environment step is stored."""
        for child in iterate_callbacks(self._callback):
            if hasattr(child, "on_between_steps"):
                child.on_between_steps()
