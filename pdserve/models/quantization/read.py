"""How a model directory says that its weights are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pdserve.models.quantization.awq import Awq
from pdserve.models.quantization.fp8 import Fp8
from pdserve.models.quantization.gptq import Gptq
from pdserve.models.quantization.scheme import Scheme
from pdserve.text.json_file import JsonObject, read_object_if_there

SERVED: Final = "FP8 (e4m3), GPTQ with 2, 4 or 8 bits, AWQ with 4 bits"
MODELOPT_FILE: Final = "hf_quant_config.json"

_FP8_FORMATS: Final = (None, "e4m3", "float8_e4m3fn")
_LARGEST: Final = 2**20
"""Above any group or block of a real checkpoint."""


def read_scheme(config: JsonObject, folder: Path) -> Scheme | None:
    """The scheme that config.json names, or ModelOpt's file beside it; None for plain weights.

    Raises `CheckpointError` for a method, width or layout that is not served, and for values that are wrong.
    """
    found = config.get_object("quantization_config") or config.get_object("compression_config")
    if found is None:
        beside = read_object_if_there(folder / MODELOPT_FILE)
        return None if beside is None else _modelopt(beside)
    method = found.get_str("quant_method")
    for key in ("modules_to_not_convert", "ignored_layers", "ignore"):
        found.get_list(key)
    match method:
        case "fp8" | "fbgemm_fp8":
            return _fp8(found)
        case "modelopt":
            return _modelopt(found)
        case "compressed-tensors":
            return _compressed_tensors(found)
        case "gptq":
            return _gptq(found)
        case "awq":
            return _awq(found)
        case _:
            raise found.wrong("quant_method", f"one that is served ({SERVED})")


def _fp8(config: JsonObject) -> Fp8:
    if config.get_str("fmt") not in _FP8_FORMATS:
        raise config.wrong("fmt", "e4m3")
    if config.get_str("activation_scheme") not in (None, "static", "dynamic"):
        raise config.wrong("activation_scheme", "static or dynamic")
    return Fp8(block=_block(config, "weight_block_size"))


def _modelopt(config: JsonObject) -> Fp8:
    details = config.get_object("quantization") or config
    if details.get_str("quant_algo") != "FP8":
        raise details.wrong("quant_algo", f"FP8, the only ModelOpt algorithm served ({SERVED})")
    details.get_list("exclude_modules")
    return Fp8(block=None)


def _compressed_tensors(config: JsonObject) -> Fp8:
    """llm-compressor's FP8: a list of groups, each with the weights' number type and its scales' shape."""
    if config.get_str("format") != "float-quantized":
        raise config.wrong("format", f"float-quantized ({SERVED})")
    groups = config.get_object("config_groups")
    if groups is None or not groups.data:
        raise config.wrong("config_groups", "an object with a group")
    blocks = {_compressed_group(groups, name) for name in groups.data}
    if len(blocks) != 1:
        raise config.wrong("config_groups", "groups whose weights are all stored alike")
    return Fp8(block=blocks.pop())


def _compressed_group(groups: JsonObject, name: str) -> tuple[int, int] | None:
    group = groups.get_object(name)
    weights = group.get_object("weights") if group is not None else None
    if weights is None:
        raise groups.wrong(name, "an object that says how weights are stored")
    if weights.get_str("type") != "float" or weights.get_int("num_bits") != 8:
        raise weights.wrong("type", f"float with num_bits 8 ({SERVED})")
    strategy = weights.get_str("strategy")
    if strategy not in ("tensor", "channel", "block"):
        raise weights.wrong("strategy", "tensor, channel or block")
    block = _block(weights, "block_structure")
    if (strategy == "block") != (block is not None):
        raise weights.wrong("block_structure", f"what strategy {strategy} asks for")
    return block


def _gptq(config: JsonObject) -> Gptq:
    bits = config.positive_int("bits")
    if bits not in (2, 4, 8):
        raise config.wrong("bits", "2, 4 or 8")
    layout = config.get_str("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise config.wrong("checkpoint_format", "gptq or gptq_v2")
    if config.get_bool("is_marlin_format"):
        raise config.wrong("is_marlin_format", "false: weights in a GPU's own layout are not served")
    for key in ("desc_act", "sym", "static_groups"):
        config.get_bool(key)
    overrides = config.get_object("dynamic")
    if overrides is not None and any(not name.startswith("-:") for name in overrides.data):
        raise config.wrong("dynamic", "empty or only exceptions (-:): one width for all modules is served")
    return Gptq(bits=bits, group_size=_group_size(config), zeros_less_one=layout == "gptq")


def _awq(config: JsonObject) -> Awq:
    bits = "bits" if "bits" in config else "w_bit"
    if config.get_int(bits) != 4:
        raise config.wrong(bits, "4")
    if (config.get_str("version") or "gemm").lower() != "gemm":
        raise config.wrong("version", "gemm")
    if config.get_bool("zero_point") is False:
        raise config.wrong("zero_point", "true")
    return Awq(group_size=_group_size(config))


def _group_size(config: JsonObject) -> int | None:
    """None where one group is all the inputs, which is written as -1."""
    key = "q_group_size" if "q_group_size" in config else "group_size"
    size = config.get_int(key)
    if size == -1:
        return None
    if size is None or not 1 <= size <= _LARGEST:
        raise config.wrong(key, "a positive integer or -1")
    return size


def _block(config: JsonObject, key: str) -> tuple[int, int] | None:
    sizes = config.get_list(key)
    if sizes is None:
        return None
    whole = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
    if len(sizes) != 2 or len(whole) != 2 or not all(1 <= size <= _LARGEST for size in whole):
        raise config.wrong(key, "two positive integers")
    return whole[0], whole[1]
