"""
The paper's three manipulation tasks: importing this package registers them with Gymnasium.

MuJoCo is imported when one of them is made, not before.
"""

from typing import Any

import gymnasium as gym

# The name in datasets: the name in Gymnasium, the class in tabletop.py, its arguments, and the steps of an episode
TASKS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "pick-place": ("Off2OnPickPlace", "PickPlaceEnv", {}, 40),
    "closed-drawer": ("Off2OnClosedDrawer", "DrawerEnv", {}, 50),
    "blocked-drawer": ("Off2OnBlockedDrawer", "DrawerEnv", {"blocked": True}, 80),
}
ID_SUFFIXES = {"image": "", "dict": "-Dict", "state": "-State"}


def env_id(task: str, observation: str = "image") -> str:
    """
    The id of a task in Gymnasium, e.g. ``Off2OnPickPlace-State-v0``.

    :param task: a key of ``TASKS``
    :param observation: a key of ``ID_SUFFIXES``
    :raises ValueError: if one of them is unknown
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if observation not in ID_SUFFIXES:
        raise ValueError(f"observation must be one of {', '.join(ID_SUFFIXES)}, got {observation!r}.")
    return f"{TASKS[task][0]}{ID_SUFFIXES[observation]}-v0"


for _task, (_, _class, _kwargs, _steps) in TASKS.items():
    for _observation in ID_SUFFIXES:
        gym.register(
            env_id(_task, _observation),
            entry_point=f"sb3_off2on.envs.tabletop:{_class}",
            max_episode_steps=_steps,
            kwargs={"observation": _observation, **_kwargs},
        )
