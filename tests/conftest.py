"""Puts the scripts on the path and keeps every test to two threads, as on the smallest machine."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

if not torch.cuda.is_available():  # before any test imports triton, which reads it only then
    os.environ.setdefault("TRITON_INTERPRET", "1")
