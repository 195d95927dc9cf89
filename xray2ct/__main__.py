"""``python -m xray2ct --version``: which version this is, and where the commands are."""

from __future__ import annotations

import argparse

from xray2ct import __version__

COMMANDS = (
    "prepare_data.py, train_enhanced_4gpu.py, train_refinement_4gpu.py, evaluate.py, reconstruct.py, export_onnx.py"
)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m xray2ct", description=f"The commands are {COMMANDS}: see README.md."
    )
    parser.add_argument("--version", action="version", version=f"xray2ct {__version__}")
    parser.parse_args(argv)
    parser.print_help()


if __name__ == "__main__":
    main()
