"""Reads published checkpoints and builds their models.

Reading runs no code from the file. A checkpoint that is incomplete or contradicts itself is refused by name.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from export.models.mar import PRESETS, Mar, MarSize
from export.models.vae import VaeDecoder
from specdec_rt.errors import SpecDecError

__all__ = ["Checkpoint", "CheckpointError", "build_mar", "build_vae_decoder", "load_weights", "read_checkpoint"]

_ALTERED = "the file was altered or put together from two: export the original"
_DOWNLOAD = "download it again"
_OTHER_MODEL = "is it the checkpoint of another kind of model?"
_NOT_FOR_DECODING = ("encoder.", "quant_conv.", "loss.")
"""Prefixes of weights in a VAE's checkpoint that decoding does not need: the encoder's and the training loss's."""
_OLD_CLASSES = 1000
"""Rows of `class_emb` in checkpoints of the first public release, whatever their `class_num`."""


class CheckpointError(SpecDecError):
    """A checkpoint cannot be used; names the file, the key, what was found, what was expected and how to mend it."""

    exit_code = 2


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights from a file, and the options that they were trained with."""

    path: Path
    tensors: Mapping[str, Tensor]
    args: Mapping[str, Any]
    """options of the training command; empty where the file holds none"""

    def error(self, key: str, given: object, expected: object, mend: str) -> CheckpointError:
        """The error which says that `key` is `given` where `expected` was expected."""
        return CheckpointError(f"{self.path}: {key} is {given}; expected {expected}; {mend}")

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of the tensor `key`. Raises CheckpointError where it is missing or of another rank."""
        if key not in self.tensors:
            raise self.error(key, "missing", f"a tensor of {rank} dimensions", _OTHER_MODEL)
        shape = tuple(self.tensors[key].shape)
        if len(shape) != rank or 0 in shape:
            raise self.error(key, f"of shape {list(shape)}", f"{rank} dimensions, none of them 0", _OTHER_MODEL)
        return shape

    def count(self, name: str, default: int) -> int:
        """The option `name`, or `default` where it is not given. Raises CheckpointError unless it is an int above 0."""
        value = self.args.get(name, default)
        if type(value) is not int or value < 1:
            raise self.error(f"args.{name}", repr(value), "a whole number above 0", _ALTERED)
        return value

    def confirm(self, name: str, found: int, where: str) -> None:
        """Raise CheckpointError where the option `name` is given and is not `found`, which the weights `where` show."""
        if name in self.args and self.args[name] != found:
            raise self.error(f"args.{name}", repr(self.args[name]), f"{found}, which {where} shows", _ALTERED)


def read_checkpoint(path: Path, *, weights: Literal["ema", "model"] = "ema") -> Checkpoint:
    """Read a `.safetensors` file, or a `.pth` or `.ckpt` file that torch saved.

    A pickle may hold tensors, plain values and argparse.Namespace, and nothing that runs code. A published file
    holds two sets of weights, `model` and `model_ema` (averaged over training), and `weights` chooses one; a file
    with neither key, like every safetensors file, is one set itself. Raises CheckpointError where the file cannot
    be read, holds anything else, or lacks the chosen set.
    """
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path), {})
    content = _read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dict of weights; {_OTHER_MODEL}")
    if not {"model", "model_ema"} & content.keys():
        return Checkpoint(path, _require_tensors(path, content), {})
    key = "model_ema" if weights == "ema" else "model"
    if not isinstance(content.get(key), dict):
        mend = "take the other set: --weights model" if weights == "ema" else _OTHER_MODEL
        given = f"a {type(content[key]).__name__}" if key in content else "missing"
        raise CheckpointError(f"{path}: {key} is {given}; expected a dict of weights; {mend}")
    args = content.get("args", argparse.Namespace())
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(f"{path}: args is a {type(args).__name__}; expected argparse.Namespace; {_ALTERED}")
    return Checkpoint(path, _require_tensors(path, content[key]), vars(args))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}); {_DOWNLOAD}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped into memory: optimiser states and the other set of weights are never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file can raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is not None:
            raise CheckpointError(
                f"{path}: its pickle holds {foreign[1]}, which was not loaded; expected tensors and "
                "argparse.Namespace alone; save the weights as .safetensors where you trust the file"
            ) from error
        # Torch's message begins with the advice to load the file unsafely; the reason comes after it.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        detail = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise CheckpointError(f"{path}: not a complete torch checkpoint ({detail}); {_DOWNLOAD}") from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error}); expected a checkpoint file")


