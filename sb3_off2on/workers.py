"""Environments in processes of their own, of which one may die."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import wait
from threading import Thread

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper


def _unwrapped(env: VecEnv | None) -> VecEnv | None:
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env


@contextmanager
def watched_workers(env: VecEnv | None) -> Iterator[None]:
    """
    While this is open, nobody waits for a dead worker. Those of ``start_method="fork"`` hold copies of each other's pipes, so
    that SB3 would not be told: here the death of one ends all. With the other methods there is nothing to do.

    :param env: environments of any kind
    """
    env = _unwrapped(env)
    if not isinstance(env, SubprocVecEnv) or getattr(env.processes[0], "_start_method", None) != "fork":
        yield
        return
    processes = env.processes
    receiver, sender = Pipe(duplex=False)

    def watch() -> None:
        if receiver not in wait([receiver, *(process.sentinel for process in processes)]):
            for process in processes:
                process.kill()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sender.send(None)  # closing would not do: a process forked in the meantime has a copy of this end
        sender.close()
        thread.join()
        receiver.close()


def close_dead_workers(env: VecEnv) -> list[str]:
    """
    Close environments in processes of which some died. SB3's ``close()`` would wait for answers of those, too.

    :param env: environments of any kind
    :return: indices of those that died, each with its exit code; if none did, or they are not in processes, nothing happens
    """
    unwrapped = _unwrapped(env)
    if not isinstance(unwrapped, SubprocVecEnv):
        return []
    # Whoever died may have closed its pipe a moment before
    wait([process.sentinel for process in unwrapped.processes], timeout=10.0)
    codes = [process.exitcode for process in unwrapped.processes]
    dead = [f"{index} died (exit code {code})" for index, code in enumerate(codes) if code is not None]
    if dead:
        for process, remote in zip(unwrapped.processes, unwrapped.remotes, strict=True):
            process.kill()
            process.join()
            remote.close()
        unwrapped.closed = True
    return dead
