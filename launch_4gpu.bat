@echo off
rem Set up what is missing, then train on the GPUs of this machine (or run the demo, the tests, the smoke test).
rem
rem   launch_4gpu.bat --data data\prepared      train both stages in sequence; options go to both scripts
rem   launch_4gpu.bat --preset laptop --data ROOT      both stages, small enough for a CPU, into runs\laptop
rem   launch_4gpu.bat demo                      phantoms, training, scores and pictures, in minutes
rem   launch_4gpu.bat test                      the tests
rem   launch_4gpu.bat smoke --data ROOT         checks before a long training
rem   launch_4gpu.bat stage1 --data ROOT        the first stage only: options of train_enhanced_4gpu.py
rem   launch_4gpu.bat stage2 --data ROOT        the second stage only: options of train_refinement_4gpu.py
rem
rem Where packages are missing they are installed into .venv, once: about 0.3 GB, less than a minute at 100 Mbit/s.
rem What happens is in tools/launch.py, which launch_4gpu.sh starts on Linux and macOS.
setlocal
set "PYTHON=python"
if defined VIRTUAL_ENV goto start
if defined CONDA_PREFIX goto start
where py >nul 2>nul
if not errorlevel 1 set "PYTHON=py -3"
:start
%PYTHON% -c "import sys; sys.exit(sys.version_info < (3, 10))"
if errorlevel 1 goto old
if defined PYTHONPATH set "PYTHONPATH=;%PYTHONPATH%"
set "PYTHONPATH=%~dp0%PYTHONPATH%"
%PYTHON% "%~dp0tools\launch.py" %*
exit /b %ERRORLEVEL%

:old
echo error: %PYTHON% is not Python 3.10 or newer: install one, or activate its environment 1>&2
exit /b 2
