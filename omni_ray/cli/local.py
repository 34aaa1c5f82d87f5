"""``omni-ray generate --local SOURCE``: the pipeline in this process, checked and run as a server does."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Generator, Sequence
from typing import Any

from omni_ray.cli.generate import Asked, Cost, Output, Step, Update
from omni_ray.errors import ConfigError, EngineFailed
from omni_ray.messages import Event, Failure, Job, Media, StepEvent, Usage


def run(source: str, asked: Asked, flags: Sequence[str] = ()) -> Generator[Update, None, None]:
    """What happens, last the outputs and the cost. Closing this cancels the job within one denoise step.

    ``flags`` are those of a model of `omni-ray serve`. Nothing is compiled unless they say so: one image is drawn
    before the compiler has ended.

    :raises ConfigError: ``source`` is no diffusion pipeline, or cannot be loaded, or not as the flags say.
    :raises RequestError: the pipeline does not take what is asked.
    """
    from omni_ray.accel.edits import edit_pipelines
    from omni_ray.engine.loop import EngineLoop
    from omni_ray.tuning.run import device_and_dtype, in_a_thread, prepare

    if asked.model:
        raise ConfigError(f"--model {asked.model} is a model of a server; --local names the one to run")
    _check_is_pipeline(source)
    yield Step(doing=f"loading {source}")
    group = _group(source, flags)
    pipe, accelerators = in_a_thread(prepare, group)
    edits = edit_pipelines(pipe)
    job = _job(pipe, group, edits, asked)
    loop = EngineLoop(pipe, group.batching, accelerators=accelerators, device=device_and_dtype()[0], edits=edits)
    loop.start()
    try:
        yield from _follow(loop, job, accelerators.warnings)
    finally:
        loop.stop()


def _group(source: str, flags: Sequence[str]) -> Any:
    from omni_ray.cli.flags import file_of
    from omni_ray.config.spec import Compile, DitGroup

    (group,) = file_of(source, ["--served-model-name", "local", *flags], "dit").omni_applications[0].args.groups
    assert isinstance(group, DitGroup)
    if group.parallel.num_ranks > 1:
        raise ConfigError("--local runs one rank; leave the parallel axes out, or use `omni-ray serve`")
    return group if "compile" in group.model_fields_set else group.model_copy(update={"compile": Compile(mode="none")})


def _check_is_pipeline(source: str) -> None:
    from omni_ray.plan.checkpoint import read_checkpoint

    try:
        pipeline = read_checkpoint(source).pipeline
    except ConfigError:
        return  # it is on the hub, or nowhere, which the loader will say
    if not pipeline:
        raise ConfigError(
            f"--local {source}: is an LLM, and --local draws; use `omni-ray serve`, and leave --local out"
        )


def _job(pipe: Any, group: Any, edits: Any, asked: Asked) -> Job:
    from omni_ray.accel.capabilities import read_capabilities
    from omni_ray.accel.loader import resolve
    from omni_ray.api.limits import Inputs, make_job
    from omni_ray.api.protocol import ImagesRequest, VideosRequest, parse
    from omni_ray.api.videos import timed
    from omni_ray.messages import Route
    from omni_ray.sources import resolve_source

    capabilities = read_capabilities(pipe, resolve(resolve_source(group.source)), group, edits)
    limits = {"max_prompt_chars": group.limits.max_prompt_chars} | dataclasses.asdict(capabilities)
    route = Route(
        group=group.id, name=group.name, profile=None, type="dit", names=(group.id,), ready=True, limits=limits
    )
    body = {"model": group.name, "prompt": asked.prompt, **asked.fields}
    inputs = Inputs(
        prompt=asked.prompt,
        images=tuple(file.read_bytes() for file in asked.images),
        mask=asked.mask.read_bytes() if asked.mask else None,
    )
    if capabilities.output == "video":
        video = parse(VideosRequest, body)
        job = timed(video, route, make_job(video, inputs, route, "local"))
    else:
        job = make_job(parse(ImagesRequest, body), inputs, route, "local")
    return dataclasses.replace(job, params=capabilities.defaults | job.params)


def _follow(loop: Any, job: Job, warnings: Sequence[str]) -> Generator[Update, None, None]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    began = time.perf_counter()
    loop.submit(job, events.put)
    yield Step(doing="starting")
    while True:
        match _next(events, loop):
            case StepEvent() as event:
                left = (time.perf_counter() - began) / event.step * (event.num_steps - event.step)
                yield Step(doing="drawing", step=event.step, num_steps=event.num_steps, seconds_left=left)
            case Media() as media:
                yield Output(media.data, media.format)
            case Failure() as failure:
                raise failure.error
            case Usage() as usage:
                yield Cost(dataclasses.asdict(usage) | {"warnings": [*warnings, *usage.warnings]})
                return


def _next(events: queue.SimpleQueue[Event], loop: Any) -> Event:
    while True:
        try:
            return events.get(timeout=1)
        except queue.Empty:
            if not loop.alive():
                raise EngineFailed("the engine loop has ended; the error is above") from None
