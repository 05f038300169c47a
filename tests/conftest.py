"""What every test shares: nothing but a quiet machine. Fixtures live beside the tests of their package."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
