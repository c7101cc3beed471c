"""Pictures of a MuJoCo model, also where there is no display."""

import os
import sys
from ctypes.util import find_library
from importlib import import_module
from typing import Any

import mujoco  # type: ignore[import-untyped]
import numpy as np
from gymnasium.error import DependencyNotInstalled

_ADVICE = (
    "On Debian and Ubuntu: apt-get install libegl1 libgl1-mesa-dri (no graphics card needed). MUJOCO_GL chooses among egl, "
    "osmesa (package libosmesa6) and glfw (where there is a display). The -State environments need none of it, as long as "
    "they are not rendered."
)


class Camera:
    """
    Takes pictures through the first camera of a model. It has an OpenGL context of its own.

    ``MUJOCO_GL`` chooses the kind of context (``egl``, ``osmesa``, ``glfw``), as for MuJoCo itself. Where it is not set, Linux
    takes the first whose library is there, so that a display is not needed.

    :param model: the model
    :param height: of the pictures, pixels
    :param width: of the pictures, pixels
    :param samples: of each pixel, 0 for none but the pixel itself; more of them smooth the edges and take longer
    :raises DependencyNotInstalled: if OpenGL does not start; names the packages to install
    """

    def __init__(self, model: Any, height: int, width: int, samples: int = 0) -> None:
        self.model = model
        model.vis.global_.offheight, model.vis.global_.offwidth, model.vis.quality.offsamples = height, width, samples
        backend = _backend()
        try:
            # mujoco.GLContext was chosen when MuJoCo was imported, by what MUJOCO_GL was then
            module = import_module(f"mujoco.{backend}") if backend in ("egl", "osmesa", "glfw") else mujoco
            self._gl = module.GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # of many types: PyOpenGL's, GLFW's, MuJoCo's
            raise DependencyNotInstalled(
                f"OpenGL does not start with {backend or 'the default'}: {str(error).rstrip('.')}. {_ADVICE}"
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom)
        self._option, self._perturbation, self._view = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        self._view.type, self._view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def render(self, data: Any) -> np.ndarray:
        """
        Take a picture.

        :param data: the model's state
        :return: uint8, shape ``(height, width, 3)``
        """
        self._gl.make_current()  # another camera may have been in between
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self._option, self._perturbation, self._view, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._context)
        return self._pixels[::-1].copy()  # OpenGL begins with the lowest row

    def close(self) -> None:
        """Free the context."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _backend() -> str:
    backend = os.environ.get("MUJOCO_GL", "").lower().strip()
    if backend or sys.platform != "linux":
        return backend
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            return backend
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "glfw"
    raise DependencyNotInstalled(f"Rendering without a display needs EGL or OSMesa, and neither is installed. {_ADVICE}")
