"""What a run costs: wall and CPU seconds, and the most memory that the process held while it ran."""

import ctypes
import gc
import os
import threading
import time
from pathlib import Path

import torch

INTERVAL = 0.01  # seconds between two looks at the resident size


class Meter:
    """A context that measures its block: ``seconds``, ``cpu_seconds``, and in MB ``peak`` and ``rise``.

    On the CPU ``peak`` is the resident size of the whole process, looked at every 10 ms by a thread: libraries, weights and operators
    included; ``rise`` is what the block added to it, after memory that was free already has been handed back. On CUDA both are what
    torch allocated. None where neither is to be had.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds = self.cpu_seconds = 0.0
        self.peak: float | None = None
        self.rise: float | None = None

    def __enter__(self) -> "Meter":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: float | None = torch.cuda.memory_allocated(self.device)
        else:
            _hand_back()
            self._before = self._most = resident()
            self._over = threading.Event()
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds, self.cpu_seconds = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        if self.device.type == "cuda":
            most: float | None = torch.cuda.max_memory_allocated(self.device)
        else:
            self._over.set()
            self._watch.join()
            most = self._most
        if most is not None and self._before is not None:
            self.peak, self.rise = most / 2**20, (most - self._before) / 2**20

    def _look(self) -> None:
        while True:
            now = resident()
            if now is None or self._most is None:
                return
            self._most = max(self._most, now)
            if self._over.wait(INTERVAL):
                return


def resident() -> float | None:
    """Bytes of this process that are in memory; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return None
    return pages * float(os.sysconf("SC_PAGE_SIZE"))


def _hand_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
