"""Training for so many minutes, with a learning rate that has come to its end by then: `--max_minutes` of the scripts."""

import torch
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from revdeq_hf.checkpoints import ResumableTrainer

MAX_MINUTES = (
    "Stop training after so many minutes, evaluations and checkpoints on the way included. The learning rate follows the share "
    "of the minutes or of the updates that is past, whichever is greater, so it has come to its end in either case."
)


def check_minutes(minutes: float | None) -> None:
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--max_minutes must be positive, got {minutes}")


class TimeLimit(TrainerCallback):
    """Stops training after some minutes, those before an interruption included; rank 0's clock counts."""

    def __init__(self, minutes: float, trainer: ResumableTrainer) -> None:
        self.minutes, self.trainer, self.seconds = minutes, trainer, 0.0

    @property
    def share(self) -> float:
        return self.seconds / (60 * self.minutes)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:  # before the scheduler's step
        self.seconds = float(broadcast(torch.tensor(self.trainer.clock.seconds, device=args.device)))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.share >= 1:
            control.should_training_stop = True


class TimedTrainer(ResumableTrainer):
    """Stops after `args.max_minutes`, if there is such a limit, and its schedule with it."""

    def __init__(self, *arguments, **kwargs) -> None:
        super().__init__(*arguments, **kwargs)
        self.limit = None if self.args.max_minutes is None else TimeLimit(self.args.max_minutes, self)
        if self.limit is not None:
            self.add_callback(self.limit)

    @property
    def share(self) -> float:
        """Of the updates or of the minutes that is past, whichever is greater."""
        past = self.state.global_step / self.state.max_steps
        return past if self.limit is None else max(past, min(self.limit.share, 1.0))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        limit = self.limit
        if limit is not None:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(f"--max_minutes needs a schedule that depends on the update alone, got {self.args.lr_scheduler_type}")

            def follow(schedule):
                return lambda update: schedule(max(update, int(min(limit.share, 1.0) * num_training_steps)))

            scheduler.lr_lambdas = [follow(schedule) for schedule in scheduler.lr_lambdas]
        return scheduler
