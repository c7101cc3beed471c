"""The examples run, on settings of seconds."""

import json
import runpy
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.error import DependencyNotInstalled

import sb3_off2on.envs  # noqa: F401 (registers the manipulation tasks)
from sb3_off2on import Off2OnSAC

EXAMPLES = Path(__file__).parents[1] / "examples"
DATASET = str(files("sb3_off2on") / "data" / "inverted_double_pendulum_replay.npz")


def test_quickstart(tmp_path: Path) -> None:
    """As a process, because it starts others."""
    arguments = f"--offline-steps 4 --online-steps 260 --learning-starts 4 --out {tmp_path}"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), *arguments.split()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(word in output for word in ("behaviour", "offline", "worst", "final", "balanced replay", "online only"))
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000


def test_offline_to_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = (
        f"--ensemble-size 1 --offline-steps 2 --offline-batch-size 4 --online-steps 1000 --eval-episodes 1 --out {tmp_path}"
    )
    monkeypatch.setattr(Off2OnSAC, "_online_gradient_steps", lambda self, gradient_steps: 2)
    monkeypatch.setattr(sys, "argv", ["", DATASET, *arguments.split(), "--schemes", "balanced", "online"])
    runpy.run_path(str(EXAMPLES / "offline_to_online.py"), run_name="__main__")
    for scheme in ("balanced", "online"):
        result = json.loads((tmp_path / f"{scheme}.json").read_text())
        assert result["steps"] == [1000]
        assert result["worst_first_5k"] <= result["offline"]


def test_offline_to_online_learns_the_entropy_coefficient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fixed one is refused before anything is trained."""
    monkeypatch.setattr(sys, "argv", ["", DATASET, "--ent-coef", "0.1"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "offline_to_online.py"), run_name="__main__")
    assert "--ent-coef: must be auto, or auto_ and a number above 0, got '0.1'" in capsys.readouterr().err


def test_sampled_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms are trained and compared; the second time they are only compared."""
    arguments = "--n-seeds 2 --offline-steps 8 --offline-batch-size 4 --cql-n-actions 2 --n-evaluations 2 --eval-episodes 1"
    monkeypatch.setattr(sys, "argv", ["", DATASET, *arguments.split(), "--out", str(tmp_path)])
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / "sampled_gradient.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("sampled 8: ") == output.count("full 8: ") == 1
    assert output.count("95% interval") == 2
    for form in ("sampled", "full"):
        result = json.loads((tmp_path / f"{form}.json").read_text())
        assert [len(returns) for returns in result["evaluations"]] == [2, 2]


@pytest.mark.parametrize(
    ("observation", "rows"),
    [("state", ["ensemble-balanced", "sac-online"]), ("image", ["sac-balanced"])],
)
def test_manipulation(
    observation: str, rows: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both networks, ensemble and single agent; the second time, only the table and the plot are made."""
    if observation == "image":
        try:
            gym.make("Off2OnPickPlace-v0").reset()
        except DependencyNotInstalled as error:
            pytest.skip(str(error))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(Off2OnSAC, "_online_gradient_steps", lambda self, gradient_steps: 1)
    arguments = (
        f"--observation {observation} --n-scripted 40 --n-random 40 --ensemble-size 2 --offline-steps 2 --online-episodes 10 "
        f"--eval-freq 400 --eval-episodes 10 --out {tmp_path} --rows {' '.join(rows)}"
    )
    monkeypatch.setattr(sys, "argv", ["", "pick-place", *arguments.split()])
    folder = tmp_path / "pick-place" / observation
    times = []
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / "manipulation.py"), run_name="__main__")
        times.append({path.name: path.stat().st_mtime_ns for path in folder.glob("*.csv")})
    assert times[0] == times[1]
    assert sorted(times[0]) == sorted(f"{row}_0.csv" for row in rows)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--eval-episodes", "2"])
    with pytest.raises(SystemExit, match="choose another --out"):
        runpy.run_path(str(EXAMPLES / "manipulation.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert output.count("offline phase") == 1
    assert output.count("success_sampling  ") == 2
    assert (folder / "success.png").stat().st_size > 10_000
    for name in times[0]:
        lines = (folder / name).read_text().splitlines()
        assert lines[0] == "step,success,success_sampling,return,random_share"
        assert [line.split(",")[0] for line in lines[1:]] == ["0", "400"]
