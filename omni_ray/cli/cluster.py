"""Ray as the command line uses it: started here or joined, with Ray Serve and the file's applications on it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Any

from omni_ray.cli.environment import environment
from omni_ray.config.serve_file import ServeFile
from omni_ray.errors import ConfigError, Unavailable, without_traceback
from omni_ray.orphans import leave_none

WILDCARDS = ("", "0.0.0.0", "::")


class Cluster:
    """A Ray of our own, or, where RAY_ADDRESS is set, the one that it names, whose environment is left alone."""

    def __init__(self, file: ServeFile) -> None:
        self._file = file
        self._http = file.http_options
        self._is_own = "RAY_ADDRESS" not in os.environ
        self.is_running = False
        """Whether every application of the file runs, as :meth:`raise_if_failed` last saw it."""

    def start(self) -> None:
        """Start Ray, or join it. Raises ConfigError if the HTTP port is taken."""
        if self._is_own:
            self._check_port()
            _set_environment()
            leave_none()
        import ray

        context = ray.init(
            "local" if self._is_own else None, namespace="serve", log_to_driver=False, logging_level=logging.WARNING
        )
        if self._is_own:
            print(f"Ray is up; logs are in {context.address_info['session_dir']}/logs/serve", flush=True)

    def deploy(self) -> None:
        """Hand the file to Ray Serve, the way that ``serve run`` does, and do not wait."""
        from ray.serve._private.api import serve_start
        from ray.serve.config import gRPCOptions
        from ray.serve.schema import ServeDeploySchema

        # Not before the imports, which set it.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        schema = ServeDeploySchema.model_validate(self._file.model_dump(mode="json", exclude_unset=True))
        client = serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
            controller_options=schema.controller_options,
        )
        client.deploy_apps(schema)

    def raise_if_failed(self) -> None:
        """Look at the applications. Raises Unavailable if one cannot be deployed; its message is Ray Serve's."""
        from ray import serve

        found = serve.status().applications
        apps = {app.name: found[app.name] for app in self._file.applications if app.name in found}
        for name, app in apps.items():
            if app.status == "DEPLOY_FAILED":
                messages = [
                    app.message,
                    *(each.message for each in app.deployments.values() if "FAILED" in each.status),
                ]
                reasons = dict.fromkeys(without_traceback(message) for message in messages)
                raise Unavailable("\n".join([f"application {name!r} could not be deployed:", *reasons]))
        self.is_running = len(apps) == len(self._file.applications) and all(
            app.status == "RUNNING" for app in apps.values()
        )

    def stop(self) -> None:
        """End what :meth:`deploy` and :meth:`start` began, and nothing else."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        print("stopping", flush=True)
        if self._is_own:
            serve.shutdown()
        else:
            for application in self._file.applications:
                serve.delete(application.name)
        ray.shutdown()

    @property
    def url(self) -> str:
        """Where HTTP is answered: the host of the file, or an address of this machine or of a node with a proxy."""
        host = self._http.host
        if host in WILDCARDS:
            host = "127.0.0.1" if self._is_own else _proxy_ip()
        return f"http{'s' if self._http.ssl_certfile else ''}://{host}:{self._http.port}"

    def _check_port(self) -> None:
        """Serve's HAProxy would share a taken port with whoever has it, and get every other request."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self._http.host, self._http.port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"cannot listen at {self._http.host}: {error.strerror}") from error
                where = f"port {self._http.port} of {self._http.host}"
                raise ConfigError(f"{where} is in use; stop what listens there, or choose another --port") from error


def _set_environment() -> None:
    """A variable that is set already stays."""
    os.environ.update(environment())
    for name, port in (("RAY_SERVE_HAPROXY_METRICS_PORT", 9101), ("RAY_SERVE_HAPROXY_STATS_PORT", 8404)):
        os.environ.setdefault(name, str(_free_port(port)))  # HAProxy's own pages; another server may have them


def _free_port(wanted: int) -> int:
    """``wanted``, or another one if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _proxy_ip() -> str:
    import ray
    from ray import serve

    proxies = serve.status().proxies
    nodes: list[dict[str, Any]] = ray.nodes()
    return next((node["NodeManagerAddress"] for node in nodes if node["NodeID"] in proxies), "127.0.0.1")
