"""
The scenes and the tasks: a gripper above a table, moved by position.

Lengths are in metres, angles in radians. Seen by the camera, x points to the lower left and y to the lower right.
"""

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import DependencyNotInstalled

try:
    import mujoco  # type: ignore[import-untyped]
except (ImportError, AttributeError) as error:  # the latter is PyOpenGL's, where MUJOCO_GL names a library that is missing
    raise DependencyNotInstalled(
        f"MuJoCo cannot be imported: {error}. Install it with pip install 'gymnasium[mujoco]', and leave MUJOCO_GL unset "
        "unless the library that it names is installed."
    ) from error

from sb3_off2on.envs.rendering import Camera

HOME = np.array([0.0, 0.0, 0.2])  # where the hand begins and where "neutral" brings it back
LOWEST, HIGHEST = np.array([-0.2, -0.16, 0.012]), np.array([0.2, 0.16, 0.26])  # positions that the hand can be sent to
MAX_ANGLES = np.array([0.5, 0.5, np.pi / 2])  # roll, pitch and yaw that the hand can be sent to
MOVE, TURN = 0.05, np.deg2rad(20)  # what an action of 1 means
OPEN, CLOSED = 0.036, 0.0  # distances of the fingers from the middle that they are sent to
MOVE_STEPS, GRIP_STEPS, NEUTRAL_STEPS, SETTLE_STEPS = 10, 50, 60, 25  # of the simulation, 4 ms each


