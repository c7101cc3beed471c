"""The environments and their datasets. Pictures are tested where OpenGL is there; everything else needs none."""

import sys
from argparse import ArgumentParser
from functools import cache
from importlib import import_module
from subprocess import run
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import minari  # type: ignore[import-untyped]
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env as check_gymnasium
from minari.storage import get_dataset_path  # type: ignore[import-untyped]
from rl_zoo3.utils import EnvironmentName
from stable_baselines3.common.env_checker import check_env as check_sb3

from sb3_off2on import load_dataset
from sb3_off2on.envs import ID_SUFFIXES, TASKS, env_id, make_dataset, rendering, scripts
from sb3_off2on.envs.make_dataset import random_rows, run_episode
from sb3_off2on.envs.rendering import Camera
from sb3_off2on.envs.tabletop import HIGHEST, HOME, LOWEST, MAX_ANGLES, OPEN, PickPlaceEnv, TabletopEnv

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
MOVES = np.eye(8, dtype=np.float32)  # MOVES[i] is 1 in the i-th number of an action


@cache
def gl_error() -> str:
    """Why OpenGL does not start here; empty where it does."""
    try:
        gym.make(env_id("pick-place")).reset()
    except DependencyNotInstalled as error:
        return str(error)
    return ""


@pytest.fixture
def needs_gl() -> None:
    if gl_error():
        pytest.skip(gl_error())


@pytest.fixture(autouse=True)
def local_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


def make(task: str, observation: str = "state", **kwargs: Any) -> tuple[gym.Env, Any]:
    """The environment as Gymnasium makes it, and the one inside."""
    env = gym.make(env_id(task, observation), **kwargs)
    assert isinstance(env.unwrapped, TabletopEnv)
    return env, env.unwrapped


def put(env: Any, name: str, position: Any) -> None:
    """Put a body somewhere and let nothing else happen."""
    env.data.joint(name).qpos[:3] = position
    import_module("mujoco").mj_forward(env.model, env.data)


# Ids, spaces, checkers


@pytest.mark.parametrize("task", TASKS)
def test_ids_and_spaces(task):
    image = spaces.Box(0, 255, (48, 48, 3), np.uint8)
    hand = spaces.Box(-np.inf, np.inf, (9,), np.float32)
    state = spaces.Box(-np.inf, np.inf, (16 if task == "pick-place" else 17,), np.float32)
    expected = {"image": image, "dict": spaces.Dict({"image": image, "state": hand}), "state": state}
    for observation, space in expected.items():
        env, inside = make(task, observation)
        assert env.observation_space == space
        assert env.action_space == spaces.Box(-1, 1, (8,), np.float32)
        assert env.spec is not None
        assert env.spec.max_episode_steps == {"pick-place": 40, "closed-drawer": 50, "blocked-drawer": 80}[task]
        assert inside.render_mode is None
        assert EnvironmentName(env.spec.id) == EnvironmentName(f"sb3_off2on.envs:{env.spec.id}") == env.spec.id
    assert gym.make(env_id(task), image_size=64).observation_space.shape == (64, 64, 3)


def test_ids_are_those_of_the_documentation():
    assert [env_id("pick-place", observation) for observation in ID_SUFFIXES] == [
        "Off2OnPickPlace-v0",
        "Off2OnPickPlace-Dict-v0",
        "Off2OnPickPlace-State-v0",
    ]
    assert env_id("closed-drawer") == "Off2OnClosedDrawer-v0"
    assert env_id("blocked-drawer") == "Off2OnBlockedDrawer-v0"


def test_import():
    """In a process of its own: registers the tasks, and leaves MuJoCo alone until one of them is made."""
    code = (
        "import sys, gymnasium, sb3_off2on; assert 'sb3_off2on.envs' not in sys.modules; "
        "from sb3_off2on.envs import make_dataset; assert 'mujoco' not in sys.modules; "
        "gymnasium.make('sb3_off2on.envs:Off2OnPickPlace-State-v0'); assert 'mujoco' in sys.modules"
    )
    run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings(
    "error:::stable_baselines3", "ignore:.*Box observation space m.*imum value is:UserWarning:gymnasium"
)
@pytest.mark.parametrize("task", TASKS)
def test_checkers_state(task):
    env, inside = make(task)
    check_gymnasium(inside, skip_render_check=True)
    check_sb3(env)


