"""
Updates of other implementations, for ``benchmark.py`` to time: d3rlpy where it is installed, and checkouts of CORL
(tinkoff-ai/CORL) and of the authors' code (shlee94/Off2OnRL). Their code is imported and called, with networks of 2 x 256.

Each function raises ``ImportError`` where the other implementation is not at hand.
"""

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import torch as th

from sb3_off2on import OfflineDataset

Update = Callable[[], Any]


def find_checkout(folder: Path | None, owner: str, name: str) -> Path:
    """
    :param folder: where checkouts are, as ``name`` or ``owner+name``
    :param owner: owner of the repository
    :param name: name of the repository
    :return: the checkout's folder
    :raises ImportError: if there is none
    """
    if folder is None:
        raise ImportError(f"needs --peers DIR with a checkout of {owner}/{name}")
    for path in (folder / name, folder / f"{owner}+{name}"):
        if path.is_dir():
            return path
    raise ImportError(f"no checkout {name} in {folder}")


def stub(*names: str) -> None:
    """
    Stand in for packages that a checkout imports at its top but that an update never calls: simulators, loggers, timers.

    :param names: names of modules; those that are installed stay as they are
    """
    packages = {name.partition(".")[0] for name in names} - set(sys.modules)
    missing = {package for package in packages if importlib.util.find_spec(package) is None}
    sys.modules.update({name: MagicMock() for name in names if name.partition(".")[0] in missing})
    if importlib.util.find_spec("gym") is None:  # Gymnasium is near enough
        sys.modules.update({"gym": gymnasium, "gym.spaces": gymnasium.spaces})


