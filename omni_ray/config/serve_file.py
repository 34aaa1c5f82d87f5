"""The file around the spec: Ray Serve's own config schema, typed, so that a misspelt key of it is refused too.

Ray ignores keys that it does not know. These are all that it does (`ray.serve.schema.ServeDeploySchema`); a test
compares them with the installed Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from omni_ray.config.live import LiveConfig
from omni_ray.config.nearest import hint
from omni_ray.config.spec import ArGroup, Block, DitGroup, OmniSpec, Pipeline

BUILDERS = ("omni_ray.app:build", "omni_ray.app.build")


class HttpOptions(Block):
    """Where Ray Serve listens for HTTP. Without a host `serve run` takes all interfaces, `omni-ray serve` loopback."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = Field(None, gt=0)
    keep_alive_timeout_s: int = Field(90, ge=0)
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class GrpcOptions(Block):
    """Where Ray Serve listens for gRPC, if at all."""

    port: int = Field(9000, ge=0, le=65535)
    grpc_servicer_functions: list[str] = Field(default_factory=list)
    request_timeout_s: float | None = Field(None, gt=0)
    enable_reflection: bool = True


class LoggingConfig(Block):
    """How Ray Serve logs."""

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: Any = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True
    additional_log_standard_attrs: list[str] = Field(default_factory=list)


class Application(Block):
    """One application of the file. Its ``args`` are checked where it is ours, and left alone where it is not."""

    name: str = Field("default", min_length=1)
    route_prefix: Annotated[str, Field(pattern=r"^/([^{}]*[^{}/])?$")] | None = "/"
    import_path: str = Field(description=f"The builder of the application: {BUILDERS[0]}.")
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    deployments: list[dict[str, Any]] = Field(default_factory=list)
    autoscaling_policy: dict[str, Any] | None = None
    args: Any = None
    logging_config: LoggingConfig | None = None
    external_scaler_enabled: bool = False


class OmniApplication(Application):
    """An application of omni_ray."""

    import_path: Literal["omni_ray.app:build", "omni_ray.app.build"]
    args: OmniSpec = Field(description="The spec: models, and how they are served.")

    @model_validator(mode="after")
    def _deployments_are_known(self) -> Self:
        groups = {deployment_name(group.id): group for group in self.args.groups}
        known = ("Router", "Api", *groups)
        for i, deployment in enumerate(self.deployments):
            name, live = str(deployment.get("name")), deployment.get("user_config") or {}
            if name not in known:
                raise ValueError(f"deployments[{i}].name: {name!r} is no deployment of this file; {hint(name, known)}")
            of_group = live if name == "Router" else {name: live} if isinstance(groups.get(name), DitGroup) else {}
            for config in of_group.values():
                try:
                    LiveConfig.model_validate(config)
                except ValidationError as error:
                    wrong = error.errors()[0]
                    key = ".".join(map(str, wrong["loc"]))
                    what = "changes in no running group" if wrong["type"] == "extra_forbidden" else wrong["msg"]
                    raise ValueError(f"deployments[{i}].user_config: {key}: {what}") from None
        return self


def deployment_name(group_id: str) -> str:
    """What Ray Serve calls the deployment of a group."""
    return group_id.replace(":", "--")


def is_ours(application: dict[str, Any]) -> bool:
    """True also where the path is only meant to be ours, so that its spelling is checked."""
    return str(application.get("import_path")).startswith("omni_ray")


def _whose(application: Any) -> str:
    return "ours" if isinstance(application, dict) and is_ours(application) else "foreign"


class ServeFile(Block):
    """A whole file, as `serve run FILE` takes it."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = Field(default_factory=HttpOptions)
    grpc_options: GrpcOptions = Field(default_factory=GrpcOptions)
    controller_options: dict[str, Any] | None = None
    logging_config: LoggingConfig | None = None
    tracing_config: dict[str, Any] | None = None
    applications: list[
        Annotated[
            Annotated[OmniApplication, Tag("ours")] | Annotated[Application, Tag("foreign")], Discriminator(_whose)
        ]
    ] = Field(min_length=1, description="The applications to serve.")
    target_capacity: float | None = Field(None, ge=0, le=100)

    @property
    def omni_applications(self) -> list[OmniApplication]:
        return [app for app in self.applications if isinstance(app, OmniApplication)]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        problems = []
        for key in ("name", "route_prefix"):
            seen: dict[str, int] = {}
            for i, app in enumerate(self.applications):
                value = getattr(app, key)
                if value is not None and seen.setdefault(value, i) != i:
                    problems.append(f"applications[{i}].{key} = {value!r} is also applications[{seen[value]}]'s")
        if problems:
            raise ValueError("\n".join(problems))
        return self


# What pydantic puts into the location of an error after the index of a list's item, and the block that it stands for.
TAGS: dict[str, type[Block]] = {
    "ours": OmniApplication,
    "foreign": Application,
    "ar": ArGroup,
    "dit": DitGroup,
    "pipeline": Pipeline,
}
