"""``python -m xray2ct --version``: which version this is, and where the commands are."""

from __future__ import annotations

from xray2ct.command_line import Parser

COMMANDS = (
    "prepare_data.py, train_enhanced_4gpu.py, train_refinement_4gpu.py, evaluate.py, reconstruct.py, export_onnx.py"
)


def main(argv=None) -> None:
    parser = Parser(prog="python -m xray2ct", description=f"The commands are {COMMANDS}: see README.md.")
    parser.parse_args(argv)
    parser.print_help()


if __name__ == "__main__":
    main()