def import_file(name: str, path: Path) -> ModuleType:
    """
    :param name: of the module
    :param path: the file
    :return: the module
    :raises ImportError: if the file is not there
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"{path} does not exist")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def d3rlpy_update(dataset: OfflineDataset, batch_size: int) -> Update:
    """
    d3rlpy's CQL, with its default networks and 10 sampled actions; the weight of the conservative term is fixed, as ours is.

    :param dataset: what the batches are from
    :param batch_size: rows per update
    :return: does one update, on batches that were drawn before: drawing them, row by row, would take long as well
    :raises ImportError: if d3rlpy is not installed
    """
    try:
        d3rlpy: Any = importlib.import_module("d3rlpy")
    except ImportError as error:
        raise ImportError("d3rlpy is not installed") from error
    with redirect_stdout(StringIO()):  # what it infers about the data
        columns = ("observations", "actions", "rewards", "terminations", "truncations")
        replay_buffer = d3rlpy.dataset.MDPDataset(*(getattr(dataset, name) for name in columns))
        config = d3rlpy.algos.CQLConfig(batch_size=batch_size, n_action_samples=10, alpha_learning_rate=0.0)
        agent = config.create("cpu:0")
        agent.build_with_dataset(replay_buffer)
    batches = itertools.cycle([replay_buffer.sample_transition_batch(batch_size) for _ in range(16)])
    return lambda: agent.update(next(batches))


def corl_update(folder: Path | None, dataset: OfflineDataset, batch_size: int) -> Update:
    """
    CORL's CQL with its own defaults, but for the networks: critics and actor have two hidden layers here, three there.

    :param folder: where checkouts are
    :param dataset: what to sample from
    :param batch_size: rows per update
    :return: samples and does one update
    :raises ImportError: if there is no checkout
    """
    path = find_checkout(folder, "tinkoff-ai", "CORL") / "algorithms" / "offline" / "cql.py"
    stub("d4rl", "pyrallis", "wandb")
    cql = import_file("corl_cql", path)
    obs_dim, action_dim = dataset.frames.shape[1], dataset.actions.shape[1]  # type: ignore[union-attr]
    actor = cql.TanhGaussianPolicy(obs_dim, action_dim, max_action=1.0, orthogonal_init=True)
    # Its depth is fixed: without the third of the hidden layers, which are followed by a ReLU each
    actor.base_network = th.nn.Sequential(*actor.base_network[:4], actor.base_network[-1])
    critics = [cql.FullyConnectedQFunction(obs_dim, action_dim, True, n_hidden_layers=2) for _ in range(2)]
    actor_optimizer, *critic_optimizers = (th.optim.Adam(x.parameters(), 3e-4) for x in (actor, *critics))
    trainer = cql.ContinuousCQL(
        *(part for pair in zip(critics, critic_optimizers, strict=True) for part in pair),
        actor,
        actor_optimizer,
        target_entropy=-action_dim,
        bc_steps=0,
        cql_n_actions=10,
    )
    replay_buffer = cql.ReplayBuffer(obs_dim, action_dim, len(dataset))
    columns = {name: getattr(dataset, name) for name in ("observations", "actions", "rewards", "next_observations")}
    with redirect_stdout(StringIO()):
        replay_buffer.load_d4rl_dataset({**columns, "terminals": dataset.terminations})
    return lambda: trainer.train(replay_buffer.sample(batch_size))


def import_authors(folder: Path | None) -> Path:
    """
    Make the authors' ``rlkit`` importable.

    :param folder: where checkouts are
    :return: the folder that holds it
    :raises ImportError: if there is no checkout
    """
    path = find_checkout(folder, "shlee94", "Off2OnRL") / "rlkit"
    stub("d4rl", "gtimer", "torchvision", "torchvision.models")
    if str(path) not in sys.path:
        sys.path.append(str(path))
    # NumPy has dropped an alias that their code needs
    vars(np).setdefault("int", int)
    return path


def authors_update(folder: Path | None, dataset: OfflineDataset, ensemble_size: int, batch_size: int) -> Update:
    """
    One update of the authors' fine-tuning, with the sampling that their loop does for it.

    :param folder: where checkouts are
    :param dataset: what to fill their three buffers with
    :param ensemble_size: number of members
    :param batch_size: rows per update
    :return: samples and does one update
    :raises ImportError: if there is no checkout
    """
    path = import_authors(folder)
    with redirect_stdout(StringIO()):  # about packages that are not there
        networks = import_file("authors_fine_tuning", path / "examples" / "ours.py")
    obs_dim, action_dim, hidden = dataset.frames.shape[1], dataset.actions.shape[1], 256  # type: ignore[union-attr]
    gym = sys.modules["gym"]
    env = SimpleNamespace(
        observation_space=gym.spaces.Box(-np.inf, np.inf, (obs_dim,)), action_space=gym.spaces.Box(-1.0, 1.0, (action_dim,))
    )
    n = len(dataset)
    prioritized = networks.PriorityReplayBuffer(2 ** (n - 1).bit_length(), env)
    offline, online = networks.EnvReplayBuffer(n, env), networks.EnvReplayBuffer(n, env)
    columns = (dataset.observations, dataset.actions, dataset.rewards, dataset.terminations, dataset.next_observations)
    for row in zip(*columns, strict=True):
        for replay_buffer in (prioritized, offline, online):
            replay_buffer.add_sample(*row, env_info={})
    critics = [networks.ParallelMlp(obs_dim + action_dim, hidden, 2, 1, ensemble_size) for _ in range(4)]
    actors = [networks.TanhGaussianPolicy([hidden, hidden], obs_dim, action_dim) for _ in range(ensemble_size)]
    trainer = networks.OursTrainer(
        env,
        networks.ParallelTanhGaussianPolicy(actors),
        *critics,
        networks.ConcatMlp([hidden, hidden], 1, obs_dim + action_dim),
        prioritized,
        n,
        ensemble_size=ensemble_size,
    )

    def update() -> None:
        batch = {}
        for prefix, replay_buffer in (("online", online), ("offline", offline), ("rl", prioritized)):
            sampled = replay_buffer.random_batch(batch_size)
            batch.update({f"{prefix}_{name}": value for name, value in sampled.items()})
        batch["tree_idxs"] = batch.pop("rl_tree_idxs")
        trainer.train(batch)

    return update


def authors_draw(folder: Path | None, priorities: np.ndarray, n_draws: int) -> Update:
    """
    The authors' sum-tree.

    :param folder: where checkouts are
    :param priorities: of its leaves
    :param n_draws: number of leaves to draw
    :return: draws leaves by priority
    :raises ImportError: if there is no checkout
    """
    import_authors(folder)
    module: Any = importlib.import_module("rlkit.data_management.prioritized_replay_buffer")
    tree = module.SegmentTree(len(priorities), 1, 1)
    tree.update(np.arange(len(priorities)) + tree.tree_start, priorities)
    return lambda: tree.find(tree.total() / n_draws * (np.arange(n_draws) + np.random.random_sample(n_draws)))
