#!/usr/bin/env bash
# Set up what is missing, then train on up to 4 GPUs (or run the demo, the tests, the smoke test).
#
#   bash launch_4gpu.sh --data data/prepared      train both stages in sequence; options go to both scripts
#   bash launch_4gpu.sh --preset laptop --data ROOT      both stages, small enough for a CPU, into runs/laptop
#   bash launch_4gpu.sh demo                      phantoms -> training -> scores and pictures, in minutes
#   bash launch_4gpu.sh test                      the tests
#   bash launch_4gpu.sh smoke --data ROOT         checks before a long training
#   bash launch_4gpu.sh stage1 --data ROOT        the first stage only: options of train_enhanced_4gpu.py
#   bash launch_4gpu.sh stage2 --data ROOT        the second stage only: options of train_refinement_4gpu.py
#
# Where packages are missing they are installed into .venv, once: about 2.8 GB with torch's CUDA libraries on Linux,
# 4 minutes at 100 Mbit/s; 0.3 GB without them.
# What happens is in tools/launch.py, which launch_4gpu.bat starts on Windows.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python3
if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    python=python # the one of the activated environment
fi
if ! "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))"; then
    echo "error: $python is not Python 3.10 or newer: install one, or activate its environment" >&2
    exit 2
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # the package need not be installed
exec "$python" "$here/tools/launch.py" "$@" # by path: a module named tools in the current folder is not ours
