"""Training stops, or leaves out, what would make numbers of the model NaN, infinite or far too large."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_off2on.buffers import BalancedReplayBufferSamples
from sb3_off2on.datasets import map_arrays
from sb3_off2on.faults import LARGEST, NumericalFault, check_step, find_fault, flat, is_fine

# Steps of optimizers from one check to the next on an accelerator, which a check waits for
ACCELERATOR_CHECK_INTERVAL = 100
MINIBATCH_FIELDS = ("observations", "actions", "rewards", "next_observations")


class Guarded(OffPolicyAlgorithm):
    """Mixin of ``OfflineToOnline``: numerical faults, as ``on_fault`` says."""

    on_fault: str = "raise"
    max_abs_q: float = 1e8
    n_skipped_steps: int = 0
    n_skipped_updates: int = 0
    _n_checks: int = 0
    _sound_normalization: Sequence[tuple[Any, dict[str, Any]]] = ()

    def _has_fault(
        self,
        replay_data: BalancedReplayBufferSamples,
        n_batches: int = 1,
        optimizer: th.optim.Optimizer | None = None,
        **tensors: th.Tensor,
    ) -> bool:
        """
        Whether an update must not go on: to be asked about each minibatch, and again before each step of an optimizer. On the
        CPU, and to skip, this looks each time; on an accelerator now and then.

        :param replay_data: the minibatch
        :param n_batches: of how many minibatches of equal size it consists, one after the other
        :param optimizer: the one that is about to step, whose gradients are looked at
        :param tensors: the loss and what it came from, causes first, see ``find_fault``; those whose names end in ``q_values``
            are held against ``max_abs_q``. Without, the minibatch is looked at
        :return: True if the update is to be left out
        :raises NumericalFault: if it is not to be left out
        """
        self._n_checks += 1
        if self.on_fault == "raise" and self.device.type != "cpu" and self._n_checks % ACCELERATOR_CHECK_INTERVAL != 0:
            return False
        minibatch = flat({name: getattr(replay_data, name) for name in MINIBATCH_FIELDS})
        if optimizer is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            tensors["gradient norm"] = th.nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        limits = {name: self.max_abs_q for name in tensors if name.endswith("q_values")}
        if all(is_fine(tensor, limits.get(name, LARGEST)) for name, tensor in (tensors or minibatch).items()):
            return False
        if self.on_fault == "skip":
            self.n_skipped_updates += 1
            return True
        rows = th.as_tensor(replay_data.indices).cpu().numpy().reshape(n_batches, -1)
        state = [(name, value) for name, value in vars(self).items() if isinstance(value, th.Tensor)]
        for name, module in vars(self).items():
            if isinstance(module, th.nn.Module) and module is not self.policy:  # whose parts have names of their own
                state += [(f"{name}.{key}", value) for key, value in module.state_dict().items()]
        fault = find_fault(rows, minibatch, state, tensors, limits)
        raise NumericalFault(
            f"The update at num_timesteps={self.num_timesteps} was not made: {fault}. Or set `on_fault='skip'` to go on "
            "without such updates"
        )

    def _normalization(self) -> list[tuple[Any, dict[str, Any]]]:
        """:return: what ``VecNormalize`` changes with each step, and its values. It replaces them, so no copy is needed"""
        env = self._vec_normalize_env
        if env is None:
            return []
        obs_rms = getattr(env, "obs_rms", None)
        statistics = [*obs_rms.values()] if isinstance(obs_rms, dict) else [obs_rms] if obs_rms is not None else []
        named = [(part, ("mean", "var", "count")) for part in (*statistics, env.ret_rms)]
        return [(part, {name: getattr(part, name) for name in names}) for part, names in [*named, (env, ("returns",))]]

    def _undo_step(self) -> None:
        """Take a faulty step out of ``VecNormalize``'s statistics, which would never be finite again."""
        for part, values in self._sound_normalization:
            vars(part).update(values)
        self._last_obs = None  # the next learn() resets the environments

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """SB3's. Where faulty steps are left out, zeros stand in for what is not finite: what comes of it is not stored."""
        observations: Any = self._last_obs
        if self.on_fault == "skip":
            self._last_obs = map_arrays(lambda part: np.where(np.isfinite(part), part, 0).astype(part.dtype), observations)
            try:
                return super()._sample_action(learning_starts, action_noise, n_envs)
            finally:
                self._last_obs = observations
        try:
            check_step(observations=observations)
        except NumericalFault:
            self._undo_step()
            raise
        return super()._sample_action(learning_starts, action_noise, n_envs)

    def _store_transition(
        self,
        replay_buffer: Any,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """SB3's, but what is not finite gets neither into the replay nor into ``VecNormalize``'s statistics."""
        env = self._vec_normalize_env
        original_obs = new_obs if env is None else env.get_original_obs()
        try:
            check_step(new_observations=original_obs)
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        except NumericalFault:
            self._undo_step()
            if self.on_fault == "raise":
                raise
            # A row of the ring holds a step of all environments, so all of them are left out
            self.n_skipped_steps += len(dones)
            self._last_obs, self._last_original_obs = original_obs, original_obs
            if env is not None:
                self._last_obs = env.normalize_obs(original_obs)
        self._sound_normalization = self._normalization()
        # As SB3's on-policy algorithms do
        self._last_episode_starts = dones
