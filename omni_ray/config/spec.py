"""The one definition of every knob. YAML, command line, `/v1/models` and the configuration table all come from here.

A spec is a list of models. An `ar` model is a group of vLLM replicas, a `dit` model a group of diffusers replicas, a
`pipeline` a chain of the two. Several groups may bear one name as profiles: a request picks one by ``name:profile``,
and the name alone means the first of them. Unknown keys are refused; so is, by name, a value that is not supported yet.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from omni_ray.config import vllm_names
from omni_ray.config.block import Block as Block
from omni_ray.config.block import Positive
from omni_ray.config.levers import Attention as Attention
from omni_ray.config.levers import Cache as Cache
from omni_ray.config.levers import CacheDitOptions as CacheDitOptions
from omni_ray.config.levers import Compile as Compile
from omni_ray.config.levers import DitOffload as DitOffload
from omni_ray.config.levers import DitQuantization as DitQuantization
from omni_ray.config.levers import Vae as Vae
from omni_ray.config.nearest import hint
from omni_ray.config.parallel import ArParallel as ArParallel
from omni_ray.config.parallel import DitParallel as DitParallel
from omni_ray.config.parallel import Parallel as Parallel

MediaHost = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*(:\d{1,5})?$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128)]

DEMO_SOURCES = ("demo:chat", "demo:image", "demo:video")


class Autoscaling(Block):
    """Bounds between which a group's replicas are scaled by the work that waits for them."""

    min_replicas: int = Field(1, ge=0, description="Replicas kept when idle; 0 lets the last one go too.")
    max_replicas: Positive = Field(description="Replicas at full load.")
    target_outstanding_s: float = Field(
        30.0, gt=0, description="Of a DiT group: seconds of device time that may wait before each replica."
    )
    target_ongoing_requests: float = Field(32.0, gt=0, description="Of an AR group: requests in flight per replica.")
    target_waiting_tokens: float = Field(
        16_384.0,
        gt=0,
        description="Of an AR group: prompt tokens that may wait, all replicas together, before one is added.",
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="More must have been wanted for so long.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Fewer must have been wanted for so long.")
    downscale_to_zero_delay_s: float = Field(900.0, ge=0, description="The last one goes after so long without work.")
    look_back_period_s: float = Field(15.0, gt=10, description="Figures older than this do not count.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas = {self.min_replicas} is above max_replicas = {self.max_replicas}; swap them"
            )
        return self


class Memory(Block):
    """How much device memory a rank may take."""

    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Fraction of each GPU's memory that a rank may use."
    )
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of an AR replica that runs on a CPU, in GiB.")


class ArOffload(Block):
    """Weights kept in host memory."""

    cpu_offload_gb: float = Field(
        0.0, ge=0, description="GiB of weights per rank that vLLM keeps in host memory; 0 is off."
    )


class Batching(Block):
    """What the gate may join into one forward."""

    max_num_seqs: Positive = Field(8, description="Requests that run side by side in one replica.")
    max_num_batched_tokens: Positive = Field(
        12288,
        description="Tokens of one joined forward, text included; a request alone always runs, so 1 joins none.",
    )


class Limits(Block):
    """What one request may ask for; more gets a 400 that names the field."""

    max_pixels: Positive = Field(2048 * 2048, description="Width x height.")
    max_steps: Positive = Field(200, description="Denoise steps.")
    max_outputs: Positive = Field(10, description="Images per request.")
    max_frames: Positive = Field(241, description="Frames of a video.")
    max_prompt_chars: Positive = Field(32768, description="Characters of the prompt.")


class Queue(Block):
    """The bounded queue in front of a group; a full one answers 429."""

    max_queued_requests: Positive = Field(256, description="Requests that wait for a free place.")


