"""A `torch.save` that takes its time."""

import io
import time
from pathlib import Path

import torch

PLAIN = torch.save


class SlowSave:
    """In place of `torch.save`: half of the file, a pause in the thread, then the whole."""

    def __init__(self, seconds, fail_at=None):
        self.seconds, self.fail_at, self.calls, self.running = seconds, fail_at, 0, []

    def __call__(self, state, file, **options):
        self.calls += 1
        self.running.append(file)
        whole = io.BytesIO()
        PLAIN(state, whole, **options)
        Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        time.sleep(self.seconds)
        if self.calls == self.fail_at:
            raise OSError(28, "No space left on device")
        Path(file).write_bytes(whole.getvalue())
        self.running.remove(file)
