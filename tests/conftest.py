"""One thread per worker; few fuzz cases that are always the same, with ``-m fuzz`` many random ones."""

import gc
import os

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
