# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's benchmark, built from the source in the package llama-cpp-python."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from examples.model import MambaLM
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "build" / "llama.cpp"


class UnavailableError(Exception):
    """llama.cpp cannot be built or run; the text says why."""


def llama_bench() -> Path:
    """The program, which takes some minutes to build the first time.

    Raises:
        UnavailableError: the package index, CMake or a compiler is missing.
    """
    program = FOLDER / "build" / "bin" / "llama-bench"
    if not program.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:")
        _run(*pip, "--dest", str(FOLDER), "llama-cpp-python")
        for archive in FOLDER.glob("*.tar.gz"):
            with tarfile.open(archive) as file:
                file.extractall(FOLDER, filter="data")
        (source,) = FOLDER.glob("llama_cpp_python-*/vendor/llama.cpp")
        options = ("BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF")
        options += (
            "LLAMA_BUILD_EXAMPLES=OFF",
            "LLAMA_BUILD_SERVER=OFF",
            "CMAKE_BUILD_TYPE=Release",
        )
        build = str(FOLDER / "build")
        _run("cmake", "-S", str(source), "-B", build, *(f"-D{option}" for option in options))
        _run("cmake", "--build", build, "--target", "llama-bench", "--parallel")
    return program


def tokens_per_second(
    model: MambaLM, dtype: torch.dtype, prompt: int, tokens: int, rounds: int
) -> tuple[float, float]:
    """Of a prompt, and of decoding, each the median of its rounds, with torch's threads.

    Raises:
        UnavailableError: llama.cpp or the package gguf is not there.
    """
    program = llama_bench()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "model.gguf")
        write_gguf(model, dtype, weights)
        options = {"-m": weights, "-p": prompt, "-n": tokens, "-r": rounds, "-o": "json"}
        options["-t"] = torch.get_num_threads()
        output = _run(str(program), *(str(word) for pair in options.items() for word in pair))
    found = {}
    for result in json.loads(output):
        samples = sorted(result["samples_ts"])
        found[result["n_gen"] > 0] = samples[len(samples) // 2]
    return found[False], found[True]


def write_gguf(model: MambaLM, dtype: torch.dtype, path: Path) -> None:
    """The model in llama.cpp's format, its matrices of this type, without a vocabulary."""
    try:
        import gguf
    except ImportError:
        raise UnavailableError("the package gguf is not installed") from None
    block = model.blocks[0]
    vocabulary, d_model = model.embedding.weight.shape
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(model.blocks))
    writer.add_ssm_conv_kernel(block.d_conv)
    writer.add_ssm_inner_size(block.d_inner)
    writer.add_ssm_state_size(block.d_state)
    writer.add_ssm_time_step_rank(block.dt_rank)
    writer.add_layer_norm_rms_eps(torch.finfo(torch.float32).eps)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(vocabulary)

    def add(name: str, tensor: Tensor, *, matrix: bool = False) -> None:
        kind = gguf.GGMLQuantizationType.F32
        if matrix and dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
        data = gguf.quants.quantize(tensor.detach().float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", model.embedding.weight, matrix=True)
    add("output_norm.weight", model.final_norm.weight)
    for i, (norm, block) in enumerate(zip(model.norms, model.blocks, strict=True)):
        add(f"blk.{i}.attn_norm.weight", norm.weight)
        for theirs, layer in (("in", "in_proj"), ("x", "x_proj"), ("dt", "dt_proj")):
            add(f"blk.{i}.ssm_{theirs}.weight", getattr(block, layer).weight, matrix=True)
        add(f"blk.{i}.ssm_out.weight", block.out_proj.weight, matrix=True)
        add(f"blk.{i}.ssm_dt.bias", block.dt_proj.bias)
        add(f"blk.{i}.ssm_conv1d.weight", block.conv1d.weight[:, 0])
        add(f"blk.{i}.ssm_conv1d.bias", block.conv1d.bias)
        add(f"blk.{i}.ssm_a", -block.A_log.exp())
        add(f"blk.{i}.ssm_d", block.D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UnavailableError(f"{command[0]} is not there") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "it said nothing").strip().splitlines()[-1]
        raise UnavailableError(f"{Path(command[0]).name} failed: {last}") from None
