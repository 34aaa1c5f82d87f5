"""``omni-ray serve FILE``: as ``serve run FILE``, with the file checked, Serve's fast path on, and progress lines."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from omni_ray.cli.announce import announcement
from omni_ray.cli.cluster import Cluster
from omni_ray.cli.progress import ProgressLines
from omni_ray.cli.ready import ask_ready, phase_of
from omni_ray.config.serve_file import OmniApplication, ServeFile
from omni_ray.errors import ConfigError, Unavailable

POLL_INTERVAL_S = 0.5
ASK_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 30.0


def serve(file: ServeFile, host: str | None, port: int | None) -> int:
    """Serve the file until Ctrl-C or SIGTERM, then stop what was started.

    Raises:
        ConfigError: the file cannot be served.
        Unavailable: its deployment failed; the message says why.
    """
    file = _listen_at(file, host, port)
    _check_http(file)
    # As Ctrl-C. Ray puts a handler of its own in its place, which is then replaced again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster(file)
    try:
        cluster.start()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        cluster.deploy()
        _wait_until_ready(cluster, file)
        print(announcement(cluster.url, file.omni_applications), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return 0
    finally:
        cluster.stop()


def _listen_at(file: ServeFile, host: str | None, port: int | None) -> ServeFile:
    """The file with its HTTP address spelt out, because Ray's own default is all interfaces."""
    options = file.http_options
    address = {"host": host or options.host, "port": port if port is not None else options.port}
    return file.model_copy(update={"http_options": options.model_copy(update=address)})


def _check_http(file: ServeFile) -> None:
    hidden = [app.name for app in file.omni_applications if app.route_prefix is None]
    if file.proxy_location == "Disabled" or hidden:
        what = f"route_prefix of {hidden[0]} is null" if hidden else "proxy_location is Disabled"
        raise ConfigError(f"{what}, but omni-ray serve serves HTTP; change it, or take `serve run`")


def _wait_until_ready(cluster: Cluster, file: ServeFile) -> None:
    """Returns when every application runs and answers; keeps the progress lines until then."""
    groups = [group.id for app in file.omni_applications for group in app.args.groups]
    lines = ProgressLines(groups, sys.stdout)
    last_answer = time.monotonic()
    while True:
        cluster.raise_if_failed()
        answers = [_ask(cluster.url, app) for app in file.omni_applications]
        for group in [group for answer in answers if answer for group in answer["groups"]]:
            lines.update(group["group"], *phase_of(group))
        lines.draw()
        if not cluster.is_running or all(answers):
            last_answer = time.monotonic()
        if cluster.is_running and all(answer and answer["ready"] for answer in answers):
            return
        if time.monotonic() - last_answer > ANSWER_TIMEOUT_S:
            raise Unavailable(f"everything runs, but nothing answers at {cluster.url} for {ANSWER_TIMEOUT_S:.0f} s")
        time.sleep(POLL_INTERVAL_S)


def _ask(url: str, application: OmniApplication) -> dict[str, Any] | None:
    return ask_ready(url + (application.route_prefix or "").rstrip("/"), ASK_TIMEOUT_S, verify=False)
