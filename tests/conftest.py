"""One thread per worker; few fuzz cases that are always the same, with ``-m fuzz`` many random ones."""

import gc
import hashlib
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch starts its threads: the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish(session):
    """Let garbage collection pass over modules and collected tests, and come less often: torch's exporter halves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, *gc.get_threshold()[1:])


def pytest_configure(config):
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # the fuzz targets skip themselves
        return
    common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("quick", max_examples=25, derandomize=True, **common)
    settings.register_profile("long", max_examples=250, print_blob=True, **common)
    settings.load_profile("long" if config.option.markexpr == "fuzz" else "quick")


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The tiny data set of six patients for tests that only read it; at the end its files are what they were."""
    from tests.helpers.tiny_data import make_dataset  # torch, after the number of threads is set

    root = make_dataset(tmp_path_factory.mktemp("shared") / "data")
    before = _contents(root)
    yield root
    assert _contents(root) == before, f"a test changed {root}, which others read; expected a data set of its own"


def _contents(root) -> dict:
    files = [path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