class Group(Block):
    """What AR and DiT groups have in common."""

    name: Name = Field(description="The model name that requests use.")
    profile: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")] | None = Field(
        None, description="Tells groups of one name apart: `name:profile`."
    )
    source: str = Field(min_length=1, description="A local folder, a hub id, or one of the shipped `demo:` models.")
    num_replicas: Positive = Field(1, description="Replicas of the group.")
    autoscaling: Autoscaling | None = Field(
        None, description="Lets the number of replicas follow the load, in place of `num_replicas`."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="`auto` takes GPUs where the cluster has any.")
    num_cpus: float = Field(0.5, gt=0, description="Ray CPUs that each rank reserves.")
    num_gpus: float = Field(
        1.0, gt=0, le=1, description="Ray GPUs that each rank reserves, where it runs on one; below 1, ranks share it."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Number format of weights and activations; `auto` is the checkpoint's, on a CPU the engine's best.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")
    allow_pickle_weights: bool = Field(
        False,
        description="Load weights of `.bin`, `.pt` or `.ckpt` files where there are no safetensors: reading a pickle "
        "can run code that is in it.",
    )
    memory: Memory = Field(default_factory=Memory, description="Device memory.")
    queue: Queue = Field(default_factory=Queue, description="The queue in front of the group.")
    drain_s: float = Field(20.0, ge=0, description="Seconds in which a replica that is to stop may end its requests.")

    @property
    def id(self) -> str:
        """Name of the group's deployment, unique in the spec: ``name`` or ``name:profile``."""
        return f"{self.name}:{self.profile}" if self.profile else self.name

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Self:
        if self.autoscaling and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling exclude each other; remove one of them")
        return self


class ArGroup(Group):
    """An autoregressive model (LLM or VLM) on vLLM."""

    aliases: ClassVar[dict[str, str]] = vllm_names.ALIASES

    type: Literal["ar"] = Field(description="Served by vLLM.")
    load_format: str = Field(
        "auto",
        description="How vLLM loads the weights; `dummy` makes random ones, to measure speed without a checkpoint.",
    )
    parallel: ArParallel = Field(default_factory=ArParallel, description="Ranks of one replica.")
    offload: ArOffload = Field(default_factory=ArOffload, description="Weights in host memory.")
    quantization: vllm_names.Quantization | None = Field(
        None, description="A vLLM quantization method, such as `fp8` or `awq`; null reads the checkpoint's own."
    )
    routing: Literal["balanced", "prefix"] = Field(
        "balanced", description="`prefix` sends prompts that begin alike to one replica, for its prefix cache."
    )
    max_ongoing_requests: Positive = Field(512, description="Requests inside one replica's vLLM at a time.")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Any other argument of `vllm serve`, by its name with underscores."
    )

    @field_validator("engine_args")
    @classmethod
    def _no_second_home(cls, args: dict[str, Any]) -> dict[str, Any]:
        homes = {name: f"{home} of the model" for name, home in vllm_names.ALIASES.items()} | vllm_names.ELSEWHERE
        found = {key: homes[name] for key in args if (name := key.replace("-", "_")) in homes}
        if found:
            raise ValueError(
                "\n".join(f"{key}: has a key of its own; set {home} instead" for key, home in found.items())
            )
        return args

    @model_validator(mode="after")
    def _pickles_are_allowed(self) -> Self:
        if self.load_format.lower() in vllm_names.PICKLED_FORMATS and not self.allow_pickle_weights:
            raise ValueError(
                f"load_format = {self.load_format!r} reads pickles, which can run code that is in them; use 'auto' "
                "with a checkpoint in safetensors, or set allow_pickle_weights: true"
            )
        return self

    @model_validator(mode="after")
    def _ray_spans_nodes(self) -> Self:
        nodes, key = self.parallel.num_nodes, "distributed_executor_backend"
        backend = next((value for name, value in self.engine_args.items() if name.replace("-", "_") == key), "ray")
        if nodes > 1 and backend != "ray":
            raise ValueError(
                f"engine_args.{key} = {backend!r} stays inside a node, but parallel.num_nodes = {nodes}; "
                "remove the key, or set num_nodes to 1"
            )
        return self