@pytest.mark.filterwarnings(
    "error:::stable_baselines3", "ignore:.*Box observation space m.*imum value is:UserWarning:gymnasium"
)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.usefixtures("needs_gl")
def test_checkers_image(task):
    for observation in ("image", "dict"):
        env, inside = make(task, observation, render_mode="rgb_array", width=64, height=32)
        check_gymnasium(inside)
        check_sb3(env)
        env.close()


# Control


def test_moves_and_turns():
    """A step goes most of the way that it asks for, along one axis and no other."""
    env, inside = make("pick-place")
    for axis in range(3):
        for asked, number, pose, still in (
            (0.015, 0.3 * MOVES[axis], lambda: inside.hand_position - HOME, lambda: inside.hand_angles),
            (np.deg2rad(10), 0.5 * MOVES[3 + axis], lambda: inside.hand_angles, lambda: inside.hand_position - HOME),
        ):
            for sign in (-1, 1):
                env.reset(seed=0)
                np.testing.assert_allclose(pose(), 0, atol=1e-3)
                env.step(sign * number)
                assert 0.5 < sign * pose()[axis] / asked <= 1
                np.testing.assert_allclose(np.delete(pose(), axis), 0, atol=asked / 10)
                np.testing.assert_allclose(still(), 0, atol=0.02)


def test_actions_are_clipped_and_targets_limited():
    env, inside = make("pick-place")
    positions = []
    for size in (1, 7):
        env.reset(seed=0)
        env.step(size * MOVES[0])
        positions.append(inside.hand_position)
    np.testing.assert_array_equal(*positions)
    for sign, limit in ((-1, LOWEST), (1, HIGHEST)):
        env.reset(seed=0)
        for _ in range(12):
            env.step(sign * MOVES[:3].sum(axis=0))
        np.testing.assert_allclose(inside.hand_position, limit, atol=0.01)
        env.reset(seed=0)
        for _ in range(12):
            env.step(sign * MOVES[3:6].sum(axis=0))
        np.testing.assert_allclose(inside.hand_angles, sign * MAX_ANGLES, atol=0.03)


def test_gripper_and_neutral():
    env, inside = make("pick-place")
    env.reset(seed=0)
    opened = lambda: inside.data.qpos[6:8].mean() / OPEN  # noqa: E731
    for grip, expected in ((0.0, 1), (-0.45, 1), (-0.55, 0), (0.0, 0), (0.45, 0), (-1.0, 0), (0.55, 1), (1.0, 1)):
        observation = env.step(grip * MOVES[6])[0]
        assert inside.gripper_open == bool(expected) == bool(observation[8])
        assert opened() == pytest.approx(expected, abs=0.15)
    for _ in range(3):
        env.step(-MOVES[:6].sum(axis=0))
    assert np.linalg.norm(inside.hand_position - HOME) > 0.05
    env.step(0.45 * MOVES[7])
    assert np.linalg.norm(inside.hand_position - HOME) > 0.05
    env.step(0.55 * MOVES[7])
    np.testing.assert_allclose(np.append(inside.hand_position - HOME, inside.hand_angles), 0, atol=0.01)


def test_state_vectors():
    env, inside = make("pick-place")
    state = env.reset(seed=1)[0]
    np.testing.assert_allclose(state[:9], [*HOME, 0, 0, 0, OPEN, OPEN, 1], atol=2e-3)
    np.testing.assert_allclose(state[9:12], inside.position("object"), atol=1e-6)
    assert np.linalg.norm(state[12:]) == pytest.approx(1, abs=1e-5)  # a quaternion
    env, inside = make("blocked-drawer")
    state = env.reset(seed=1)[0]
    np.testing.assert_allclose(state[9:12], inside.position("object"), atol=1e-6)
    np.testing.assert_allclose(state[12:14], [inside.opening("bottom_drawer"), inside.opening("top_drawer")], atol=1e-6)
    np.testing.assert_allclose(state[14:], inside.position("distractor"), atol=1e-6)


