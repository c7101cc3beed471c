"""The code blocks of the documentation run, on settings of seconds."""

import re
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest

from sb3_off2on import AWAC, BCQ, Off2OnSAC, collect_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE))
]
# Datasets that the documentation names, and the environments whose random steps stand in for them
DATASETS = {
    "mujoco/halfcheetah/medium-v0": "HalfCheetah-v5",
}


@pytest.fixture(scope="module", autouse=True)
def local_datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("datasets")))
        for dataset_id, env_id in DATASETS.items():
            collect_dataset(None, gym.make(env_id), n_steps=60, dataset_id=dataset_id, seed=0)
        yield


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Off2OnSAC.pretrain_offline.__func__.__kwdefaults__, "offline_gradient_steps", 4)  # type: ignore[attr-defined]
    for algorithm in (Off2OnSAC, AWAC, BCQ):
        # `learning_starts` and `train_freq`
        defaults = tuple(4 if default == 1000 else default for default in algorithm.__init__.__defaults__ or ())
        monkeypatch.setattr(algorithm.__init__, "__defaults__", defaults)
    monkeypatch.setattr(Off2OnSAC, "_online_gradient_steps", lambda self, gradient_steps: 2)
    exec(compile(re.sub(r"\b\d+(_000)+\b", "4", block), "documentation", "exec"), {})


def test_pages_link_to_pages_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
