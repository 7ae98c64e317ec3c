"""Shared by all tests: one thread, as cores are rarely idle; the repository root on the path; golden()."""
import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def golden(name):
    """All arrays of tests/golden/NAME.npz as torch tensors, shapes kept: floats as stored, integers as int64;
    strings stay numpy arrays."""
    def tensor(a):
        return torch.from_numpy(a.astype(np.int64) if a.dtype.kind in "iu" else a)
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as f:
        return {k: tensor(f[k]) if f[k].dtype.kind in "iufb" else f[k] for k in f.files}


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
