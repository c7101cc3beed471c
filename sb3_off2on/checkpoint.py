"""
Checkpoints from which training goes on as if it had never stopped. One is a folder of tensors (safetensors), arrays (npy) and
metadata (JSON): reading it never unpickles. It is complete or not there at all, and checksums tell what was damaged since.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch as th
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import TrainFreq
from torch import nn

FORMAT = 1
_NAME = re.compile(r"\d{6,}_\d+_steps")
# Classes are looked up in what is imported already, and there only in these packages
_PACKAGES = ("torch.nn", "torch.optim", "stable_baselines3", "sb3_off2on")
_BASES = (nn.Module, th.optim.Optimizer, ReplayBuffer)
# Objects that are nothing but their attributes
_OBJECTS = {
    "stable_baselines3.common.utils.FloatSchedule",
    "stable_baselines3.common.utils.ConstantSchedule",
    "stable_baselines3.common.utils.LinearSchedule",
    "stable_baselines3.common.noise.NormalActionNoise",
    "stable_baselines3.common.noise.OrnsteinUhlenbeckActionNoise",
    "stable_baselines3.common.noise.VectorizedActionNoise",
    "sb3_off2on.callbacks.ScaledSchedule",
    "rl_zoo3.utils.SimpleLinearSchedule",
}
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

# ---------------------------------------------------------------------- nested values <-> JSON, tensors and arrays


def encode(value: Any, path: str, tensors: dict[str, th.Tensor], arrays: dict[str, np.ndarray]) -> Any:
    """
    :param value: numbers, texts, tensors, arrays, known classes and objects; or lists, tuples and dicts of such
    :param path: where it is, for names and messages
    :param tensors: gets copies of the tensors, on the CPU
    :param arrays: gets the arrays themselves
    :return: the same for JSON, with names in the place of tensors and arrays
    :raises TypeError: if it holds something else, which only a pickle could
    """

    def inner(part: Any, key: Any) -> Any:
        return encode(part, f"{path}.{key}", tensors, arrays)

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, th.Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": path}
    if isinstance(value, th.device):
        return str(value)
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 and value.dtype.kind in "biuf":
        return {"__number__": value.item(), "dtype": value.dtype.str}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        name = f"{len(arrays):03d}_{re.sub(r'[^A-Za-z0-9_.]', '_', path)}.npy"
        arrays[name] = value
        return {"__array__": name}
    if isinstance(value, list):
        return [inner(part, index) for index, part in enumerate(value)]
    if type(value) is tuple:
        return {"__tuple__": [inner(part, index) for index, part in enumerate(value)]}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("__") for key in value):
            return {key: inner(part, key) for key, part in value.items()}
        return {"__items__": [[inner(key, "key"), inner(part, key)] for key, part in value.items()]}
    if isinstance(value, type) and issubclass(value, np.number):
        return {"__dtype__": np.dtype(value).str}
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type) and _find_class(name) is value:
        return {"__class__": name}
    if name in _OBJECTS:
        return {"__object__": name, "attributes": inner(vars(value), name)}
    raise TypeError(f"{value!r}")


def decode(value: Any, tensors: dict[str, th.Tensor], read_array: Callable[[str], np.ndarray]) -> Any:
    """
    The inverse of ``encode()``.

    :param value: from JSON
    :param tensors: by name
    :param read_array: gives the array of a name
    :return: what was encoded; arrays without dimensions come back as NumPy numbers
    :raises ValueError: if it names a class that is not known
    """

    def inner(part: Any) -> Any:
        return decode(part, tensors, read_array)

    match value:
        case list():
            return [inner(part) for part in value]
        case {"__tensor__": name}:
            return tensors[name]
        case {"__array__": name}:
            return read_array(name)
        case {"__number__": number, "dtype": dtype}:
            return np.dtype(dtype).type(number)
        case {"__dtype__": name}:
            return np.dtype(name).type
        case {"__tuple__": parts}:
            return tuple(inner(parts))
        case {"__items__": items}:
            return {inner(key): inner(part) for key, part in items}
        case {"__class__": name} | {"__object__": name}:
            found = _find_class(name)
            if found is None:
                raise ValueError(f"The class {name!r} is not one that a checkpoint may name")
            if "__class__" in value:
                return found
            instance = found.__new__(found)
            instance.__dict__.update(inner(value["attributes"]))
            return instance
        case dict():
            return {key: inner(part) for key, part in value.items()}
    return value


def _find_class(name: str) -> Any:
    """:return: the class, if it is one that a checkpoint may name; nothing is imported because a file says so"""
    module, _, short_name = name.rpartition(".")
    if name in _OBJECTS:
        return getattr(import_module(module), short_name)
    found = getattr(sys.modules.get(module), short_name, None)
    is_ours = any(module == package or module.startswith(f"{package}.") for package in _PACKAGES)
    return found if is_ours and isinstance(found, type) and issubclass(found, _BASES) else None


# ---------------------------------------------------------------------- folders


class _HashedFile:
    """A file that is only written, with the checksum and the size of what went in."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def _write_file(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """:return: size and checksum of the file, which is on the disk"""
    try:
        with open(path, "xb") as file:
            hashed = _HashedFile(file)
            write(hashed)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # which knows its file only where opening failed
        raise OSError(error.errno, f"{error.strerror or error}: no checkpoint was written", str(path)) from error
    return {"size": hashed.size, "sha256": hashed.digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where a system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """
    :param folder: where checkpoints were written
    :return: the complete ones, newest first
    """
    found = [path for path in Path(folder).glob("*_steps") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[0]), reverse=True)


def write_checkpoint(folder: str | os.PathLike[str], state: dict[str, Any], n_steps: int, keep: int | None) -> Path:
    """
    Write beside, then rename: a checkpoint that can be seen is complete, whatever happens in between.

    :param folder: made if it is not there; one run writes into it at a time
    :param state: what ``encode()`` takes
    :param n_steps: for the name
    :param keep: number of checkpoints to keep, this one among them, ``None`` for all; older ones go once this one is complete
    :return: the folder of the checkpoint
    :raises OSError: if it cannot be written, with the name of the file; earlier checkpoints are as they were
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    number = max([int(path.name.split("_")[0]) for path in find_checkpoints(folder)], default=0) + 1
    checkpoint = folder / f"{number:06d}_{n_steps}_steps"
    for leftover in folder.glob(".*_steps.partial"):  # of a run that was killed
        shutil.rmtree(leftover)
    unfinished = folder / f".{checkpoint.name}.partial"
    unfinished.mkdir()
    try:
        tensors: dict[str, th.Tensor] = {}
        arrays: dict[str, np.ndarray] = {}
        text = json.dumps(encode(state, "state", tensors, arrays)).encode()
        files = {"state.json": _write_file(unfinished / "state.json", lambda file: file.write(text))}
        data = save_tensors(tensors)
        files["tensors.safetensors"] = _write_file(unfinished / "tensors.safetensors", lambda file: file.write(data))
        for name, array in arrays.items():
            files[name] = _write_file(unfinished / name, partial(np.save, arr=array, allow_pickle=False))
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1).encode()
        _write_file(unfinished / "manifest.json", lambda file: file.write(manifest))
        _sync_folder(unfinished)
        unfinished.rename(checkpoint)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(folder)
    for old in find_checkpoints(folder)[keep:] if keep is not None else []:
        # Renamed first, as removing takes a while
        shutil.rmtree(old.rename(folder / f".{old.name}.partial"), ignore_errors=True)
    return checkpoint


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """
    :param checkpoint: one of ``find_checkpoints()``
    :return: what was written
    :raises ValueError: if a file is missing, damaged or not to be trusted, with its name
    """
    for name, (size, checksum) in _read(checkpoint / "manifest.json", _parse_manifest).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is damaged")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: the checkpoint is damaged")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                raise ValueError(f"{path} does not have the checksum that it was written with: the checkpoint is damaged")

    def read_array(name: str) -> np.ndarray:
        path = checkpoint / Path(name).name
        try:
            with open(path, "rb") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    # Copies, because the file is one block of memory, in which most tensors begin at odd places
    tensors = _read(checkpoint / "tensors.safetensors", load_tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return _read(checkpoint / "state.json", lambda text: decode(json.loads(text), tensors, read_array))


def _parse_manifest(text: bytes) -> dict[str, tuple[int, str]]:
    manifest = json.loads(text)
    if manifest["format"] != FORMAT:
        raise ValueError(f"it is of format {manifest['format']}, this version reads {FORMAT}")
    return {Path(name).name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_newest(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """
    :param folder: where checkpoints were written, or one of them
    :return: the newest checkpoint that is not damaged and what is in it, with a warning about each newer one; ``None`` if
        there is no checkpoint
    :raises ValueError: if all are damaged, with what is wrong with the newest
    """
    folder = Path(folder)
    if _NAME.fullmatch(folder.resolve().name):
        return folder, read_checkpoint(folder)
    damages = []
    for checkpoint in find_checkpoints(folder):
        try:
            state = read_checkpoint(checkpoint)
        except ValueError as error:
            damages.append(error)
            continue
        for damage in damages:
            warnings.warn(f"Going back to {checkpoint}: {damage}")
        return checkpoint, state
    if damages:
        raise damages[0]
    return None


# ---------------------------------------------------------------------- the state of a model


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


def _optional_variables(model: Any) -> dict[str, th.Tensor]:
    return {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}


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
        if name in state["arguments"] and name not in (*_FREE_ARGUMENTS, *changed):
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


def set_state(model: Any, state: dict[str, Any]) -> None:
    """
    Fill a model that ``check_state()`` has passed, with its dataset attached.

    :param model: an ``OfflineToOnline``; its environment starts new episodes
    :param state: what was read
    """
    model.replay_buffer.set_state(state["replay"])
    model.set_parameters(state["parameters"])
    for name, value in state["variables"].items():
        # In place, because an optimizer holds the variable
        recursive_getattr(model, name).data = value.to(model.device)
    for name, value in state["counters"].items():
        setattr(model, name, value)
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
            vars(child).update(attributes)
