"""Why a run ends."""

from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from common.data import total_steps
from common.figures import read_metrics, short_number
from common.run.report import Best

# What of early stopping lets a run go on, by why it has stopped.
_LIMITS = {
    EarlyStoppingReason.PATIENCE_EXHAUSTED: "more patience",
    EarlyStoppingReason.STOPPING_THRESHOLD: "another stopping_threshold",
    EarlyStoppingReason.DIVERGENCE_THRESHOLD: "another divergence_threshold",
}


def has_stopped(callback: EarlyStopping) -> bool:
    """Whether it has ended the run."""
    return callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED


def is_out_of_time(trainer: L.Trainer) -> bool:
    """Whether the time given is over before the run has come to its end."""
    over = any((timer.time_remaining() or 1) <= 0 for timer in _timers(trainer))
    return over and not _is_at_end(trainer) and not any(map(has_stopped, trainer.early_stopping_callbacks))


def early_end(trainer: L.Trainer) -> str | None:
    """At which step a run ends before its planned end, and why; None if it does not."""
    if _is_at_end(trainer):
        return None
    stopping = next(filter(has_stopped, trainer.early_stopping_callbacks), None)
    if stopping is not None:
        why = _why_stopped(stopping, Path(trainer.default_root_dir))
    elif is_out_of_time(trainer):
        over = [timer for timer in _timers(trainer) if (timer.time_remaining() or 1) <= 0]
        given = min(timer.time_elapsed() + (timer.time_remaining() or 0.0) for timer in over)
        why = f"max_time, {timedelta(seconds=round(given))}, is over; --ckpt_path last goes on"
    elif trainer.should_stop:
        why = "a callback has set trainer.should_stop"
    else:
        return None
    planned = total_steps(trainer)
    return f"at step {trainer.global_step:,}{f' of {planned:,}' if planned >= 0 else ''}: {why}"


def _why_stopped(callback: EarlyStopping, run: Path) -> str:
    """Which metric has stopped a run, and when it was best."""
    delta = f" by {abs(callback.min_delta):g}" if callback.min_delta else ""
    reasons = {
        EarlyStoppingReason.PATIENCE_EXHAUSTED: f"has not improved{delta}, patience {callback.patience}",
        EarlyStoppingReason.STOPPING_THRESHOLD: f"has reached stopping_threshold {callback.stopping_threshold}",
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"is beyond divergence_threshold {callback.divergence_threshold}",
        EarlyStoppingReason.NON_FINITE_METRIC: "is not finite",
    }
    best = Best(callback.monitor, callback.mode).find(read_metrics(run))
    when = f"; its best was {short_number(best[1])} at step {best[0] + 1:,}" if best else ""  # rows count from 0
    limit = _LIMITS.get(callback.stopping_reason)
    fix = f"; --ckpt_path last goes on if the callback is given {limit}" if limit else ""
    return f"EarlyStopping: {callback.monitor} {reasons[callback.stopping_reason]}{when}{fix}"


def _timers(trainer: L.Trainer) -> list[Timer]:
    return [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]


def _is_at_end(trainer: L.Trainer) -> bool:
    return 0 <= total_steps(trainer) <= trainer.global_step
