"""Two nodes: torchrun's rendezvous between two network namespaces, which see each other by one cable only."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import train_enhanced_4gpu
from tests.helpers.paths import ROOT
from tests.helpers.runs import command, environment, events, weights
from tests.helpers.tiny_data import make_dataset

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation (RFC 5737): no real host has them
PORT = 29400
LONGER = ("training.num_epochs=3", "data.repeats=4", "logging.checkpoint_minutes=0.0")
PATIENCE_S = 240


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, encoding="utf-8", errors="replace", check=True).stdout


def why_not() -> str:
    """Why this machine cannot make network namespaces; empty when it can."""
    if not shutil.which("ip"):
        return "needs ip (Debian's iproute2)"
    name = f"ct-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, encoding="utf-8", errors="replace")
    if made.returncode:
        return f"network namespaces cannot be made here ({made.stderr.strip()})"
    ip("netns", "del", name)
    return ""


@pytest.fixture
def hosts():
    """Names of two namespaces, joined by a virtual cable; removed with whatever still runs in them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    names = [f"ct-node{i}-{os.getpid()}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"cable{i}")
            ip("-n", name, "link", "set", f"cable{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            lose_node(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def lose_node(name):
    """SIGKILL to everything on a node: what a power failure leaves."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


def start_node(hosts, index, training, log):
    """torchrun on one node, with the command of docs/clusters.md.

    Both nodes share this machine's host name, so each is told its address and which one holds the rendezvous.
    """
    words = ["ip", "netns", "exec", hosts[index], sys.executable, "-m", "torch.distributed.run"]
    words += ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_id", "test"]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}"]
    # A node that is silent for 3 s counts as lost; by default it is 15 s.
    words += ["--rdzv_conf", f"is_host={int(index == 0)},keep_alive_interval=1", "--local_addr", ADDRESSES[index]]
    own = {**environment(), "GLOO_SOCKET_IFNAME": f"cable{index}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "a") as stream:
        return subprocess.Popen([*words, *training[1:]], cwd=ROOT, env=own, stdout=stream, stderr=stream)


def wait_for(what, condition, *logs):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        printed = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s\n{printed}"
        time.sleep(0.02)


def steps_logged(output):
    return len(events(output, "step")) if (output / "log.jsonl").exists() else 0


def test_a_lost_node_comes_back_and_both_end_with_the_result_of_one_host(hosts, tmp_path):
    root, one, both = make_dataset(tmp_path / "data"), tmp_path / "one", tmp_path / "both"
    logs = [tmp_path / "node0.log", tmp_path / "node1.log"]
    training = command(root, both, *LONGER)
    nodes = [start_node(hosts, i, training, logs[i]) for i in range(2)]
    wait_for("six steps", lambda: steps_logged(both) >= 6 or nodes[0].poll() is not None, *logs)
    assert nodes[0].poll() is None, logs[0].read_text(encoding="utf-8", errors="replace")
    lose_node(hosts[1])
    assert nodes[1].wait(timeout=60) == -signal.SIGKILL
    before = steps_logged(both)
    assert before < 18  # it was lost in the middle
    nodes[1] = start_node(hosts, 1, training, logs[1])
    for node, log in zip(nodes, logs):
        assert node.wait(timeout=PATIENCE_S) == 0, log.read_text(encoding="utf-8", errors="replace")
    printed = logs[0].read_text(encoding="utf-8", errors="replace")
    assert "Processes: 2 on cpu" in printed
    assert "Resumed" in printed

    assert train_enhanced_4gpu.main(command(root, one, *LONGER)[2:]) == 0
    a, b = weights(one / "last.pt"), weights(both / "last.pt")
    assert a.keys() == b.keys()
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4
    psnr = [events(output, "validation")[-1]["psnr"] for output in (one, both)]
    assert psnr[0] == pytest.approx(psnr[1], abs=1e-3)


def test_the_slurm_script_starts_torchrun_with_the_allocation(tmp_path):
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", 'printf "gpu7\\ngpu9\\n"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    allocation = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "gpu[7,9]", "SLURM_NNODES": "2"}
    allocation |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / "docs" / "train.sbatch"), "--data", "my data"],
        env=allocation,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    pairs = dict(itertools.pairwise(words))
    assert words[1] == "torchrun"
    assert (pairs["--nnodes"], pairs["--nproc_per_node"], pairs["--rdzv_endpoint"]) == ("2", "4", "gpu7:29400")
    assert words[-5:] == ["train_enhanced_4gpu.py", "--set", "world_size=8", "--data", "my data"]
