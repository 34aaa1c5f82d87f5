"""Ends the processes that another would leave behind when it is killed: vLLM's engine core and Ray Serve's HAProxy do
not notice that their parent is gone.

`leave_none` marks the environment, which all later child processes inherit, and starts a guard: this file as a small
script, which sleeps on a pipe until the process is gone, however it went, and then kills whatever bears the mark.
"""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

MARK = "OMNI_RAY_MARK"


def leave_none() -> None:
    """From now on no child process of this one outlives it. Linux only, by `/proc`."""
    global _guard  # the pipe must live as long as the process
    if _guard is not None:
        return
    mark = os.environ[MARK] = uuid.uuid4().hex
    # Without this, processes that set their title (vLLM's do) write over the environment that `/proc` shows.
    os.environ["SPT_NOENV"] = "1"
    _guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark], stdin=subprocess.PIPE, start_new_session=True
    )


_guard: "subprocess.Popen[bytes] | None" = None


def kill_marked(mark: str) -> None:
    """SIGKILL every process, save this one, whose environment bears ``mark``."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:  # it ended meanwhile, or belongs to another user
                continue


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])
