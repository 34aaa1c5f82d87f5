"""What a plan says of offload and quantization, against what is known of the models, and what is then fixed by it."""

from __future__ import annotations

from typing import Any

import pytest

from omni_ray.config.spec import DitGroup, OmniSpec
from omni_ray.messages import Room
from omni_ray.plan.fit import room_for
from omni_ray.plan.fixes import find_fixes
from omni_ray.plan.inventory import parse_inventory
from omni_ray.plan.plan import Need, make_plan
from omni_ray.plan.refusals import refusals

QWEN = "Qwen/Qwen-Image"
WAN = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


def need(source: str, card: str = "1xH200-141G", **blocks: Any) -> Need:
    model = {"name": "m", "type": "dit", "source": source, **blocks}
    found = make_plan(OmniSpec.model_validate({"models": [model]}), parse_inventory([card])).groups[0].need
    assert found is not None
    return found


def gib(needed: Need) -> dict[str, float]:
    return {item.name: item.gib for item in needed.memory.items}


def test_streaming_blocks_leave_the_first_and_two_buffers() -> None:
    plain, offloaded = need(QWEN), need(QWEN, offload={"kind": "layerwise"})
    block = gib(plain)["transformer"] / 60
    assert gib(offloaded)["transformer"] == pytest.approx(3 * block, rel=0.2)
    assert gib(offloaded)["text_encoder"] == gib(plain)["text_encoder"]
    assert offloaded.memory.host_gib == pytest.approx(59 * block + gib(plain)["text_encoder"], rel=0.02)
    assert offloaded.estimate
    assert plain.estimate
    per_step = offloaded.memory.host_gib * 2**30 / 55e9
    assert offloaded.estimate.seconds > 0.9 * 50 * (per_step - 0.4) > plain.estimate.seconds


def test_a_part_of_the_blocks_streams_while_the_others_compute() -> None:
    plain, some = need(QWEN), need(QWEN, offload={"kind": "layerwise", "cpu_offload_gb": 6.0})
    assert some.estimate
    assert plain.estimate
    assert some.estimate.seconds < plain.estimate.seconds + 0.8
    assert gib(plain)["transformer"] - gib(some)["transformer"] == pytest.approx(6 - 2 * 38 / 60, abs=0.2)


def test_recorded_forwards_keep_their_activations_beside_the_decode() -> None:
    recorded, plain = need(QWEN), need(QWEN, compile={"cuda_graphs": False})
    assert 1.2 < gib(recorded)["activations"] / gib(plain)["activations"] < 2
    eager = need(QWEN, compile={"mode": "none"})
    assert gib(eager)["activations"] == gib(plain)["activations"]


def test_one_expert_at_a_time() -> None:
    plain, exclusive = need(WAN), need(WAN, offload={"kind": "sequential"})
    name = "one of text_encoder, transformer, transformer_2"
    assert set(gib(exclusive)) == {"vae", name, "activations", "workspace"}
    assert gib(exclusive)[name] == gib(plain)["transformer"]
    everything = need(WAN, offload={"kind": "model"})
    assert "vae" not in gib(everything)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5), ("fp8", 0.5), ("int4", 0.265)])
def test_quantized_weights_are_smaller(kind: str, share: float) -> None:
    plain, quantized = need(QWEN), need(QWEN, quantization={"kind": kind})
    assert gib(quantized)["transformer"] == pytest.approx(share * gib(plain)["transformer"], rel=0.03)
    assert gib(quantized)["text_encoder"] == gib(plain)["text_encoder"]
    both = need(QWEN, quantization={"kind": kind, "components": ["text_encoder"]})
    assert gib(both)["transformer"] == gib(plain)["transformer"]
    assert gib(both)["text_encoder"] < 0.7 * gib(plain)["text_encoder"]


def test_what_does_not_fit_is_fixed_by_offload() -> None:
    spec = OmniSpec.model_validate({"models": [{"name": "m", "type": "dit", "source": QWEN}]})
    plan = make_plan(spec, parse_inventory(["1xH100-80G"]))
    assert not plan.refusals
    plan = make_plan(spec, parse_inventory(["1xRTX4090-24G"]))
    assert plan.refusals
    assert any("offload.kind: layerwise" in str(fix) or "offload" in repr(fix) for fix in find_fixes(plan))


def room_on(card: str, source: str, **blocks: Any) -> Room | None:
    group = DitGroup.model_validate({"name": "m", "type": "dit", "source": source, **blocks})
    return room_for(group, source, parse_inventory([card]))


def test_the_largest_request_that_fits_is_known_to_the_replica() -> None:
    def largest(card: str, **blocks: Any) -> int | None:
        room = room_on(card, QWEN, **blocks)
        return room and room.together

    limits = {"limits": {"max_pixels": 8192 * 8192}}
    assert largest("1xH200-141G", limits={"max_outputs": 1}) is None
    one, two, ten = (largest("1xH100-80G", limits={"max_outputs": num}) for num in (1, 2, 10))
    assert one is None
    assert two is not None
    assert 2048**2 < two == ten < 2 * 2048**2
    small, large = largest("1xH100-80G", **limits), largest("1xH200-141G", **limits)
    assert small
    assert large
    assert 2048**2 <= small < large < 8192**2
    quantized = largest("1xH100-80G", quantization={"kind": "int8"}, **limits)
    assert quantized
    assert quantized > small
    assert room_on("1xH100-80G", "/nowhere") is None


def test_tiles_make_room_for_one_picture_and_slices_for_several() -> None:
    def room(**vae: bool) -> tuple[int, int]:
        found = room_on("1xH100-80G", QWEN, vae=vae, limits={"max_pixels": 8192 * 8192, "max_outputs": 10_000})
        assert found
        return found.alone, found.together

    whole, tiled, sliced, both = room(), room(tiling=True), room(slicing=True), room(tiling=True, slicing=True)
    assert whole[0] == whole[1] == sliced[0]
    assert tiled[0] > 2 * whole[0]
    assert tiled[1] <= whole[1]  # ten thousand small ones are no larger than a tile
    assert both[0] == both[1] == tiled[0]


def test_a_video_may_be_longer_or_larger() -> None:
    room = room_on("1xL40S-48G", WAN, offload={"kind": "sequential"})
    assert room
    assert (room.together, room.frames) == (room.alone, 81)
    assert 832 * 480 <= room.alone < 2048**2


@pytest.mark.parametrize(
    ("source", "blocks", "message"),
    [
        (
            "stabilityai/stable-diffusion-3.5-large",
            {"cache": {"kind": "cache_dit"}},
            "no adapter for SD3",
        ),
        (
            QWEN,
            {"quantization": {"kind": "int8", "components": ["text_encodr"]}},
            "has no text_encodr",
        ),
        (QWEN, {"attention": {"fused_qkv": True}}, "QwenImageTransformer2DModel has no projections to fuse"),
        ("tencent/HunyuanImage-3.0", {"cache": {"kind": "teacache"}}, "set type: ar"),
    ],
)
def test_levers_that_cannot_work_are_refused(source: str, blocks: dict[str, Any], message: str) -> None:
    model = {"name": "m", "type": "dit", "source": source, **blocks}
    found = refusals(OmniSpec.model_validate({"models": [model]}))
    assert message in "\n".join(map(str, found))
