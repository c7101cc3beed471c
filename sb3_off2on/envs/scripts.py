"""
Scripted policies, whose attempts make up the datasets.

A script is a generator of actions, shape ``(8,)``. It looks at the environment itself, not at observations, and ends with its
attempt, successful or not. Noise on the actions is added by :func:`sb3_off2on.envs.make_dataset.run_episode`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sb3_off2on.envs.tabletop import MOVE, TURN, DrawerEnv, PickPlaceEnv, TabletopEnv

Actions = Iterator[np.ndarray]
Script = Callable[[Any, np.random.Generator], Actions]

_GAIN = 0.9  # part of the way to a target that one action asks for
_ABOVE = 0.19  # height at which the hand passes over everything, metres


def hold(env: TabletopEnv, rng: np.random.Generator) -> Actions:
    """Stay, without end."""
    while True:
        yield _action(env)


def grasp(env: TabletopEnv, rng: np.random.Generator) -> Actions:
    """Grasp the object somewhere near its middle, and lift it where that holds."""
    yield from _grasp(env, rng, "object", spread=0.012)


def place(env: PickPlaceEnv, rng: np.random.Generator) -> Actions:
    """Drop what is in the hand into the tray, and stay."""
    yield from _drop(env, rng, env.position("tray"))
    yield from hold(env, rng)


def pick_and_place(env: PickPlaceEnv, rng: np.random.Generator) -> Actions:
    """The whole pick-place task."""
    yield from _grasp(env, rng, "object", spread=0.003)
    yield from place(env, rng)


def open_drawer(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Pull the bottom drawer open."""
    yield from _go(env, lambda: env.handle_position)
    for _ in range(15):
        if env.opening("bottom_drawer") > 0.92:
            break
        yield _action(env, [0.8, *_towards(env, env.handle_position)[1:]])
    yield from _lift(env)


def close_drawer(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Push the bottom drawer shut, from the open start."""
    yield from _push(env, "bottom_drawer", env.handle_position, [0.055, 0.0, 0.005])


def close_top(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Push the top drawer shut."""
    yield from _push(env, "top_drawer", env.position("top_drawer"), [0.11, 0.0, 0.025])


def move_distractor(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Take the cylinder, which has no part in the task, somewhere else."""
    yield from _grasp(env, rng, "distractor", spread=0.006)
    yield from _drop(env, rng, np.append(rng.uniform([0.0, -0.14], [0.18, 0.12]), 0.0))


def close_top_and_open(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Push the top drawer shut, then pull the bottom drawer open."""
    yield from close_top(env, rng)
    yield from open_drawer(env, rng)


def grasp_and_hold(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """Grasp the ball from the open drawer and keep it."""
    yield from grasp(env, rng)
    yield from hold(env, rng)


def open_and_grasp(env: DrawerEnv, rng: np.random.Generator) -> Actions:
    """The whole drawer task, from the closed or the blocked start."""
    if env.blocked:
        yield from close_top(env, rng)
    yield from open_drawer(env, rng)
    yield from _grasp(env, rng, "object", spread=0.003)
    yield from hold(env, rng)


def _action(env: TabletopEnv, move: Any = (0.0, 0.0, 0.0), grip: float = 0.0, neutral: float = 0.0) -> np.ndarray:
    """An action that also turns the hand upright again."""
    return np.concatenate([move, -_GAIN / TURN * env.hand_angles, [grip, neutral]])


def _towards(env: TabletopEnv, target: np.ndarray) -> np.ndarray:
    return _GAIN / MOVE * (target - env.hand_position)


def _go(env: TabletopEnv, target: Callable[[], np.ndarray], tolerance: float = 0.012) -> Actions:
    """Go above ``target()`` and then down to it. Gives up after 20 steps."""
    for _ in range(20):
        offset = target() - env.hand_position
        if np.linalg.norm(offset) < tolerance:
            return
        if np.linalg.norm(offset[:2]) > 0.02:
            offset[2] = _ABOVE - env.hand_position[2]
        yield _action(env, _GAIN / MOVE * offset)


def _lift(env: TabletopEnv) -> Actions:
    """Straight up, then back to the first pose."""
    while env.hand_position[2] < 0.15:
        yield _action(env, [0.0, 0.0, 0.8])
    yield _action(env, neutral=0.8)


def _grasp(env: TabletopEnv, rng: np.random.Generator, body: str, spread: float) -> Actions:
    beside = np.append(rng.normal(0.0, spread, 2), 0.0)
    yield from _go(env, lambda: env.position(body) + beside)
    yield _action(env, _towards(env, env.position(body) + beside), grip=-0.8)
    yield from _lift(env)


def _drop(env: TabletopEnv, rng: np.random.Generator, place: np.ndarray) -> Actions:
    target = place + np.append(rng.normal(0.0, 0.008, 2), 0.1)
    yield from _go(env, lambda: target, tolerance=0.02)
    yield _action(env, grip=0.8)


def _push(env: DrawerEnv, drawer: str, position: np.ndarray, before: Any) -> Actions:
    """Go to the offset ``before`` from a position on a drawer, and push it shut from there."""
    front = position + np.array(before)
    yield from _go(env, lambda: front, tolerance=0.02)
    for _ in range(15):
        if env.opening(drawer) < 0.04:
            break
        yield _action(env, [-0.8, *_towards(env, front)[1:]])
    yield _action(env, [0.6, 0.0, 0.3])
    yield from _lift(env)


# The scripted half of each dataset, as (script, start of the episode). Prior data: attempts at parts of the task and at other
# things, with rewards of zero. Task data: attempts at the task's last part, with rewards
PRIOR: dict[str, tuple[tuple[Script, str], ...]] = {
    "pick-place": ((grasp, "task"),),
    "closed-drawer": ((open_drawer, "task"), (close_drawer, "open"), (move_distractor, "task")),
    "blocked-drawer": ((close_top_and_open, "task"), (close_top, "task"), (close_drawer, "open"), (move_distractor, "task")),
}
TASK: dict[str, tuple[Script, str]] = {
    "pick-place": (place, "grasped"),
    "closed-drawer": (grasp_and_hold, "open"),
    "blocked-drawer": (grasp_and_hold, "open"),
}
# The whole task, for comparison: in no dataset
ORACLE: dict[str, Script] = {
    "pick-place": pick_and_place,
    "closed-drawer": open_and_grasp,
    "blocked-drawer": open_and_grasp,
}
