"""A trace of a few training steps, and what in them takes the most time."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ratlip import distributed

LARGEST = 10  # items printed


class Trace:
    """Traces the third to fifth step of a run, or those that there are, into `<folder>/steps.pt.trace.json`, which
    TensorBoard's profiler plugin and ui.perfetto.dev open; the first process only.

    Args:
        wanted: False: does nothing. folder: the run's logs.
    """

    def __init__(self, wanted: bool, folder: Path):
        self.path, self.profiler = folder / "steps.pt.trace.json", None
        if wanted and distributed.rank() == 0:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            steps = schedule(wait=1, warmup=1, active=3, repeat=1)
            self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=self._keep)
            self.profiler.start()

    def step(self) -> None:
        """A training step has ended."""
        if self.profiler is not None:
            self.profiler.step()

    def close(self) -> None:
        """Write what there is of a trace that did not come to its end."""
        if self.profiler is not None:
            self.profiler.stop()

    def _keep(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        place = "cuda" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"self_{place}_time_total", row_limit=LARGEST)
        distributed.say(f"{table}\ntrace        {self.path}")
