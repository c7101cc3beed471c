"""
One CQL(H) agent as its paper states it (Kumar et al. 2020), on SB3's SAC: plain networks in a loop, every sampled action in
the graph. The offline phase of ``Off2OnSAC`` is tested and timed against it.
"""

import math

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.utils import polyak_update


class PlainCQL(SAC):
    """
    SAC whose ``train()`` is a CQL(H) update with the weights of the published code: the squared TD error is not halved, and
    the backup has no entropy.
    """

    cql_alpha = 5.0
    cql_n_actions = 10

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        assert self.ent_coef_optimizer is not None
        assert self.log_ent_coef is not None
        assert isinstance(self.target_entropy, float)
        n, action_dim = self.cql_n_actions, self.action_space.shape[0]  # type: ignore[index]
        for _ in range(gradient_steps):
            replay_data = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
            obs, next_obs = replay_data.observations, replay_data.next_observations

            actions_pi, log_prob = self.actor.action_log_prob(obs)
            ent_coef = th.exp(self.log_ent_coef.detach())
            ent_coef_loss = -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()
            self.ent_coef_optimizer.zero_grad()
            ent_coef_loss.backward()
            self.ent_coef_optimizer.step()

            with th.no_grad():
                next_actions, _ = self.actor.action_log_prob(next_obs)
                next_q_values = th.cat(self.critic_target(next_obs, next_actions), dim=1).min(dim=1, keepdim=True).values
                target_q_values = replay_data.rewards + (1 - replay_data.dones) * self.gamma * next_q_values
                # Every state n times, for n actions each of the policy at s, of the policy at s', and uniform ones
                many_obs, many_next_obs = obs.repeat(n, 1), next_obs.repeat(n, 1)
                policy_actions, policy_log_prob = self.actor.action_log_prob(many_obs)
                next_policy_actions, next_log_prob = self.actor.action_log_prob(many_next_obs)
                uniform_actions = th.empty_like(policy_actions).uniform_(-1, 1)
                uniform_log_prob = th.full_like(policy_log_prob, math.log(0.5) * action_dim)

            critic_loss = th.zeros(())
            data_q_values = self.critic(obs, replay_data.actions)
            sampled = [
                (self.critic(many_obs, actions), log_density.view(n, batch_size))
                for actions, log_density in (
                    (uniform_actions, uniform_log_prob),
                    (policy_actions, policy_log_prob),
                    (next_policy_actions, next_log_prob),
                )
            ]
            for index, q_values in enumerate(data_q_values):
                logits = th.cat([q[index].view(n, batch_size) - log_density for q, log_density in sampled])
                gap = th.logsumexp(logits, dim=0) - q_values.squeeze(1)  # (batch_size,)
                critic_loss = critic_loss + (q_values - target_q_values).pow(2).mean() + self.cql_alpha * gap.mean()
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()

            q_values_pi = th.cat(self.critic(obs, actions_pi), dim=1).min(dim=1).values
            actor_loss = (ent_coef * log_prob - q_values_pi).mean()
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            self.actor.optimizer.step()

            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
