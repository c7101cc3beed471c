"""
Checkpoints from which training goes on as if it had never stopped. One is a folder of tensors (safetensors), arrays (npy) and
metadata (JSON): reading it never unpickles. It is complete or not there at all, and checksums tell what was damaged since.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch as th
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.buffers import ReplayBuffer
from torch import nn

FORMAT = 1
_NAME = re.compile(r"\d{6,}_\d+_steps")
# Classes are looked up in what is imported already, and there only in these packages
_PACKAGES = ("torch.nn", "torch.optim", "stable_baselines3", "sb3_off2on")
_BASES = (nn.Module, th.optim.Optimizer, ReplayBuffer)
# Objects that are nothing but their attributes. Their modules are imported where they are not yet, as the list is ours
_OBJECTS = {
    "stable_baselines3.common.utils.FloatSchedule",
    "stable_baselines3.common.utils.ConstantSchedule",
    "stable_baselines3.common.utils.LinearSchedule",
    "stable_baselines3.common.noise.NormalActionNoise",
    "stable_baselines3.common.noise.OrnsteinUhlenbeckActionNoise",
    "stable_baselines3.common.noise.VectorizedActionNoise",
    "sb3_off2on.schedules.ScaledSchedule",
    "rl_zoo3.utils.SimpleLinearSchedule",
}
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
    :raises ModuleNotFoundError: if it names an object of a package that is not installed
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
            if found is None or ("__object__" in value and name not in _OBJECTS):
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
    """
    :return: the class, if it is one that a checkpoint may name
    :raises ModuleNotFoundError: if it is of a package that is not installed
    """
    module, _, short_name = name.rpartition(".")
    if name in _OBJECTS:
        try:
            return getattr(import_module(module), short_name)
        except ModuleNotFoundError as error:
            message = f"The checkpoint holds a {short_name}, which needs {error.name}: install it"
            raise ModuleNotFoundError(message, name=error.name) from error
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
        shutil.rmtree(leftover, ignore_errors=True)
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
    :raises ModuleNotFoundError: if it holds an object of a package that is not installed
    """
    for name, (size, checksum) in _read(checkpoint / "manifest.json", _parse_manifest).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint is damaged")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}: the checkpoint is damaged")
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if digest != checksum:
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
    except (MemoryError, ImportError):  # not the checkpoint's fault: an older one would only lose what is in this one
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_newest(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """
    :param folder: where checkpoints were written, or one of them
    :return: the newest checkpoint that is not damaged and what is in it, with a warning about each newer one; ``None`` if
        there is no checkpoint
    :raises ValueError: if all are damaged, with what is wrong with the newest
    :raises ModuleNotFoundError: if the newest that is not damaged holds an object of a package that is not installed
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
