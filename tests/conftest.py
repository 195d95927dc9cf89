"""How many cases the fuzz targets draw: a few always the same ones, with ``-m fuzz`` many random ones."""


def pytest_configure(config):
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # test_fuzz.py says so
        return
    common = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("quick", max_examples=25, derandomize=True, **common)
    settings.register_profile("long", max_examples=250, print_blob=True, **common)
    settings.load_profile("long" if config.option.markexpr == "fuzz" else "quick")