class TabletopEnv(gym.Env):
    """
    What the tasks share: the hand, its control and the observations.

    An action has 8 numbers in [-1, 1]: moves along x, y and z (1 asks for 5 cm), turns about them (1 asks for 20 degrees), the
    gripper (below -0.5 closes it, above 0.5 opens it, otherwise it stays), and neutral (above 0.5 brings the hand back to
    its first pose, after the move). The hand goes a good half of the way in the 40 ms of a step.

    The reward is 1 after a step that ends in success and 0 after any other. Success does not end the episode, whose length is
    the ``max_episode_steps`` that the environment is registered with.

    ``reset(options={"start": ...})`` begins at one of ``starts``, by default the first of them, which is the task's own.

    :param observation: ``"image"``: uint8, shape ``(image_size, image_size, 3)``; ``"dict"``: the ``image`` and the
        ``state`` of the hand alone; ``"state"``: hand and objects as one vector, for which nothing is rendered
    :param image_size: height and width of the observed image, pixels
    :param terminate_on_success: end the episode at its first success
    :param render_mode: ``"rgb_array"`` or None
    :param width: of what ``render`` returns, pixels
    :param height: of what ``render`` returns, pixels
    :raises ValueError: if an argument is not one of these
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012 (as Gymnasium has it)
    scene: ClassVar[str]
    starts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        observation: str = "image",
        image_size: int = 48,
        terminate_on_success: bool = False,
        render_mode: str | None = None,
        width: int = 480,
        height: int = 480,
    ) -> None:
        if observation not in ("image", "dict", "state"):
            raise ValueError(f"observation must be 'image', 'dict' or 'state', got {observation!r}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be 'rgb_array' or None, got {render_mode!r}.")
        for name, size in (("image_size", image_size), ("width", width), ("height", height)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1 (pixel), got {size}.")
        self.observation, self.image_size, self.terminate_on_success = observation, image_size, terminate_on_success
        self.render_mode, self.width, self.height = render_mode, width, height
        self.model = mujoco.MjModel.from_xml_path(str(Path(__file__).parent / "assets" / self.scene))
        self.data = mujoco.MjData(self.model)
        self.gripper_open = True
        self._observing: Camera | None = None  # made at the first picture, in the process that takes it
        self._rendering: Camera | None = None
        self.action_space = spaces.Box(-1.0, 1.0, (8,), np.float32)
        image_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        hand_space, state_space = (spaces.Box(-np.inf, np.inf, x.shape, np.float32) for x in (self._hand(), self._state()))
        self.observation_space = {
            "image": image_space,
            "dict": spaces.Dict({"image": image_space, "state": hand_space}),
            "state": state_space,
        }[observation]

    @property
    def hand_position(self) -> np.ndarray:
        """The point between the fingertips, shape ``(3,)``."""
        return self.data.qpos[:3].copy()  # the hand's joints are the first of the scene

    @property
    def hand_angles(self) -> np.ndarray:
        """Roll, pitch and yaw, shape ``(3,)``."""
        return self.data.qpos[3:6].copy()

    def position(self, body: str) -> np.ndarray:
        """
        Where a body is, shape ``(3,)``.

        :param body: as in the scene, e.g. ``"object"`` or ``"tray"``
        """
        return self.data.body(body).xpos.copy()

    @property
    def is_success(self) -> bool:
        """Whether the task is solved at this moment."""
        raise NotImplementedError

    def _place_objects(self, start: str) -> None:
        """Put the objects where an episode begins."""
        raise NotImplementedError

    def _objects(self) -> np.ndarray:
        """The objects' part of the state."""
        raise NotImplementedError

    def _hand(self) -> np.ndarray:
        """Position, angles, distances of the two fingers from the middle, and whether the gripper is told to be open."""
        return np.append(self.data.qpos[:8], self.gripper_open).astype(np.float32)

    def _state(self) -> np.ndarray:
        return np.concatenate([self._hand(), self._objects()], dtype=np.float32)

    def _observe(self) -> Any:
        if self.observation == "state":
            return self._state()
        if self._observing is None:
            self._observing = Camera(self.model, self.image_size, self.image_size)
        image = self._observing.render(self.data)
        return image if self.observation == "image" else {"image": image, "state": self._hand()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Begin an episode.

        :param seed: determines everything that follows, together with the actions
        :param options: ``{"start": ...}``, see the class
        :raises ValueError: if an option is unknown
        """
        options = {} if options is None else options
        start = options.get("start", self.starts[0])
        if start not in self.starts or options.keys() - {"start"}:
            raise ValueError(f"options must be {{'start': one of {', '.join(self.starts)}}}, got {options}.")
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.gripper_open = True
        self.data.qpos[:3] = HOME
        self.data.qpos[6:8] = OPEN
        self._place_objects(start)
        self.data.ctrl[:] = [*HOME, 0, 0, 0, *self._fingers()]
        self._simulate(SETTLE_STEPS)
        return self._observe(), {"is_success": self.is_success}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        Act.

        :param action: see the class; clipped to [-1, 1]
        """
        action = np.clip(action, -1.0, 1.0)
        grip, neutral = action[6:]
        self.data.ctrl[:3] = np.clip(self.hand_position + MOVE * action[:3], LOWEST, HIGHEST)
        self.data.ctrl[3:6] = np.clip(self.hand_angles + TURN * action[3:6], -MAX_ANGLES, MAX_ANGLES)
        switched = bool(grip < -0.5 if self.gripper_open else grip > 0.5)
        self.gripper_open ^= switched
        self.data.ctrl[6:] = self._fingers()
        self._simulate(GRIP_STEPS if switched else MOVE_STEPS)
        if neutral > 0.5:
            self.data.ctrl[:6] = [*HOME, 0, 0, 0]
            self._simulate(NEUTRAL_STEPS)
        success = self.is_success
        return self._observe(), float(success), self.terminate_on_success and success, False, {"is_success": success}

    def _simulate(self, n_steps: int) -> None:
        mujoco.mj_step(self.model, self.data, n_steps)
        mujoco.mj_kinematics(self.model, self.data)  # mj_step leaves the bodies' positions one step behind the joints

    def _fingers(self) -> tuple[float, float]:
        return (OPEN, OPEN) if self.gripper_open else (CLOSED, CLOSED)

    def render(self) -> Any:
        """
        A picture of the scene, smoother than the observation.

        :return: uint8, shape ``(height, width, 3)``; None without a ``render_mode``
        """
        if self.render_mode is None:
            gym.logger.warn("render() without a render_mode shows nothing: make the environment with render_mode='rgb_array'.")
            return None
        if self._rendering is None:
            self._rendering = Camera(self.model, self.height, self.width, samples=4)
        return self._rendering.render(self.data)

    def close(self) -> None:
        """Free what rendering needed."""
        for camera in (self._observing, self._rendering):
            if camera is not None:
                camera.close()
        self._observing = self._rendering = None


class PickPlaceEnv(TabletopEnv):
    """
    Put the block into the tray.

    Starts: ``"task"``, with the block somewhere on the table; ``"grasped"``, with the block in the hand.
    State, shape ``(16,)``: the hand (see ``TabletopEnv``), the block's position and its quaternion.
    """

    scene = "pick_place.xml"
    starts = ("task", "grasped")

    @property
    def is_success(self) -> bool:
        offset = self.position("object") - self.position("tray")
        return bool(np.all(np.abs(offset[:2]) < 0.05) and offset[2] < 0.05)

    def _objects(self) -> np.ndarray:
        return self.data.joint("object").qpos

    def _place_objects(self, start: str) -> None:
        if start == "grasped":
            # Where grasps from the table end up in the hand
            position = HOME + self.np_random.uniform([-0.012, 0.0, -0.011], [0.012, 0.0, 0.002])
            angle = 0.0
            self.gripper_open = False
            self.data.qpos[6:8] = 0.0145  # just beside the block
        else:
            tray = np.array([-0.1, 0.08])
            position = np.append(tray, 0.023)
            while np.linalg.norm(position[:2] - tray) < 0.11:
                position[:2] = self.np_random.uniform([-0.15, -0.02], [0.15, 0.1])
            angle = self.np_random.uniform(-0.5, 0.5)
        self.data.joint("object").qpos = [*position, np.cos(angle / 2), 0, 0, np.sin(angle / 2)]


class DrawerEnv(TabletopEnv):
    """
    Lift the ball out of the bottom drawer.

    Starts: ``"task"``, with the bottom drawer closed; ``"open"``, with the bottom drawer open and the top drawer closed.
    State, shape ``(17,)``: the hand (see ``TabletopEnv``), the ball's position, how far the bottom and the top drawer are open
    (0 to 1), and the position of the cylinder beside the cabinet, which has no part in the task.

    :param blocked: whether the task begins with the top drawer half open, over the handle of the bottom drawer
    :param kwargs: of ``TabletopEnv``
    """

    scene = "drawers.xml"
    starts = ("task", "open")

    def __init__(self, blocked: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocked = blocked

    @property
    def handle_position(self) -> np.ndarray:
        """The middle of the bottom drawer's handle, where the fingers fit in, shape ``(3,)``."""
        return self.data.site("handle").xpos.copy()

    def opening(self, name: str) -> float:
        """
        How far a drawer is open, 0 to 1.

        :param name: ``"bottom_drawer"`` or ``"top_drawer"``
        """
        return float(self.data.joint(name).qpos[0] / self.model.joint(name).range[1])

    @property
    def is_success(self) -> bool:
        ball = self.position("object")
        return bool(ball[2] > 0.1 and np.linalg.norm(ball - self.hand_position) < 0.05)

    def _objects(self) -> np.ndarray:
        openings = [self.opening("bottom_drawer"), self.opening("top_drawer")]
        return np.concatenate([self.position("object"), openings, self.position("distractor")])

    def _place_objects(self, start: str) -> None:
        uniform, cabinet, tray = self.np_random.uniform, self.model.body("cabinet").pos, self.model.body("tray").pos
        bottom = self.model.joint("bottom_drawer").range[1] if start == "open" else 0.0
        top = uniform(0.5, 0.7) * self.model.joint("top_drawer").range[1] if self.blocked and start == "task" else 0.0
        self.data.joint("bottom_drawer").qpos, self.data.joint("top_drawer").qpos = bottom, top
        # Anywhere along the drawer: pulled open by its handle, it has the ball roll to the back
        ball = cabinet + np.array([bottom + uniform(-0.036, 0.036), uniform(-0.01, 0.01), 0.028])
        distractor = tray + np.array([*uniform(-0.02, 0.02, 2), 0.027])
        for name, position in (("object", ball), ("distractor", distractor)):
            self.data.joint(name).qpos = [*position, 1, 0, 0, 0]