class DitGroup(Group):
    """A diffusion transformer (image or video) on diffusers."""

    type: Literal["dit"] = Field(description="Served by diffusers.")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="`dummy` makes random weights from the configs, to measure speed without a checkpoint."
    )
    parallel: DitParallel = Field(default_factory=DitParallel, description="Ranks of one replica.")
    cache: Cache = Field(default_factory=Cache, description="Reuse of computed steps.")
    offload: DitOffload = Field(default_factory=DitOffload, description="Weights in host memory.")
    quantization: DitQuantization = Field(default_factory=DitQuantization, description="Number format of the weights.")
    compile: Compile = Field(default_factory=Compile, description="Compilation.")
    attention: Attention = Field(default_factory=Attention, description="Attention.")
    vae: Vae = Field(default_factory=Vae, description="The autoencoder.")
    batching: Batching = Field(default_factory=Batching, description="What the gate joins.")
    limits: Limits = Field(default_factory=Limits, description="What one request may ask for.")
    defaults: dict[str, Any] = Field(
        default_factory=dict,
        description="Values of the pipeline's arguments where a request does not say, such as `num_inference_steps`.",
    )

    @model_validator(mode="after")
    def _number_formats_of_the_device(self) -> Self:
        if self.device == "cpu" and self.quantization.kind in ("int4", "fp8"):
            raise ValueError(
                f"quantization.kind: {self.quantization.kind!r} needs a GPU, but device is 'cpu'; use 'int8' or 'none'"
            )
        return self

    @model_validator(mode="after")
    def _gguf_weights_stay_as_they_are(self) -> Self:
        if self.quantization.kind == "gguf":
            others = {"offload.kind": self.offload.kind != "none", "parallel.tensor": self.parallel.tensor > 1}
            others |= {"load_format": self.load_format == "dummy", "attention.fused_qkv": self.attention.fused_qkv}
            if key := next((key for key, is_set in others.items() if is_set), ""):
                raise ValueError(f"quantization.kind: 'gguf' cannot go with {key}; remove one of them")
        return self

    @model_validator(mode="after")
    def _ranks_cut_what_is_separate(self) -> Self:
        if self.attention.fused_qkv and self.parallel.tensor > 1:
            raise ValueError("attention.fused_qkv: cannot go with parallel.tensor; remove one of them")
        return self

    @property
    def against_cuda_graphs(self) -> str:
        """The key whose value lets a transformer do another thing at every step, which no recording can; or empty."""
        blocks = {"cache.kind": self.cache.kind != "none", "offload.kind": self.offload.kind != "none"}
        blocks["parallel"] = self.parallel.num_ranks > 1
        return next((key for key, is_set in blocks.items() if is_set), "")

    @property
    def records_on_gpus(self) -> bool:
        """Whether CUDA graphs are made where there is a GPU."""
        asked = self.compile.cuda_graphs
        return asked if asked is not None else self.compile.mode != "none" and not self.against_cuda_graphs

    @model_validator(mode="after")
    def _recordings_do_the_same(self) -> Self:
        if self.compile.cuda_graphs and self.against_cuda_graphs:
            raise ValueError(f"compile.cuda_graphs: cannot go with {self.against_cuda_graphs}; remove one of them")
        return self


class Pipeline(Block):
    """A chain: the AR model rewrites what a person says, the DiT model draws it."""

    type: Literal["pipeline"] = Field(description="A chain of two models of the file.")
    name: Name = Field(description="The model name that requests use.")
    rewrite: str = Field(description="Name of the `ar` model that rewrites the prompt.")
    generate: str = Field(description="Name of the `dit` model that takes the rewritten prompt.")
    instructions: str | None = Field(None, description="System message for the `ar` model.")
    max_tokens: Positive = Field(256, description="Length of the rewritten prompt in tokens.")

    @property
    def id(self) -> str:
        return self.name


Model = Annotated[ArGroup | DitGroup | Pipeline, Field(discriminator="type")]