# Starts, success, episodes


def test_starts():
    env, inside = make("pick-place")
    away = []
    for seed in range(20):
        env.reset(seed=seed)
        away.append(np.linalg.norm((inside.position("object") - inside.position("tray"))[:2]))
        assert inside.position("object")[2] == pytest.approx(0.022, abs=2e-3)
        assert inside.gripper_open
    assert 0.1 < min(away) < max(away) < 0.3
    for seed in range(10):
        env.reset(seed=seed, options={"start": "grasped"})
        assert np.linalg.norm(inside.position("object") - inside.hand_position) < 0.02
        assert not inside.gripper_open
    for task, top in (("closed-drawer", (0, 0)), ("blocked-drawer", (0.5, 0.7))):
        env, inside = make(task)
        for seed in range(10):
            env.reset(seed=seed)
            assert inside.opening("bottom_drawer") == pytest.approx(0, abs=1e-3)
            assert top[0] - 1e-3 <= inside.opening("top_drawer") <= top[1] + 1e-3
            ball = inside.position("object") - inside.position("bottom_drawer")
            assert np.all(np.abs(ball) < [0.04, 0.012, 0.03])
            env.reset(seed=seed, options={"start": "open"})
            assert inside.opening("bottom_drawer") == pytest.approx(1, abs=0.01)
            assert inside.opening("top_drawer") == pytest.approx(0, abs=1e-3)


def test_success_of_pick_place():
    env, inside = make("pick-place")
    assert env.reset(seed=0)[1] == {"is_success": False}
    for offset, success in (((0, 0, 0.025), 1), ((0.045, -0.045, 0.03), 1), ((0.055, 0, 0.025), 0), ((0, 0, 0.06), 0)):
        put(inside, "object", inside.position("tray") + offset)
        assert inside.is_success == bool(success), offset


def test_success_of_the_drawers():
    env, inside = make("closed-drawer")
    env.reset(seed=0)
    for offset, success in (((0, 0, 0), 1), ((0.04, 0, 0), 1), ((0.06, 0, 0), 0), ((0, 0, -0.06), 0)):
        put(inside, "object", HOME + offset)
        assert inside.is_success == bool(success), offset
    inside.data.qpos[2] = 0.09
    put(inside, "object", [0, 0, 0.09])  # in the hand, but not lifted
    assert not inside.is_success


@pytest.mark.parametrize("terminate", [False, True])
def test_episode(terminate):
    env, inside = make("pick-place", terminate_on_success=terminate)
    env.reset(seed=0, options={"start": "grasped"})
    results: list[Any] = []
    for action in scripts.place(inside, np.random.default_rng(0)):
        results.append(env.step(action.astype(np.float32)))
        if results[-1][2] or results[-1][3]:
            break
    rewards = [result[1] for result in results]
    first = rewards.index(1.0)
    assert set(rewards) == {0.0, 1.0}
    assert [result[4]["is_success"] for result in results] == [reward == 1.0 for reward in rewards]
    ends = [(result[2], result[3]) for result in results]
    if terminate:
        assert ends == [(False, False)] * first + [(True, False)]
    else:
        assert ends == [(False, False)] * 39 + [(False, True)]
        assert sum(rewards) == 40 - first  # the return counts the steps in success


@pytest.mark.parametrize("task", TASKS)
def test_seeds_determine_everything(task):
    env, inside = make(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (15, 8)).astype(np.float32)

    def episode(seed: int) -> np.ndarray:
        return np.array([env.reset(seed=seed)[0], *(env.step(action)[0] for action in actions)])

    first, other, again = episode(3), episode(4), episode(3)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0] - other[0]).max() > 1e-4
    second = env.reset()[0]  # goes on with the seed's generator
    env.reset(seed=3)
    np.testing.assert_array_equal(env.reset()[0], second)
    assert np.all(np.isfinite(first))
    assert all(warning.number == 0 for warning in inside.data.warning)


