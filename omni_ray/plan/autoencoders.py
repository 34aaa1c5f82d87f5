"""Autoencoders (VAEs): from their ``config.json`` to parameters, and to the work and memory of one decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Conv:
    """A convolution of the decoder or encoder; ``shrink`` is how many times fewer pixels it sees than the image has."""

    inputs: int
    outputs: int
    taps: int
    shrink: int = 1
    is_decoder: bool = False

    @property
    def num_params(self) -> int:
        return self.inputs * self.outputs * self.taps + self.outputs


@dataclass(frozen=True)
class Autoencoder:
    """``spatial`` and ``temporal`` are how many pixels and frames stand for one latent.

    ``peak_channels`` is the widest layer at the size of the image: what a decode needs at once is a few times that.
    """

    num_params: int
    decode_flop_per_pixel: float
    peak_channels: int
    spatial: int = 8
    temporal: int = 1
    has_rows: bool = False
    """Whether the ranks of a gang share a decode, each some rows of the picture."""

    tile: int = 256
    """Edge of the tiles in which it decodes larger pictures, where it is asked to."""


def autoencoder(config: Config) -> Autoencoder:
    """The autoencoder of a config; one of an unknown class is taken to be as large as FLUX.1's."""
    cls = config.get("_class_name", "")
    if cls in ("AutoencoderKL", "AutoencoderKLFlux2"):
        known = _image((FLUX2_DEFAULTS if cls.endswith("Flux2") else {}) | config)
    elif cls in ("AutoencoderKLWan", "AutoencoderKLQwenImage") and not config.get("is_residual"):
        known = _video(config)
    elif cls == "AutoencoderKLHunyuanImage":
        known = _shuffled(config)
    else:
        known = _image({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16})
    tile = config.get("sample_size") or TILES.get(cls, 256)
    tile = tile if isinstance(tile, int) else tile[0]  # it may be height and width, of which diffusers takes the first
    return dataclasses.replace(known, has_rows=cls in SPLIT_BY_ROWS, tile=tile)


TILES = {"AutoencoderKL": 32, "AutoencoderKLFlux2": 1024}
"""Edges of tiles where the config does not say."""

SPLIT_BY_ROWS = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLWan")

FLUX2_DEFAULTS: Config = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 32}


def _image(config: Config) -> Autoencoder:
    """Stable Diffusion's autoencoder, with as many levels as ``block_out_channels``."""
    widths = list(config.get("block_out_channels", [64]))
    latent, layers = config.get("latent_channels", 4), config.get("layers_per_block", 1)
    convs = [
        *_image_half(widths, layers, 2 * latent, decoder=False),
        *_image_half(widths, layers, latent, decoder=True),
    ]
    norms = sum(2 * each.inputs for each in convs if each.taps == 9 and each.inputs not in (3, latent))
    norms -= 2 * sum(widths[:-1]) + 2 * sum(widths[1:])  # down- and upsampling convolutions have none
    norms += 4 * widths[-1] if config.get("mid_block_add_attention", True) else 0
    quant = (2 * latent) ** 2 + 2 * latent if config.get("use_quant_conv", True) else 0
    post = latent**2 + latent if config.get("use_post_quant_conv", True) else 0
    return _summary(convs, norms + quant + post, 2 ** (len(widths) - 1), 1)