class Api(Block):
    """The HTTP edge."""

    num_replicas: Positive = Field(1, description="Processes that take HTTP requests.")
    max_body_mib: float = Field(32.0, gt=0, description="Largest request body in MiB; more gets a 413.")
    stream_interval_ms: float = Field(
        20.0, ge=0, description="Tokens of a stream are joined over this many milliseconds; 0 sends each alone."
    )
    keys_file: str | None = Field(
        None,
        min_length=1,
        description="File of the API keys that are let in, on every node with an ingress; null lets everybody in. A "
        "change of the file takes effect within a second.",
    )
    audit_prompts: bool = Field(False, description="Write prompts into the audit log too.")
    media_hosts: list[MediaHost] = Field(
        default_factory=list,
        description="Hosts from which media of a request may be fetched: `images.example.com`, `*.example.com` for "
        "all below it, `example.com:8443` for a port other than 80 and 443. Empty fetches nothing.",
    )
    media_networks: list[str] = Field(
        default_factory=list,
        description="Networks outside the public internet, such as `10.1.0.0/16`, that those hosts may be in.",
    )
    media_max_mib: float = Field(16.0, gt=0, description="Most that is fetched for one request, in MiB.")
    media_timeout_s: float = Field(10.0, gt=0, description="Longest that fetching for one request may take.")

    @field_validator("media_networks")
    @classmethod
    def _are_networks(cls, networks: list[str]) -> list[str]:
        for i, network in enumerate(networks):
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"[{i}]: {error}; write it like 10.1.0.0/16") from None
        return networks


class JobStore(Block):
    """Where jobs and what they made are kept, so that they outlive every process of the server."""

    folder: str = Field(
        "~/.local/share/omni_ray/jobs",
        description="Folder of the files, or an address that fsspec knows, such as `s3://bucket/jobs`. With several "
        "nodes, one that all of them share.",
    )
    database: str | None = Field(
        None,
        description="SQLAlchemy's address of the database, such as `postgresql+psycopg://user@host/name` (whose "
        "password may be in PGPASSWORD); left out, an SQLite file in the folder.",
    )
    expire_after_s: float = Field(86_400.0, gt=0, description="Jobs that ended are removed after this time.")
    max_gib: float = Field(10.0, gt=0, description="Media beyond this size are removed, the oldest first.")

    @model_validator(mode="after")
    def _has_a_database(self) -> Self:
        if "://" in self.folder and self.database is None:
            raise ValueError(f"database: {self.folder} can hold no SQLite file; name a database beside it")
        return self


class OmniSpec(Block):
    """Everything that one application serves."""

    models: list[Model] = Field(min_length=1, description="The models.")
    api: Api = Field(default_factory=Api, description="The HTTP edge.")
    jobs: JobStore = Field(default_factory=JobStore, description="The store of jobs.")

    @property
    def groups(self) -> list[ArGroup | DitGroup]:
        return [m for m in self.models if not isinstance(m, Pipeline)]

    @model_validator(mode="after")
    def _names(self) -> Self:
        if problems := [*self._clashes(), *self._broken_chains()]:
            raise ValueError("\n".join(problems))
        return self

    def _clashes(self) -> Iterator[str]:
        """Two models with one id, or one name for models of two types."""
        first: dict[str, int] = {}
        types: dict[str, str] = {}
        for i, model in enumerate(self.models):
            if first.setdefault(model.id, i) != i:
                other = first[model.id]
                yield f"models[{i}].name: models[{other}] is {model.id!r} too; give one another name or profile"
            elif types.setdefault(model.name, model.type) != model.type:
                yield f"models[{i}].name = {model.name!r} is also a model of type {types[model.name]}; rename one"

    def _broken_chains(self) -> Iterator[str]:
        """Chains whose links are not models of this file, of the right type."""
        names = {"ar": set[str](), "dit": set[str]()}
        for group in self.groups:
            names[group.type] |= {group.id, group.name}
        for i, chain in enumerate(self.models):
            if isinstance(chain, Pipeline):
                for key, type_, target in (("rewrite", "ar", chain.rewrite), ("generate", "dit", chain.generate)):
                    if target not in names[type_]:
                        choose = hint(target, sorted(names[type_])) if names[type_] else "add one"
                        yield f"models[{i}].{key} = {target!r} is no {type_} model of this file; {choose}"
