"""
Fitted Q evaluation (Paine et al. 2020): Q-functions of given policies, from a dataset alone, without pessimism. Pure functions
but for ``reset_critics``, which starts it.
"""

import torch as th

from sb3_off2on.buffers import BalancedReplayBufferSamples
from sb3_off2on.policies import EnsembleCQLPolicy


def reset_critics(policy: EnsembleCQLPolicy) -> None:
    """
    Random critics (Lee et al. 2021, section C: "starting from random initialization"), target critics equal to them, and fresh
    optimizers. What is frozen, or shared with the actors, stays.

    :param policy: whose critics they are
    """
    shared = policy.actor.features_extractor if policy.share_features_extractor else None
    frozen = {name for name, parameter in policy.critic.named_parameters() if not parameter.requires_grad}
    state = policy.make_critic(features_extractor=shared).state_dict()
    # In place: the model and its optimizers hold these very parameters
    policy.critic.load_state_dict({name: value for name, value in state.items() if name not in frozen}, strict=False)
    policy.critic_target.load_state_dict(policy.critic.state_dict())
    policy.reset_optimizers()


def fqe_errors(
    policy: EnsembleCQLPolicy, replay_data: BalancedReplayBufferSamples, gamma: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    TD errors ``Q(s, a) - (r + gamma * (1 - done) * Q_target(s', a'))`` with ``a'`` drawn from the policy at ``s'``.

    Nothing in the target is pessimistic: each network has a target of its own instead of the minimum over a member's networks,
    and each member evaluates its own actor. There is no entropy in it either: what is evaluated is the return.

    :param policy: N actors and N x ``n_critics`` critics
    :param replay_data: ``ensemble_size * batch_size`` rows, those of member 0 first
    :param gamma: discount factor
    :return: Q-values of the rows, and their errors with gradient, each of shape ``(ensemble_size, n_critics, batch_size)``
    """
    ensemble_size, next_obs = policy.ensemble_size, replay_data.next_observations
    with th.no_grad():
        dist_params = policy.actor.member_action_dist_params(next_obs, per_member=True)
        next_actions = policy.actor.sample_from_params(*dist_params)[0].squeeze(1)
        next_q_values = policy.critic_target.member_q_values(next_obs, next_actions, per_member=True)
        rewards = replay_data.rewards.view(ensemble_size, 1, -1)
        dones = replay_data.dones.view(ensemble_size, 1, -1)
        target_q_values = rewards + (1 - dones) * gamma * next_q_values
    actions = replay_data.actions.view(ensemble_size, -1, replay_data.actions.shape[-1])
    q_values = policy.critic.member_q_values(replay_data.observations, actions, per_member=True)
    assert q_values.shape == target_q_values.shape
    return q_values.detach(), q_values - target_q_values
