"""Loading a configuration: what is good becomes specs, what is broken is named with line, key and nearest key."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from omni_ray import demo
from omni_ray.config.load import check, load, load_file
from omni_ray.config.spec import DEMO_SOURCES, ArGroup, DitGroup, Pipeline
from omni_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]

HEAD = """\
applications:
  - name: omni
    import_path: omni_ray.app:build
    args:
      models:
"""
CHAT = "        - {name: chat, type: ar, source: demo:chat}\n"
IMAGE = "        - {name: image, type: dit, source: demo:image}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "omni.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    """The problems of a file, without its name."""
    path = write(folder, text)
    return [str(problem).removeprefix(f"{path}:") for problem in check(path)]


MODEL_0 = "applications[0].args.models[0]"

# Text, place, key, and what the message says of the nearest.
BROKEN = {
    "unknown key of a model": (
        HEAD + CHAT.replace("source", "sorce"),
        "6:34",
        f"{MODEL_0}.sorce",
        "did you mean 'source'?",
    ),
    "unknown key of a block": (
        HEAD + IMAGE.replace("}", ", compile: {mod: regional}}"),
        "6:66",
        f"{MODEL_0}.compile.mod",
        "did you mean 'mode'?",
    ),
    "key in the wrong block": (
        HEAD + IMAGE.replace("}", ", max_num_seqs: 4}"),
        "6:56",
        f"{MODEL_0}.max_num_seqs",
        "did you mean 'batching.max_num_seqs'?",
    ),
    "vLLM's name of a key": (
        HEAD + CHAT.replace("}", ", tensor_parallel_size: 2}"),
        "6:53",
        f"{MODEL_0}.tensor_parallel_size",
        "did you mean 'parallel.tensor'?",
    ),
    "unknown value": (
        HEAD + IMAGE.replace("}", ", compile: {mode: regionl}}"),
        "6:72",
        f"{MODEL_0}.compile.mode",
        "came 'regionl'; it should be 'auto', 'none' or 'regional'; did you mean 'regional'?",
    ),
    "unknown type": (HEAD + CHAT.replace("ar", "arr"), "6:30", f"{MODEL_0}.type", "came 'arr'; did you mean 'ar'?"),
    "misspelt type": (HEAD + CHAT.replace("type", "tpye"), "6:24", f"{MODEL_0}.tpye", "did you mean 'type'?"),
    "key of Ray Serve": (
        "http_options:\n  prt: 8000\n" + HEAD + CHAT,
        "2:3",
        "http_options.prt",
        "unknown key 'prt'; did you mean 'port'?",
    ),
    "key at the wrong level": (
        "models:\n  - {name: chat}\n" + HEAD + CHAT,
        "1:1",
        "models",
        "did you mean 'applications.args.models'?",
    ),
    "unknown demo model": (
        HEAD + IMAGE.replace("demo:image", "demo:images"),
        "6:44",
        f"{MODEL_0}.source",
        "no demo model is called 'demo:images'; did you mean 'demo:image'?",
    ),
    "chain to an unknown model": (
        HEAD + CHAT + IMAGE + "        - {name: p, type: pipeline, rewrite: chatt, generate: image}\n",
        "8:46",
        "applications[0].args.models[2].rewrite",
        "'chatt' is no ar model of this file; did you mean 'chat'?",
    ),
    "builder that is not there": (
        HEAD.replace("app:build", "app:biuld") + CHAT,
        "3:18",
        "applications[0].import_path",
        "did you mean 'omni_ray.app:build'?",
    ),
    "key of another kind": (
        HEAD + IMAGE.replace("}", ", cache: {kind: cache_dit, threshold: 0.1}}"),
        "6:92",
        f"{MODEL_0}.cache.threshold",
        "is TeaCache's; set kind: teacache",
    ),
    "engine argument that the endpoint is for": (
        HEAD + CHAT.replace("}", ", engine_args: {allowed-media-domains: [a.b]}}"),
        "6:90",
        f"{MODEL_0}.engine_args.allowed-media-domains",
        "set api.media_hosts instead",
    ),
    "engine argument that runs a checkpoint's code": (
        HEAD + CHAT.replace("}", ", engine_args: {trust-remote-code: true}}"),
        "6:86",
        f"{MODEL_0}.engine_args.trust-remote-code",
        "set trust_remote_code of the model instead",
    ),
    "format of pickles": (
        HEAD + CHAT.replace("}", ", load_format: PT}"),
        "6:66",
        f"{MODEL_0}.load_format",
        "reads pickles, which can run code that is in them",
    ),
    "host of media": (
        HEAD + CHAT + "      api: {media_hosts: ['https://a.b/c']}\n",
        "7:27",
        "applications[0].args.api.media_hosts[0]",
        "it should match pattern",
    ),
    "network of media": (
        HEAD + CHAT + "      api: {media_networks: [10.1.0.1/16]}\n",
        "7:30",
        "applications[0].args.api.media_networks[0]",
        "has host bits set; write it like 10.1.0.0/16",
    ),
    "engine argument with a key of its own": (
        HEAD + CHAT.replace("}", ", engine_args: {max-model-len: 9, tensor-parallel-size: 2}}"),
        "6:107",
        f"{MODEL_0}.engine_args.tensor-parallel-size",
        "set parallel.tensor of the model instead",
    ),
    "key that is missing": (
        HEAD + "        - type: ar\n          name: chat\n",
        "6:11",
        f"{MODEL_0}.source",
        "is missing (a local folder, a hub id, ",
    ),
    "key that is there twice": (
        HEAD + "        - name: chat\n          type: ar\n          source: a/b\n          type: ar\n",
        "9:11",
        f"{MODEL_0}.type",
        "key 'type' is there twice, first in line 7; remove one of them",
    ),
    "one name twice": (HEAD + CHAT + CHAT, "7:18", "applications[0].args.models[1].name", "models[0] is 'chat' too"),
    "one name for two types": (
        HEAD + CHAT + IMAGE.replace("image,", "chat, profile: fast,"),
        "7:18",
        "applications[0].args.models[1].name",
        "'chat' is also a model of type ar",
    ),
    "bounds the wrong way round": (
        HEAD + CHAT.replace("}", ", autoscaling: {max_replicas: 1, min_replicas: 3}}"),
        "6:98",
        f"{MODEL_0}.autoscaling.min_replicas",
        "3 is above max_replicas = 1; swap them",
    ),
    "two ways to scale": (
        HEAD + CHAT.replace("}", ", num_replicas: 2, autoscaling: {max_replicas: 3}}"),
        "6:67",
        f"{MODEL_0}.num_replicas",
        "num_replicas and autoscaling exclude each other",
    ),
    "one application twice": (
        HEAD + CHAT + "  - {name: omni, import_path: other:app, route_prefix: /other}\n",
        "7:12",
        "applications[1].name",
        "'omni' is also applications[0]'s",
    ),
    "a deployment that is none": (
        HEAD + IMAGE + "    deployments: [{name: imge}]\n",
        "7:26",
        "applications[0].deployments[0].name",
        "did you mean 'image'?",
    ),
    "a change in place of what cannot": (
        HEAD + IMAGE + "    deployments: [{name: image, user_config: {cache: {kind: teacache}}}]\n",
        "7:46",
        "applications[0].deployments[0].user_config",
        "cache.kind: changes in no running group",
    ),
    "text instead of a number": (
        HEAD + CHAT.replace("}", ", num_replicas: two}"),
        "6:67",
        f"{MODEL_0}.num_replicas",
        "came 'two'; it should be a valid integer",
    ),
    "number out of bounds": (
        HEAD + CHAT.replace("}", ", memory: {gpu_memory_utilization: 90}}"),
        "6:86",
        f"{MODEL_0}.memory.gpu_memory_utilization",
        "came 90; it should be less than or equal to 1",
    ),
    "number instead of text": (HEAD + CHAT.replace("chat,", "1.5,"), "6:18", f"{MODEL_0}.name", "put it in quotes"),
    "list instead of a block": (
        HEAD + CHAT.replace("}", ", memory: [0.9]}"),
        "6:61",
        f"{MODEL_0}.memory",
        "it should be a mapping of keys to values",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_problem_has_line_key_and_nearest(name: str, tmp_path: Path) -> None:
    text, place, key, message = BROKEN[name]
    found = problems(tmp_path, text)
    matching = [problem for problem in found if problem.startswith(f"{place}: {key}: ")]
    assert matching, found
    assert message in matching[0]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("", "1:1: the file is empty"),
        ("# nothing\n", "1:1: the file is empty"),
        ("- a\n- b\n", "1:1: came ['a', 'b']; it should be a mapping"),
        ("a: [1, 2\nb: 3\n", "2:2: not YAML: "),
        ("a:\n\tb: 1\n", "2:1: not YAML: "),
        ("a: 1\n---\nb: 2\n", "2:1: not YAML: "),
        ("a: &x [*x]\n", "1:4: not YAML: a[0] contains itself"),
        ("a: !!python/object:os.system {}\n", "1:4: not YAML: "),
        ("a: \0\n", "1:1: not YAML: "),
        ("applications: []\n", "1:15: applications: came []; it should have at least 1 item"),
    ],
)
def test_a_file_that_is_no_config(text: str, start: str, tmp_path: Path) -> None:
    assert problems(tmp_path, text)[0].startswith(start)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml:1:1: cannot be read: No such file or directory"):
        load(tmp_path / "nothing.yaml")


def test_all_problems_come_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    text = HEAD + IMAGE.replace("source", "sorce") + CHAT.replace("demo:chat", "demo:chatt") + "      apy: {}\n"
    lines = [int(problem.split(":")[0]) for problem in problems(tmp_path, text)]
    assert lines == sorted(lines)
    assert {6, 7, 8} <= set(lines)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "omni.yaml")
    assert len(error.value.message.splitlines()) == len(lines)


def test_a_local_source_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "flux-dev").mkdir()
    here = HEAD + IMAGE.replace("demo:image", f"{tmp_path}/flux-dev")
    assert problems(tmp_path, here) == []
    [problem] = problems(tmp_path, here.replace("flux-dev", "flux_dev"))
    assert problem.startswith(f"6:44: {MODEL_0}.source: there is no ")
    assert problem.endswith(f"did you mean '{tmp_path}/flux-dev'?")


def test_a_merge_may_override_keys(tmp_path: Path) -> None:
    text = HEAD + "        - &base {name: a, type: ar, source: x/y}\n        - {<<: *base, name: b}\n"
    assert [model.name for model in load(write(tmp_path, text))[0].models] == ["a", "b"]


def test_foreign_applications_are_left_alone(tmp_path: Path) -> None:
    text = HEAD + CHAT + "  - {name: x, route_prefix: /x, import_path: other:app, args: {1: 2, models: no}}\n"
    file = load_file(write(tmp_path, text))
    assert [app.name for app in file.omni_applications] == ["omni"]
    assert file.applications[1].args == {1: 2, "models": False}


def test_the_default_deployment_is_valid() -> None:
    [spec] = load(ROOT / "deployments/omni.yaml")
    chat, image, video, chain = spec.models
    assert isinstance(chat, ArGroup)
    assert isinstance(image, DitGroup)
    assert isinstance(video, DitGroup)
    assert isinstance(chain, Pipeline)
    assert (chain.rewrite, chain.generate) == (chat.name, image.name) == ("demo-chat", "demo-image")


def test_the_demo_sources_are_those_that_the_package_has() -> None:
    assert set(DEMO_SOURCES) == {f"demo:{name}" for name in demo.NAMES}


def test_the_keys_of_ray_serve_are_those_of_the_installed_ray() -> None:
    from ray.serve import schema

    from omni_ray.config import serve_file

    pairs = [
        (serve_file.ServeFile, schema.ServeDeploySchema, set()),
        (serve_file.HttpOptions, schema.HTTPOptionsSchema, set()),
        (serve_file.GrpcOptions, schema.gRPCOptionsSchema, set()),
        (serve_file.LoggingConfig, schema.LoggingConfig, set()),
        # Ray refuses these two in a file of several applications.
        (serve_file.Application, schema.ServeApplicationSchema, {"host", "port"}),
    ]
    for ours, theirs, refused in pairs:
        assert set(ours.model_fields) == set(theirs.model_fields) - refused


def test_a_checked_file_is_valid_for_ray_too() -> None:
    from ray.serve.schema import ServeDeploySchema

    file = load_file(ROOT / "deployments/omni.yaml")
    schema = ServeDeploySchema.model_validate(file.model_dump(mode="json", exclude_unset=True))
    assert schema.http_options.host == "127.0.0.1"
    assert schema.applications[0].args["models"][3]["rewrite"] == "demo-chat"


def test_a_check_imports_nothing_heavy() -> None:
    code = f"import sys; from omni_ray.cli import main\ntry: main(['check', {str(ROOT / 'deployments/omni.yaml')!r}])\n"
    code += "except SystemExit as end: print([end.code, *{name.split('.')[0] for name in sys.modules}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    status, *modules = ast.literal_eval(out.splitlines()[-1])
    assert status == 0
    assert {"yaml", "pydantic"} <= set(modules)
    assert not {"ray", "torch", "vllm", "diffusers", "transformers", "numpy", "fastapi"} & set(modules)
