"""The benchmark runs on settings of seconds, and its figures are what it says. No assertion on how long anything takes."""

import gc
import json
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import benchmark
import benchmark_peers
import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from sb3_off2on import collect_dataset, load_dataset

SMALL = {
    "NET_ARCH": [16],
    "BATCH_SIZE": 8,
    "ENSEMBLE_SIZE": 2,
    "N_THREADS": (1,),
    "N_OFFLINE": 50,
    "N_ONLINE": 10,
    "TREE_SIZE": 5000,
    "PEER_TREE_SIZE": 64,
    "EPISODE_LENGTH": 20,
    "PRODUCTS": [(8, 8, 8), (16, 8, 8)],
    "N_REPEATS": 2,
    "WARM_UP": 1,
}


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(benchmark, name, value)


def run(tmp_path: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    """The results that ``benchmark.py`` writes."""
    out = tmp_path / "new" / "benchmark.json"
    benchmark.main(["--quick", "--rounds", "2", "--out", str(out), *arguments])
    return json.loads(out.read_text())["results"]


@pytest.mark.usefixtures("small")
def test_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = ["online", "offline", "arithmetic", "sum_tree", "predict"]
    results = run(tmp_path, "--sections", *sections)
    assert list(results) == sections
    printed = capsys.readouterr().out
    for rows in results.values():
        for row in rows:
            assert row["what"] in printed
            if row["note"].startswith("skipped: "):
                assert row["values"] == []
            else:
                assert len(row["values"]) == 2
                assert all(value > 0 for value in row["values"])
                assert row["quartiles"] == np.percentile(row["values"], [25, 50, 75]).tolist()
                assert f"{row['quartiles'][1]:.3g} {row['unit']}" in printed
    skipped = [row["what"] for rows in results.values() for row in rows if not row["values"]]
    assert {"authors' code", "CORL"} <= set(skipped)


@ON_LINUX
@pytest.mark.usefixtures("small")
def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *args: function(*args))
    seconds, resident, peak = run(tmp_path, "--transitions", "30", "--sections", "loading")["loading"]
    assert seconds["what"] == "40 transitions"
    assert len(seconds["values"]) == len(resident["values"]) == len(peak["values"]) == 2


@ON_LINUX
def test_larger_than_memory(tmp_path: Path) -> None:
    """Takes seconds, as the limit needs a process of its own."""
    arguments = "--image-gb 0.001 --image-updates 1 --limit-gb 2 --sections larger_than_memory"
    size, anonymous, files = run(tmp_path, *arguments.split())["larger_than_memory"]
    assert size["values"] == [0.0005]
    assert len(anonymous["values"]) == len(files["values"]) == 1
    assert min(anonymous["values"] + files["values"]) > 0


@pytest.mark.usefixtures("small")
def test_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "COMPILE_MODE", "unknown")
    (row,) = run(tmp_path, "--sections", "compilation")["compilation"]
    assert "skipped: " in row["note"]
    assert "compile_mode" in row["note"]

    # Compiling takes too long for a test: the rest, without
    make_agent = benchmark.make_agent
    monkeypatch.setattr(benchmark, "make_agent", lambda dataset, policy_kwargs=None: make_agent(dataset=dataset))
    first, *ratios = run(tmp_path, "--sections", "compilation")["compilation"]
    assert first["unit"] == "s"
    assert [row["what"] for row in ratios] == ["plain / compiled, offline", "plain / compiled, online"]


def test_tasks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the tasks move: B takes twice as long as A in each round, and each round longer."""
    now, calls = 0.0, []

    def task(name: str, factor: float) -> None:
        nonlocal now
        assert not gc.isenabled()
        calls.append(name)
        now += factor * (1 + len(calls) // 2)

    clocks = SimpleNamespace(process_time=lambda: now, perf_counter=lambda: pytest.fail("wall time with one thread"))
    monkeypatch.setattr(benchmark, "time", clocks)
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    seconds = benchmark.take_turns("test", 3, {"A": lambda: task("A", 1.0), "B": lambda: task("B", 2.0)})
    assert calls == ["A", "B"] * 4
    np.testing.assert_allclose(seconds["A"], [2, 3, 4])
    np.testing.assert_allclose(seconds["B"], [6, 8, 10])
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        benchmark.take_turns("test", 1, {"A": lambda: 1 / 0})
    assert gc.isenabled()


def test_flops_of_the_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by PyTorch, and here layer by layer; an addition and a multiplication are two."""
    for name, value in {**SMALL, "NET_ARCH": [16, 12]}.items():
        monkeypatch.setattr(benchmark, name, value)
    agent = benchmark.make_agent(dataset=benchmark.synthetic_dataset())
    critics = benchmark.critics_part(agent)
    with FlopCounterMode(display=False) as counter:
        critics()
    weights = [(benchmark.OBS_DIM + benchmark.ACTION_DIM) * 16, 16 * 12, 12 * 1]
    n_networks, batch_size = 2 * agent.critic.n_critics, 8
    n_sampled, n_graph = 3 * agent.cql_n_actions, 2  # the dataset's action and the drawn one have a gradient
    # What the first layer makes of a state is worked out once for all sampled actions
    forward = (n_sampled + n_graph) * sum(weights) - (n_sampled - 1) * benchmark.OBS_DIM * 16
    backward = n_graph * (2 * sum(weights) - weights[0])  # nobody needs the gradient of the networks' input
    assert counter.get_total_flops() == 2 * n_networks * batch_size * (forward + backward)
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())


@pytest.mark.usefixtures("small")
def test_written_dataset_repeats_what_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = benchmark.write_minari(str(tmp_path), 30, None)
    written = load_dataset(path)
    assert len(written) == 40
    assert written.episode_lengths.tolist() == [20, 20]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "own"))
    collect_dataset(None, "Pendulum-v1", 250, "pendulum/test-v0", seed=0)
    own = load_dataset("pendulum/test-v0")
    tiled = load_dataset(benchmark.write_minari(str(tmp_path / "tiled"), 300, "pendulum/test-v0"))
    assert tiled.episode_lengths.tolist() == [200, 50] * 2
    np.testing.assert_array_equal(tiled.actions, np.concatenate([own.actions] * 2))
    np.testing.assert_array_equal(tiled.observations, np.concatenate([own.observations] * 2))


def test_checkouts_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"needs --peers DIR with a checkout of tinkoff-ai/CORL"):
        benchmark_peers.find_checkout(None, "tinkoff-ai", "CORL")
    with pytest.raises(ImportError, match=r"no checkout CORL in "):
        benchmark_peers.find_checkout(tmp_path, "tinkoff-ai", "CORL")
    with pytest.raises(ImportError, match=r"nothing\.py does not exist"):
        benchmark_peers.import_file("nothing", tmp_path / "nothing.py")
    for name in ("tinkoff-ai+CORL", "CORL"):
        (tmp_path / name).mkdir()
        assert benchmark_peers.find_checkout(tmp_path, "tinkoff-ai", "CORL").name == name


def test_stubs_replace_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    benchmark_peers.stub("json", "not_there", "not_there.part")
    assert sys.modules["json"] is json
    assert isinstance(sys.modules["not_there"], MagicMock)
    assert isinstance(sys.modules["not_there.part"], MagicMock)


@ON_LINUX
def test_memory_of_this_process() -> None:
    before = benchmark.memory()
    # Pages that are new for certain: an allocator may have some from earlier tests
    with mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        after = benchmark.memory()
    assert after["VmHWM"] >= after["VmRSS"] > after["RssAnon"]
    assert after["RssAnon"] - before["RssAnon"] == pytest.approx(64, rel=0.1)
