"""What someone who watches a run sees: a line a log interval, below it on a terminal a live bar, and the time left."""

import math
import sys

from tqdm import tqdm

from training.estimate import format_duration

# The time left is the lines', not tqdm's own estimate, which knows neither of evaluations nor of the first step.
_BAR = "{n_fmt}/{total_fmt} {bar} {desc}"


class Progress:
    """Prints the records of metrics.jsonl, in short, and knows what is left of the plan."""

    def __init__(
        self,
        say,
        *,
        step,
        max_steps,
        log_every,
        eval_every,
        tokens_per_step,
        flops_per_token,
        peak_flops,
        dollars_an_hour,
    ):
        """
        Args:
            say: prints a line.
            step: where this launch begins.
            log_every, eval_every: steps.
            peak_flops: FLOP/s of all devices together.
            dollars_an_hour: of all devices together; None if not known.
        """
        self._say = say
        self._first_step, self._max_steps = step, max_steps
        self._log_every, self._eval_every = log_every, eval_every
        self._tokens_per_step = tokens_per_step
        self._peak_tokens_per_s = peak_flops / flops_per_token
        self._dollars_an_hour = dollars_an_hour
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            bar_format=_BAR,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._seconds, self._seconds_of_first = [], 0.0  # of the steps since the last line; of the one that compiles
        self._evaluation_seconds = []
        self.training_seconds = 0.0  # of all steps, evaluations and saving aside

    def stepped(self, record):
        """Takes a training step's record."""
        step, seconds = record["step"], record["ms"] / 1000
        steps_done = step - self._first_step
        self._seconds.append(seconds)
        self.training_seconds += seconds
        if steps_done == 1:
            self._seconds_of_first = seconds
        seconds_left = self._seconds_left(step)
        loss = math.nan if record["loss"] is None else record["loss"]
        self._bar.set_description_str(f"loss {loss:.4f}, {format_duration(seconds_left)} left", refresh=False)
        self._bar.update()
        if step % self._log_every and steps_done > 1:
            return
        seconds_a_step = sum(self._seconds) / len(self._seconds)
        tokens_per_s = self._tokens_per_step / seconds_a_step
        self._seconds.clear()
        money = f", ${seconds_left / 3600 * self._dollars_an_hour:,.2f}" if self._dollars_an_hour else ""
        self._say(
            f"step {step:>6,}/{self._max_steps:,} {step / self._max_steps:4.0%} | loss {record['loss']:.4f} | "
            f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {1000 * seconds_a_step:,.0f} ms | "
            f"{tokens_per_s:,.0f} tok/s | {tokens_per_s / self._peak_tokens_per_s:.1%} of peak | "
            f"{format_duration(seconds_left)}{money} left"
        )

    def evaluated(self, record):
        """Takes an evaluation's record."""
        self._evaluation_seconds.append(record["seconds"])
        line = f"step {record['step']:>6,} | val loss {record['val_loss']:.4f}"
        scores = record["hellaswag"]
        if scores:
            line += (
                f" | hellaswag acc_norm {scores['acc_norm']:.4f} ± {scores['acc_norm_stderr']:.4f}"
                f" ({'SAMPLE items' if scores['is_sample'] else 'items'}, n={scores['n']}"
                f"{', ' + str(scores['num_truncated']) + ' cut' if scores['num_truncated'] else ''}, "
                f"{record['hellaswag_seconds']:.1f} s)"
            )
        self._say(f"{line} | {record['seconds']:.1f} s")

    def close(self):
        self._bar.close()

    def _seconds_left(self, step: int) -> float:
        """Estimate the time of the steps and evaluations to come."""
        steps_left, steps_done = self._max_steps - step, step - self._first_step
        seconds_a_step = self.training_seconds / steps_done
        if steps_done > 1:  # the first one also compiles and warms up
            seconds_a_step = (self.training_seconds - self._seconds_of_first) / (steps_done - 1)
        seconds_left = seconds_a_step * steps_left
        if self._evaluation_seconds:
            mean = sum(self._evaluation_seconds) / len(self._evaluation_seconds)
            seconds_left += mean * math.ceil(steps_left / self._eval_every)
        return seconds_left
