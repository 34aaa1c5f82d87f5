"""`omni-ray helm-values`: pods that hold what the plan puts on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from omni_ray.cli import main
from omni_ray.cli.helm_values import values_file
from omni_ray.config.chart import ChartValues
from omni_ray.errors import ConfigError
from omni_ray.plan.cards import CARDS
from omni_ray.plan.pods import PRODUCTS

ROOT = Path(__file__).parents[2]
FLUX = {"name": "flux", "type": "dit", "source": "black-forest-labs/FLUX.1-dev"}
QWEN = {"name": "qwen", "type": "ar", "source": "Qwen/Qwen3-8B"}


@pytest.fixture
def values(tmp_path: Path) -> Any:
    """The values of a file with these models, on these nodes."""

    def make(*models: dict[str, Any], inventory: str = "8xH100-80G x 2", **file: Any) -> dict[str, Any]:
        application = {"name": "omni", "import_path": "omni_ray.app:build", "args": {"models": list(models)}}
        path = tmp_path / "file.yaml"
        path.write_text(yaml.safe_dump({"applications": [application], **file}, sort_keys=False))
        text = values_file(str(path), [inventory])
        assert text.startswith(f"# $ omni-ray helm-values {path} --inventory")
        made = yaml.safe_load(text)
        ChartValues.model_validate(made)
        return dict(made)

    return make


def test_a_pod_is_as_large_as_the_fullest_node(values: Any) -> None:
    made = values(FLUX | {"parallel": {"ulysses": 8}}, QWEN | {"parallel": {"tensor": 2}})
    (group,) = made["workers"]
    assert (group["replicas"], group["gpus"]) == (2, 8)
    assert made["image"]["build"] == "gpu"
    assert made["cache"]["accessMode"] == "ReadWriteMany"
    assert "autoscaler" not in made


def test_a_pod_is_no_larger_than_its_replicas(values: Any) -> None:
    made = values(QWEN | {"parallel": {"tensor": 2}})
    (group,) = made["workers"]
    assert (group["replicas"], group["gpus"]) == (1, 2)
    assert group["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert "accessMode" not in made["cache"]


def test_offloaded_weights_need_memory(values: Any) -> None:
    plain, offloaded = (values(FLUX | {"offload": {"kind": kind}}) for kind in ("none", "sequential"))
    assert offloaded["workers"][0]["memoryGiB"] > plain["workers"][0]["memoryGiB"] + 20


def test_memory_and_shared_memory_follow_the_ranks(values: Any) -> None:
    (one,), (eight,) = (values(QWEN | {"parallel": {"tensor": num}})["workers"] for num in (1, 8))
    assert eight["sharedMemoryGiB"] > one["sharedMemoryGiB"]
    assert eight["memoryGiB"] > one["memoryGiB"] + eight["sharedMemoryGiB"]
    assert eight["cpus"] > one["cpus"]


def test_nodes_for_peaks_are_the_autoscalers(values: Any) -> None:
    made = values(FLUX | {"parallel": {"ulysses": 8}, "autoscaling": {"min_replicas": 1, "max_replicas": 2}})
    (group,) = made["workers"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 2)
    assert made["autoscaler"] == {"enabled": True}


def test_the_volume_holds_the_weights_once(values: Any) -> None:
    once, twice = values(QWEN), values(QWEN, QWEN | {"profile": "other"})
    assert once["cache"] == twice["cache"]
    assert int(once["cache"]["size"].removesuffix("Gi")) in range(20, 50)


def test_models_are_as_they_were_written(values: Any) -> None:
    model = {"type": "dit", "source": "black-forest-labs/FLUX.1-dev", "name": "flux", "limits": {"max_pixels": 4194304}}
    assert list(values(model)["args"]["models"][0].items()) == list(model.items())


def test_http_options_come_along(values: Any) -> None:
    made = values(QWEN, http_options={"host": "127.0.0.1", "port": 8100, "request_timeout_s": 60})
    assert made["http"] == {"port": 8100, "requestTimeoutSeconds": 60}


def test_a_port_that_needs_rights_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"http_options.port: 80 is below 1024"):
        values(QWEN, http_options={"port": 80})


def test_what_does_not_fit_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\[0\].memory: text_encoder"):
        values({"name": "flux2", "type": "dit", "source": "black-forest-labs/FLUX.2-dev"}, inventory="1xRTX4090-24G")


def test_a_release_is_one_application(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    ours = {"name": "omni", "import_path": "omni_ray.app:build", "args": {"models": [QWEN]}}
    other = {"name": "other", "route_prefix": "/other", "import_path": "other:app"}
    path.write_text(yaml.safe_dump({"applications": [ours, other]}))
    with pytest.raises(ConfigError, match="applications omni, other; a release of the chart serves one"):
        values_file(str(path), [])


def test_the_demo_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["helm-values", str(ROOT / "deployments/omni.yaml")])
    assert end.value.code == 0
    made = ChartValues.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert [group.name for group in made.workers] == ["cpu"] or made.image.build == "gpu"


def test_loads_no_model_library() -> None:
    code = (
        "import sys; from omni_ray.cli.helm_values import values_file; "
        f"values_file({str(ROOT / 'deployments/omni.yaml')!r}, []); "
        "print(sorted(sys.modules.keys() & {'torch', 'ray', 'vllm', 'diffusers', 'transformers'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_has_the_label_of_its_name(card: Any) -> None:
    assert card.smi in PRODUCTS[card.name].replace("-", " ") or card.smi in PRODUCTS[card.name]