def _require_tensors(path: Path, weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    for key, value in weights.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            given = f"{key!r} is a {type(value).__name__}"
            raise CheckpointError(f"{path}: {given}; expected a name and a tensor; {_OTHER_MODEL}")
    return dict(weights)


def build_mar(checkpoint: Checkpoint, *, heads: tuple[int, int] | None = None, option: str = "--heads") -> Mar:
    """The MAR model of a checkpoint, in single precision.

    Sizes are read from the shapes of the weights, and options in the file must agree with them. `heads` are the
    attention heads of encoder and decoder, for files that do not say; `option` is the command line's name for them.
    Raises CheckpointError where weights are missing, surplus or of another shape, where they contradict the options,
    and where numbers of heads are unknown.
    """
    size = _mar_size(checkpoint, heads, option)
    tensors = dict(checkpoint.tensors)
    tensors["class_emb.weight"] = tensors["class_emb.weight"][: size.classes]
    with torch.device("meta"):
        model = Mar(size)
    load_weights(model, checkpoint, tensors)
    return model


def build_vae_decoder(checkpoint: Checkpoint) -> VaeDecoder:
    """The KL-16 decoder of a checkpoint, without the encoder.

    Raises CheckpointError where weights of the decoder are missing, surplus or of another shape.
    """
    tensors = {key: value for key, value in checkpoint.tensors.items() if not key.startswith(_NOT_FOR_DECODING)}
    with torch.device("meta"):
        decoder = VaeDecoder()
    load_weights(decoder, checkpoint, tensors)
    return decoder


def _mar_size(checkpoint: Checkpoint, heads: tuple[int, int] | None, option: str) -> MarSize:
    shape = checkpoint.shape
    _, tokens, decoder_width = shape("diffusion_pos_embed_learned", 3)
    _, positions, encoder_width = shape("encoder_pos_embed_learned", 3)
    token_dim = shape("z_proj.weight", 2)[1]
    outputs = shape("diffloss.net.final_layer.linear.weight", 2)[0]
    if positions <= tokens:
        expected = f"more than the {tokens} positions of diffusion_pos_embed_learned"
        raise checkpoint.error("encoder_pos_embed_learned", f"of {positions} positions", expected, _OTHER_MODEL)
    image, stride, patch, channels = _tiling(checkpoint, tokens, token_dim)
    size = MarSize(
        image=image,
        stride=stride,
        patch=patch,
        channels=channels,
        classes=_classes(checkpoint),
        buffer=positions - tokens,
        encoder_width=encoder_width,
        encoder_depth=_depth(checkpoint, "encoder_blocks."),
        encoder_heads=_heads(checkpoint, "encoder", encoder_width, None if heads is None else heads[0], option),
        decoder_width=decoder_width,
        decoder_depth=_depth(checkpoint, "decoder_blocks."),
        decoder_heads=_heads(checkpoint, "decoder", decoder_width, None if heads is None else heads[1], option),
        head_width=shape("diffloss.net.input_proj.weight", 2)[0],
        head_depth=_depth(checkpoint, "diffloss.net.res_blocks."),
        learned_variance=outputs == 2 * token_dim,
    )
    checkpoint.confirm("buffer_size", size.buffer, "encoder_pos_embed_learned")
    checkpoint.confirm("diffloss_w", size.head_width, "diffloss.net.input_proj.weight")
    checkpoint.confirm("diffloss_d", size.head_depth, "the number of diffloss.net.res_blocks")
    _confirm_preset(checkpoint, size)
    return size


def _tiling(checkpoint: Checkpoint, tokens: int, token_dim: int) -> tuple[int, int, int, int]:
    """Image size, stride, patch and channels; the published VAE's where the file does not say."""
    stride = checkpoint.count("vae_stride", 16)
    channels = checkpoint.count("vae_embed_dim", 16)
    patch = checkpoint.count("patch_size", max(math.isqrt(token_dim // channels), 1))
    image = checkpoint.count("img_size", math.isqrt(tokens) * stride * patch)
    if channels * patch**2 != token_dim:
        expected = f"{channels * patch**2} (vae_embed_dim {channels} × patch_size {patch}²)"
        raise checkpoint.error("z_proj.weight", f"for tokens of {token_dim} values", expected, _ALTERED)
    if (image // stride // patch) ** 2 != tokens:
        expected = f"(img_size {image} / vae_stride {stride} / patch_size {patch})²"
        raise checkpoint.error("diffusion_pos_embed_learned", f"for {tokens} tokens", expected, _ALTERED)
    return image, stride, patch, channels


def _classes(checkpoint: Checkpoint) -> int:
    rows = checkpoint.shape("class_emb.weight", 2)[0]
    classes = checkpoint.count("class_num", rows)
    if rows != _OLD_CLASSES or classes > rows:
        checkpoint.confirm("class_num", rows, "class_emb.weight")
    return classes


def _depth(checkpoint: Checkpoint, prefix: str) -> int:
    """The number of blocks under `prefix`; a gap in their numbers shows later, as missing weights."""
    numbers = {key.removeprefix(prefix).partition(".")[0] for key in checkpoint.tensors if key.startswith(prefix)}
    return max(len(numbers), 1)


def _heads(checkpoint: Checkpoint, part: str, width: int, given: int | None, option: str) -> int:
    name = f"{part}_num_heads"
    preset = PRESETS.get(str(checkpoint.args.get("model")))
    if name in checkpoint.args:
        heads = checkpoint.count(name, 0)
    elif preset is not None:
        heads = preset.encoder_heads if part == "encoder" else preset.decoder_heads
    elif given is not None:
        heads = given
    else:
        known = ", ".join(f"{key} ({size.encoder_heads},{size.decoder_heads})" for key, size in PRESETS.items())
        raise checkpoint.error(
            f"args.{name}", "missing", f"a number, or args.model one of {known}", f"pass {option} E,D"
        )
    if given is not None and given != heads:
        raise checkpoint.error(f"args.{name}", heads, f"{given}, which {option} gives", f"leave out {option}")
    if heads < 1 or width % heads:
        raise checkpoint.error(f"args.{name}", heads, f"a divisor of the width {width}", f"pass the right {option} E,D")
    return heads


def _confirm_preset(checkpoint: Checkpoint, size: MarSize) -> None:
    name = checkpoint.args.get("model")
    preset = PRESETS.get(str(name))
    if preset is None:
        return
    for field in ("encoder_width", "encoder_depth", "decoder_width", "decoder_depth"):
        expected, found = getattr(preset, field), getattr(size, field)
        if expected != found:
            given = f"{name!r} ({field} {expected})"
            raise checkpoint.error("args.model", given, f"{field} {found}, which the weights show", _ALTERED)


def load_weights(model: nn.Module, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Give `model`, which is on the meta device, `tensors` as its parameters, in single precision.

    Raises CheckpointError, which names the checkpoint's file, where they are not exactly the model's.
    """
    expected = model.state_dict()
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        shape = f"float{list(expected[missing[0]].shape)}"
        raise checkpoint.error(_first(missing), "missing", shape, _OTHER_MODEL)
    if surplus:
        raise checkpoint.error(_first(surplus), "surplus", "no such weights", _OTHER_MODEL)
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            given = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            raise checkpoint.error(key, given, f"float{list(expected[key].shape)}", _ALTERED)
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
    model.eval()


def _first(keys: list[str]) -> str:
    """The first key, and how many more there are."""
    others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    return keys[0] + others
