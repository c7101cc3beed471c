from sb3_off2on.awac import AWAC
from sb3_off2on.bcq import BCQ
from sb3_off2on.buffers import BalancedReplayBuffer
from sb3_off2on.collection import collect_dataset
from sb3_off2on.datasets import OfflineDataset, load_dataset
from sb3_off2on.off2on_sac import Off2OnSAC
from sb3_off2on.policies import EnsembleCQLPolicy

__version__ = "0.1.0"

__all__ = [
    "AWAC",
    "BCQ",
    "BalancedReplayBuffer",
    "EnsembleCQLPolicy",
    "Off2OnSAC",
    "OfflineDataset",
    "collect_dataset",
    "load_dataset",
]
