"""One thread per test process: the models are tiny, and threads that wait for one another are slower than one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
