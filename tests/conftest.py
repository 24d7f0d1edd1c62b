"""One thread per test process: the models are tiny, and threads that wait for one another are slower than one.

Features are cached in a folder of the test process, never in the user's.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PATCHLOOM_CACHE"] = tempfile.mkdtemp(prefix="patchloom-test-cache-")
atexit.register(shutil.rmtree, os.environ["PATCHLOOM_CACHE"], ignore_errors=True)