def _image_half(widths: list[int], layers: int, latent: int, *, decoder: bool) -> Iterator[Conv]:
    top, levels = widths[-1], len(widths)
    shrink = 4 ** (levels - 1)
    if decoder:
        yield Conv(latent, top, 9, shrink, True)
    else:
        yield Conv(3, widths[0], 9)
        yield Conv(top, latent, 9, shrink)
    for _ in range(2):  # the middle: two blocks around an attention
        yield from _resnet(top, top, 9, shrink, decoder)
    yield from [Conv(top, top, 1, shrink, decoder)] * 4
    width = top if decoder else widths[0]
    for level, out in enumerate(reversed(widths) if decoder else widths):
        shrink = 4 ** (levels - 1 - level if decoder else level)
        for _ in range(layers + decoder):
            yield from _resnet(width, out, 9, shrink, decoder)
            width = out
        if level < levels - 1:
            yield Conv(out, out, 9, shrink // 4 if decoder else shrink, decoder)
    if decoder:
        yield Conv(widths[0], 3, 9, 1, True)


def _shuffled(config: Config) -> Autoencoder:
    """HunyuanImage's autoencoder, whose levels move pixels into channels and back."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    spatial, latent = config["spatial_compression_ratio"], config["latent_channels"]
    convs, norms = list[Conv](), 0
    for decoder in (False, True):
        levels, shrink = widths[::-1] if decoder else widths, spatial**2 if decoder else 1
        matches = config.get("upsample_match_channel" if decoder else "downsample_match_channel", True)
        middle, at_middle = widths[-1], spatial**2
        convs.append(Conv(latent if decoder else 3, levels[0], 9, shrink, decoder))
        convs += [*_resnet(middle, middle, 9, at_middle, decoder)] * 2
        convs += [Conv(middle, middle, 1, at_middle, decoder)] * 4
        norms += 2 * middle * 5
        width = levels[0]
        for level, out in enumerate(levels):
            for _ in range(layers + decoder):
                convs += _resnet(width, out, 9, shrink, decoder)
                norms, width = norms + 2 * (width + out), out
            if 2**level < spatial and level < len(levels) - 1:
                after = levels[level + 1] if matches else out
                convs.append(Conv(out, 4 * after if decoder else after // 4, 9, shrink, decoder))
                shrink, width = shrink // 4 if decoder else shrink * 4, after
        convs.append(Conv(levels[-1], 3 if decoder else 2 * latent, 9, shrink, decoder))
        norms += 2 * levels[-1]
    return _summary(convs, norms, spatial, 1)


def _resnet(inputs: int, outputs: int, taps: int, shrink: int, decoder: bool) -> Iterator[Conv]:
    yield Conv(inputs, outputs, taps, shrink, decoder)
    yield Conv(outputs, outputs, taps, shrink, decoder)
    if inputs != outputs:
        yield Conv(inputs, outputs, 1, shrink, decoder)


def _video(config: Config) -> Autoencoder:
    """Wan 2.1's autoencoder, which Qwen-Image shares: convolutions over 3 x 3 x 3 pixels and frames."""
    base, latent = config.get("base_dim", 96), config.get("z_dim", 16)
    mult, layers = config.get("dim_mult", [1, 2, 4, 4]), config.get("num_res_blocks", 2)
    in_time = config.get("temperal_downsample", [False, True, True])
    top, shrink = base * mult[-1], 4 ** (len(mult) - 1)
    convs = [Conv(3, base, 27), Conv(top, 2 * latent, 27, shrink), Conv(2 * latent, 2 * latent, 1, shrink)]
    convs += [Conv(latent, latent, 1, shrink, True), Conv(latent, top, 27, shrink, True), Conv(base, 3, 27, 1, True)]
    norms = base * mult[0] + top
    for decoder in (False, True):
        middle = [*_resnet(top, top, 27, shrink, decoder), *_resnet(top, top, 27, shrink, decoder)]
        convs += [*middle, Conv(top, 3 * top, 1, shrink, decoder), Conv(top, top, 1, shrink, decoder)]
        norms += 5 * top
    width = base
    for level, factor in enumerate(mult):
        out = base * factor
        for _ in range(layers):
            convs += _resnet(width, out, 27, 4**level, False)
            norms, width = norms + width + out, out
        if level < len(mult) - 1:
            convs += [Conv(out, out, 9, 4**level)] + [Conv(out, out, 3, 4**level)] * in_time[level]
    width = top
    for level, factor in enumerate(reversed(mult)):
        out, shrink = base * factor, 4 ** (len(mult) - 1 - level)
        for _ in range(layers + 1):
            convs += _resnet(width, out, 27, shrink, True)
            norms, width = norms + width + out, out
        if level < len(mult) - 1:
            convs += [Conv(out, out // 2, 9, shrink // 4, True)]
            convs += [Conv(out, 2 * out, 3, shrink, True)] * in_time[::-1][level]
            width = out // 2
    return _summary(convs, norms, 2 ** (len(mult) - 1), 2 ** sum(in_time))


def _summary(convs: list[Conv], num_norm_params: int, spatial: int, temporal: int) -> Autoencoder:
    decoder = [each for each in convs if each.is_decoder]
    return Autoencoder(
        num_params=sum(each.num_params for each in convs) + num_norm_params,
        decode_flop_per_pixel=sum(2.0 * each.num_params / each.shrink for each in decoder),
        peak_channels=max(max(each.inputs, each.outputs) for each in decoder if each.shrink == 1),
        spatial=spatial,
        temporal=temporal,
    )
