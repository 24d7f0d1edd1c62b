"""One thread per test process: the models are tiny, and threads that wait for one another are slower than one.

Features are cached in a folder of the test process, never in the user's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PATCHLOOM_CACHE"] = tempfile.mkdtemp(prefix="patchloom-test-cache-")
atexit.register(shutil.rmtree, os.environ["PATCHLOOM_CACHE"], ignore_errors=True)

with contextlib.suppress(ImportError):
    from hypothesis import settings

    # What is right does not depend on how busy the machine is.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
