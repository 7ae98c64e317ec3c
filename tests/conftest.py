"""Shared by all tests: one thread (two cores are rarely idle), the repository root on the path, golden arrays by name."""
import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def golden(name):
    """All arrays of tests/golden/NAME.npz as a dict of torch tensors (float32 / float64 / int64 as stored, int32 widened)."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as f:
        out = {}
        for k in f.files:
            a = f[k]
            out[k] = torch.from_numpy(a.astype(np.int64) if a.dtype.kind in "iu" else np.ascontiguousarray(a)) \
                if a.dtype.kind in "iufb" else a
        return out


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long demonstrations (minutes each)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --slow"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
