"""
How the dataset that ships with the package was made: everything that SB3's SAC saw in its first steps, while it learned.

    python examples/make_quickstart_data.py sb3_off2on/data/inverted_double_pendulum_replay.npz
"""

import argparse
from pathlib import Path

import numpy as np
from stable_baselines3 import SAC

from sb3_off2on import load_dataset

ENV_ID = "InvertedDoublePendulum-v5"
# SAC needs about 10,000 steps to solve the task with these settings: this is what comes before
N_STEPS = 9_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    model = SAC(
        "MlpPolicy",
        ENV_ID,
        learning_rate=1e-3,
        buffer_size=N_STEPS,
        learning_starts=1000,
        policy_kwargs={"net_arch": [128, 128]},
        seed=0,
    )
    model.learn(N_STEPS, progress_bar=True)
    dataset = load_dataset(model.replay_buffer)
    arrays = ("observations", "next_observations", "actions", "rewards", "terminations", "truncations")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, env_id=ENV_ID, **{name: getattr(dataset, name) for name in arrays})
    print(load_dataset(path))


if __name__ == "__main__":
    main()