def test_wrong_arguments():
    for kwargs, message in (
        ({"observation": "pixels"}, r"observation must be 'image', 'dict' or 'state', got 'pixels'"),
        ({"render_mode": "human"}, r"render_mode must be 'rgb_array' or None, got 'human'"),
        ({"image_size": 0}, r"image_size must be at least 1 \(pixel\), got 0"),
        ({"width": -1}, r"width must be at least 1 \(pixel\), got -1"),
        ({"height": 0}, r"height must be at least 1 \(pixel\), got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PickPlaceEnv(**kwargs)
    env, _ = make("closed-drawer")
    with pytest.raises(ValueError, match=r"options must be {'start': one of task, open}, got {'start': 'grasped'}"):
        env.reset(options={"start": "grasped"})
    with pytest.raises(ValueError, match=r"options must be .* got {'begin': 'open'}"):
        env.reset(options={"begin": "open"})
    with pytest.raises(ValueError, match=r"task must be one of pick-place, closed-drawer, blocked-drawer, got 'push'"):
        env_id("push")
    with pytest.raises(ValueError, match=r"observation must be one of image, dict, state, got 'pixels'"):
        env_id("pick-place", "pixels")


# Pictures


def test_state_needs_no_opengl(monkeypatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("a context was made")

    monkeypatch.setattr(Camera, "__init__", refuse)
    for task in TASKS:
        env, _ = make(task)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()


def test_missing_libraries(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(rendering, "find_library", lambda name: None)
    with pytest.raises(DependencyNotInstalled, match=r"neither is installed.*apt-get install libegl1 libgl1-mesa-dri"):
        gym.make(env_id("pick-place")).reset()
    # A library that is there, and does not work
    monkeypatch.setattr(rendering, "find_library", lambda name: name if name == "OSMesa" else None)
    chosen = []

    def broken(name: str) -> Any:
        chosen.append(name)
        return SimpleNamespace(GLContext=lambda width, height: 1 // 0)

    monkeypatch.setattr(rendering, "import_module", broken)
    with pytest.raises(
        DependencyNotInstalled, match=r"does not start with osmesa: .*zero\. On Debian.*apt-get install libegl1"
    ):
        gym.make(env_id("pick-place")).reset()
    monkeypatch.setenv("MUJOCO_GL", "EGL")
    with pytest.raises(DependencyNotInstalled, match=r"does not start with egl"):
        gym.make(env_id("pick-place")).reset()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(rendering, "find_library", lambda name: None)
    with pytest.raises(DependencyNotInstalled, match=r"does not start with glfw"):
        gym.make(env_id("pick-place")).reset()
    assert chosen == ["mujoco.osmesa", "mujoco.egl", "mujoco.glfw"]


def test_missing_mujoco(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.delitem(sys.modules, "sb3_off2on.envs.tabletop")
    with pytest.raises(DependencyNotInstalled, match=r"MuJoCo cannot be imported: .*pip install 'gymnasium\[mujoco\]'"):
        gym.make("Off2OnPickPlace-State-v0")


def test_render_without_mode():
    env, inside = make("pick-place")
    env.reset(seed=0)
    with pytest.warns(UserWarning, match=r"render\(\) without a render_mode shows nothing"):
        assert inside.render() is None


@pytest.mark.usefixtures("needs_gl")
def test_pictures():
    env, _ = make("blocked-drawer", "dict", render_mode="rgb_array", width=96, height=64)
    other, _ = make("pick-place", "image", image_size=40)
    first = env.reset(seed=0)[0]
    assert first["image"].shape == (48, 48, 3)
    assert first["image"].std() > 10
    video: Any = env.render()
    assert (video.shape, video.dtype) == ((64, 96, 3), np.uint8)
    # Cameras of several sizes and environments do not disturb one another
    assert other.reset(seed=0)[0].shape == (40, 40, 3)
    again = env.reset(seed=0)[0]
    np.testing.assert_array_equal(again["image"], first["image"])
    np.testing.assert_array_equal(env.render(), video)
    # What was seen is not written over
    moved = env.step(-MOVES[0])[0]
    assert np.any(moved["image"] != again["image"])
    np.testing.assert_array_equal(again["image"], first["image"])
    # The state is the hand's
    np.testing.assert_allclose(first["state"], make("blocked-drawer")[0].reset(seed=0)[0][:9])
    env.close()
    env.close()
    np.testing.assert_array_equal(env.reset(seed=0)[0]["image"], first["image"])
    env.close()
    other.close()


@pytest.mark.usefixtures("needs_gl")
def test_objects_are_seen():
    """At 48 x 48 pixels: red block, green ball in the open drawer, and both while they are held."""

    def pixels(image: np.ndarray, channel: int) -> int:
        others = np.delete(image.astype(int), channel, axis=2)
        return int((image[..., channel] > 1.5 * others.max(axis=2)).sum())

    block, _ = make("pick-place", "image")
    ball, _ = make("closed-drawer", "image")
    for seed in range(10):
        assert pixels(block.reset(seed=seed)[0], 0) >= 10
        assert pixels(block.reset(seed=seed, options={"start": "grasped"})[0], 0) >= 4
        assert pixels(ball.reset(seed=seed, options={"start": "open"})[0], 1) >= 10
        assert pixels(ball.reset(seed=seed)[0], 1) == 0
    block.close()
    ball.close()


# Scripts


def success_rate(task: str, script: Any, start: str = "task", n_episodes: int = 12, reached: Any = None) -> float:
    env, inside = make(task)
    hits = []
    for seed in range(n_episodes):
        episode = run_episode(env, script, np.random.default_rng(seed), start=start)
        hits.append(reached(inside) if reached else episode.rewards[-1] == 1.0)
    return float(np.mean(hits))


@pytest.mark.parametrize("task", TASKS)
def test_oracles_and_random_actions(task):
    assert success_rate(task, scripts.ORACLE[task]) >= 0.7
    assert success_rate(task, None, n_episodes=6) == 0


def test_attempts():
    """Most attempts reach what they try, and grasps are the ones that miss."""
    assert success_rate("pick-place", scripts.place, "grasped", 6) >= 0.8
    assert success_rate("pick-place", scripts.grasp, reached=lambda env: env.position("object")[2] > 0.1) >= 0.6
    assert 0.4 <= success_rate("closed-drawer", scripts.grasp_and_hold, "open") < 1

    def drawer(name: str, low: float, high: float) -> Any:
        return lambda env: low <= env.opening(name) <= high

    opened, shut = drawer("bottom_drawer", 0.9, 1.1), drawer("bottom_drawer", -0.1, 0.1)
    assert success_rate("closed-drawer", scripts.open_drawer, n_episodes=6, reached=opened) >= 0.8
    assert success_rate("closed-drawer", scripts.close_drawer, "open", 6, shut) >= 0.8
    assert success_rate("blocked-drawer", scripts.close_top, "task", 6, drawer("top_drawer", -0.1, 0.08)) >= 0.8
    assert success_rate("blocked-drawer", scripts.close_top_and_open, n_episodes=6, reached=opened) >= 0.8

    def moved(env: Any) -> bool:
        return bool(np.linalg.norm((env.position("distractor") - env.position("tray"))[:2]) > 0.05)

    assert success_rate("closed-drawer", scripts.move_distractor, reached=moved) >= 0.5


def test_blocked_drawer_stays_shut():
    """It opens only after the top drawer is closed (see test_attempts)."""
    shut = success_rate(
        "blocked-drawer", scripts.open_drawer, n_episodes=6, reached=lambda env: env.opening("bottom_drawer") < 0.05
    )
    assert shut == 1


def test_noise():
    env, _ = make("pick-place")

    def moves(noise: float) -> np.ndarray:
        return run_episode(env, scripts.hold, np.random.default_rng(0), noise).actions[:, :3]

    np.testing.assert_array_equal(moves(0.0), 0)
    assert moves(0.2).std() == pytest.approx(0.2, rel=0.2)
    assert np.abs(moves(2.0)).max() == np.float32(0.9)


def test_run_episode_ends():
    env, _ = make("closed-drawer")
    rng = np.random.default_rng(0)
    for script, max_steps, length in ((scripts.hold, None, 50), (scripts.hold, 7, 7), (None, None, 50)):
        episode = run_episode(env, script, rng, max_steps=max_steps)
        assert len(episode) == length == len(episode.actions) == len(episode.observations) - 1
        assert episode.truncations.tolist() == [False] * (length - 1) + [True]
        assert not episode.terminations.any()
    attempt = run_episode(env, scripts.open_drawer, rng)  # ends where the script does
    assert 10 < len(attempt) < 40
    assert attempt.truncations[-1]
    env, _ = make("pick-place", terminate_on_success=True)
    place = run_episode(env, scripts.place, rng, start="grasped")
    assert place.rewards == [0.0] * (len(place) - 1) + [1.0]
    assert place.terminations[-1]
    assert not place.truncations.any()


# Datasets


def test_composition():
    made = make_dataset.make_dataset("pick-place", 150, 90, observation="state", seed=1)
    assert made.id == "off2on/pick-place/mixed-state-v0"
    dataset = load_dataset(made.id)
    assert len(dataset) == 240
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Off2OnPickPlace-State-v0"
    assert dataset.make_env().observation_space == dataset.observation_space
    np.testing.assert_array_equal(random_rows(made.id), np.arange(240) >= 150)
    assert dataset.rewards[:75].sum() == 0
    assert dataset.rewards[75:150].mean() > 0.5
    assert not dataset.terminations.any()
    ends = np.flatnonzero(dataset.truncations) + 1
    assert {75, 115, 150, 190, 230, 240} <= set(ends.tolist())
    metadata = list(made.storage.get_episode_metadata(made.episode_indices))
    prior = int(np.searchsorted(ends, 75)) + 1
    assert [episode["options"]["start"] for episode in metadata] == ["task"] * prior + ["grasped"] * 2 + ["task"] * 3
    assert made.storage.metadata["description"] == "150 steps of scripts (noise 0.1) and 90 of uniform random actions, seed 1"
    # Scripted actions keep away from the bounds, random ones are uniform
    assert np.abs(dataset.actions[:150]).max() == np.float32(0.9)
    np.testing.assert_allclose(np.histogram(dataset.actions[150:], 4, (-1, 1))[0] / 720, 0.25, atol=0.06)


@pytest.mark.parametrize("task", ["closed-drawer", "blocked-drawer"])
def test_composition_of_the_drawers(task):
    """Each prior script in its turn."""
    made = make_dataset.make_dataset(task, 300, 0, observation="state")
    starts = {start for _, start in scripts.PRIOR[task]}
    metadata = list(made.storage.get_episode_metadata(made.episode_indices))
    n_prior = sum(np.cumsum([episode["total_steps"] for episode in metadata]) <= 150)
    turns = [start for _, start in scripts.PRIOR[task]]
    assert n_prior >= len(turns)
    assert starts == {"task", "open"}
    assert [episode["options"]["start"] for episode in metadata[:n_prior]] == (turns * n_prior)[:n_prior]
    assert {episode["options"]["start"] for episode in metadata[n_prior:]} == {"open"}
    assert not random_rows(made).any()


def test_prior_rewards_are_zeroed(monkeypatch):
    """Also those of attempts that succeed at the task by themselves."""
    monkeypatch.setitem(scripts.PRIOR, "pick-place", ((scripts.place, "grasped"),))
    made = make_dataset.make_dataset("pick-place", 80, 0, observation="state")
    rewards = load_dataset(made).rewards
    assert rewards[:40].sum() == 0
    assert rewards[40:].sum() > 20


def test_same_arguments_same_arrays():
    def fingerprint(version: int, **kwargs: Any) -> str:
        kwargs = {"n_scripted": 60, "n_random": 20, "observation": "state", "dataset_id": f"same-v{version}", **kwargs}
        return load_dataset(make_dataset.make_dataset("closed-drawer", **kwargs)).fingerprint

    first = fingerprint(0)
    assert fingerprint(1, progress_bar=True) == first
    assert fingerprint(2, seed=1) != first
    assert fingerprint(3, noise=0.2) != first


@pytest.mark.usefixtures("needs_gl")
@pytest.mark.parametrize("observation", ["image", "dict"])
def test_images(observation):
    """What is stored is what the environment shows for the stored seeds and actions."""
    made = make_dataset.make_dataset("pick-place", 20, 10, observation=observation, image_size=36)
    assert made.id == {"image": "off2on/pick-place/mixed-v0", "dict": "off2on/pick-place/mixed-dict-v0"}[observation]
    dataset = load_dataset(made.id)
    env = dataset.make_env()
    parts = dataset.frames if isinstance(dataset.frames, dict) else {"image": dataset.frames}
    assert parts["image"].shape == (30 + made.total_episodes, 36, 36, 3)
    metadata = made.storage.get_episode_metadata(made.episode_indices)
    shown = []
    for episode, details in zip(made.iterate_episodes(), metadata, strict=True):
        shown.append(env.reset(seed=details["seed"], options=details["options"])[0])
        shown.extend(env.step(action)[0] for action in episode.actions)
    for name, frames in parts.items():
        np.testing.assert_array_equal(frames, [frame[name] if observation == "dict" else frame for frame in shown])
    env.close()


def test_presets_and_command_line(monkeypatch, capsys):
    parser = ArgumentParser()
    parser.set_defaults(run=make_dataset.main)  # as a larger command line has it
    make_dataset.add_arguments(parser)
    given: dict[str, Any] = {}
    original = make_dataset.write_episodes

    def noted(dataset_id, env, episodes, n_steps, *args, **kwargs):
        given.update(dataset_id=dataset_id, n_steps=n_steps)
        return original(dataset_id, env, [next(episodes)], n_steps, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(make_dataset, "write_episodes", noted)
        make_dataset.main(parser.parse_args(["blocked-drawer", "--observation", "state"]))
        assert given == {"dataset_id": "off2on/blocked-drawer/mixed-state-v0", "n_steps": 200_000}
        make_dataset.main(parser.parse_args(["blocked-drawer", "--observation", "state", "--preset", "small"]))
        assert given == {"dataset_id": "off2on/blocked-drawer/small-state-v0", "n_steps": 8_000}
    arguments = "pick-place --n-scripted 30 --n-random 10 --seed 3 --noise 0.2 --observation state --dataset-id own-v0"
    make_dataset.main(parser.parse_args(arguments.split()))
    assert "own-v0: 40 steps in " in capsys.readouterr().out
    assert "scripts (noise 0.2) and 10" in minari.load_dataset("own-v0").storage.metadata["description"]


def test_interruption_leaves_nothing(monkeypatch):
    monkeypatch.setattr("sb3_off2on.collection._WRITE_STEPS", 10)
    original, calls = make_dataset.run_episode, []

    def interrupted(*args: Any) -> Any:
        calls.append(get_dataset_path("own-v0").exists())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(make_dataset, "run_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_dataset.make_dataset("pick-place", 100, 0, observation="state", dataset_id="own-v0")
    assert calls == [False, True, True]  # there was something
    assert not get_dataset_path("own-v0").exists()


def test_wrong_dataset_arguments():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"task": "push"}, r"task must be one of pick-place, .* got 'push'"),
        ({"observation": "pixels"}, r"observation must be one of image, dict, state, got 'pixels'"),
        ({"preset": "tiny"}, r"preset must be one of paper, small, got 'tiny'"),
        ({"n_scripted": -1}, r"n_scripted and n_random must not be negative, nor both be 0, got -1 and 100000"),
        ({"n_scripted": 0, "n_random": 0}, r"nor both be 0, got 0 and 0"),
        ({"noise": -0.1}, r"noise must not be negative, got -0.1"),
        ({"image_size": 0}, r"image_size must be at least 1 \(pixel\), got 0"),
        ({"dataset_id": "own"}, r"'own' has no version: call it own-v0"),
    )
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            make_dataset.make_dataset(**{"task": "pick-place", "dataset_id": "own-v0", **kwargs})
    assert not get_dataset_path("own-v0").exists()
    make_dataset.make_dataset("pick-place", 5, 5, observation="state", dataset_id="own-v0")
    with pytest.raises(ValueError, match=r"'own-v0' exists"):
        make_dataset.make_dataset("pick-place", 5, 5, observation="state", dataset_id="own-v0")
    assert load_dataset("own-v0").actions.shape == (10, 8)  # and is still there
