"""Write ONNX graphs with torch.onnx.

    onnx/model.onnx                 one step of generation: new tokens, and the keys and values of those before them
    onnx/model_without_past.onnx    a full text at once

Inputs, outputs and their dimensions have Optimum's names, from which transformers.js makes its first, empty keys and
values.

B batch   T new tokens   S past + new tokens   H heads   V vocabulary
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from modeling_gpt2repro import GPT2ReproForCausalLM

OPSET = 18
_LARGE_BYTES = 1.9e9  # a graph's own file can hold 2 GB


class _Graph(torch.nn.Module):
    """The model with only tensors as inputs and outputs."""

    def __init__(self, model: GPT2ReproForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Return logits [B, T, V] and, with `past`, the keys and values of all S tokens.

        Args:
            input_ids, position_ids: [B, T].
            attention_mask: [B, S], 1 for a token and 0 for padding.
            past: key, value, key, value, ... of each layer, [B, H, S - T, D/H]; () for a graph without them.
        """
        num_new, num_all = input_ids.shape[1], attention_mask.shape[1]
        cache = DynamicCache(zip(past[::2], past[1::2], strict=True)) if past else None
        positions = torch.arange(num_all)
        sees = (positions <= positions[num_all - num_new :, None]) & (attention_mask[:, None, None, :] != 0)
        outputs = self.model(
            input_ids,
            # The smallest float, not minus infinity: a padded token sees nothing, and softmax would give NaN.
            attention_mask=torch.where(sees, 0.0, torch.finfo(torch.float32).min),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=bool(past),
        )
        layers = outputs.past_key_values.layers if past else []
        return (outputs.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def write_onnx(model: GPT2ReproForCausalLM, folder: Path) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Write both graphs and the config. Return functions that run them in ONNX Runtime: token ids [B, T] to logits.

    The model's attention implementation is set to eager.
    """
    config = model.config
    model.to_gpt2().config.save_pretrained(folder)  # transformers.js and Optimum read the shape from it
    model.generation_config.save_pretrained(folder)
    (folder / "onnx").mkdir()
    model.set_attn_implementation("eager")  # operators that every runtime has

    inputs = ["input_ids", "attention_mask", "position_ids"]
    past_names = [f"past_key_values.{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    present_names = [name.replace("past_key_values", "present") for name in past_names]
    # Sizes that differ from each other and from 0 and 1, so that none becomes a constant.
    batch, num_new, num_past = 2, 3, 5
    new = torch.zeros(batch, num_new, dtype=torch.int64)
    positions = torch.arange(num_new).expand(batch, num_new)
    past = tuple(torch.zeros(batch, config.n_head, num_past, config.n_embd // config.n_head) for _ in past_names)
    new_shape = {0: "batch_size", 1: "sequence_length"}
    all_shape = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
    past_shape = {0: "batch_size", 2: "past_sequence_length"}

    with_past = folder / "onnx" / "model.onnx"
    _write(
        with_past,
        model,
        (new, torch.ones(batch, num_past + num_new, dtype=torch.int64), positions + num_past, past),
        dynamic_shapes=(new_shape, all_shape, new_shape, (past_shape,) * len(past)),
        input_names=[*inputs, *past_names],
        output_names=["logits", *present_names],
    )
    without_past = folder / "onnx" / "model_without_past.onnx"
    _write(
        without_past,
        model,
        (new, torch.ones_like(new), positions),
        dynamic_shapes=(new_shape, new_shape, new_shape),
        input_names=inputs,
        output_names=["logits"],
    )
    empty = dict.fromkeys(past_names, past[0][:, :, :0])
    return [lambda ids: _run(without_past, ids, {}), lambda ids: _run(with_past, ids, empty)]


def _write(path: Path, model: GPT2ReproForCausalLM, arguments: tuple, **options: Any) -> None:
    import onnx_ir

    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            _Graph(model).eval(), arguments, opset_version=OPSET, dynamo=True, verbose=False, **options
        )
    assert program is not None  # only the older exporter returns None
    # Large weights go into a file next to the graph, with Optimum's name.
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > _LARGE_BYTES
    onnx_ir.save(program.model, path, external_data=f"{path.name}_data" if is_large else None)


def _run(path: Path, ids: torch.Tensor, past: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [B, T, V] of a graph. With `past`, the first token alone, then the others with its keys."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch, length = ids.shape
    parts, cache = [], {name: tensor.numpy() for name, tensor in past.items()}
    for begin, end in [(0, 1), (1, length)] if past and length > 1 else [(0, length)]:
        inputs = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": torch.ones(batch, end, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(begin, end).expand(batch, end - begin).numpy(),
        }
        logits, *present = session.run(None, inputs | cache)
        cache = dict(zip(cache, present, strict=True))
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)
