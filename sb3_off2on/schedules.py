"""Learning-rate schedules, as classes, so that checkpoints can name them."""

from stable_baselines3.common.type_aliases import Schedule


class ScaledSchedule:
    """
    A schedule times a constant.

    :param schedule: the schedule
    :param factor: the constant
    """

    def __init__(self, schedule: Schedule, factor: float):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, progress_remaining: float) -> float:
        return self.factor * self.schedule(progress_remaining)

    def __repr__(self) -> str:
        return f"ScaledSchedule(schedule={self.schedule}, factor={self.factor})"
