"""
Write ONNX graphs with torch.onnx. Inputs, outputs and their dimensions have Optimum's names, from which transformers.js
makes its first, empty keys and values.

    onnx/model.onnx                 one step of generation: new tokens, and the keys and values of those before them
    onnx/model_without_past.onnx    a full text at once

B batch   T new tokens   S past + new tokens   H heads   V vocabulary
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hub.checks import compare_logits, save_tokenizer

OPSET = 18
_LARGE_BYTES = 1.9e9  # a graph's own file can hold 2 GB


class _Graph(torch.nn.Module):
    """The model with only tensors as inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids, position_ids: [B, T].
            attention_mask: [B, S], 1 for a token and 0 for padding.
            past: key, value, key, value, ... of each layer, [B, H, S - T, D/H]; () for a graph without them.

        Returns:
            logits [B, T, V]; with `past`, also the keys and values of all S tokens.
        """
        num_new, num_all = input_ids.shape[1], attention_mask.shape[1]
        cache = DynamicCache() if past else None
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
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


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Write both graphs with config and tokenizer, run them in ONNX Runtime and compare their logits with the model's.

    The model's attention implementation is set to eager.
    """
    import onnx_ir

    config = model.config
    model.to_gpt2().config.save_pretrained(folder)  # transformers.js and Optimum read the shape from it
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "onnx").mkdir()
    model.set_attn_implementation("eager")  # operators that every runtime has

    past_names = [f"past_key_values.{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    # Sizes that differ from each other and from 0 and 1, so that none becomes a constant.
    batch, num_new, num_past = 2, 3, 5
    new = torch.zeros(batch, num_new, dtype=torch.int64)
    positions = torch.arange(num_new).expand(batch, num_new)
    past = tuple(torch.zeros(batch, config.n_head, num_past, config.n_embd // config.n_head) for _ in past_names)

    def write(file: str, arguments: tuple, shapes: tuple, input_names: list[str], output_names: list[str]) -> Path:
        path = folder / "onnx" / file
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            program = torch.onnx.export(
                _Graph(model).eval(),
                arguments,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        # Large weights go into a file next to the graph, with Optimum's name.
        is_large = sum(parameter.nbytes for parameter in model.parameters()) > _LARGE_BYTES
        onnx_ir.save(program.model, path, external_data=f"{file}_data" if is_large else None)
        return path

    with_past = write(
        "model.onnx",
        (new, torch.ones(batch, num_past + num_new, dtype=torch.int64), positions + num_past, past),
        (
            {0: "batch_size", 1: "sequence_length"},
            {0: "batch_size", 1: "past_sequence_length + sequence_length"},
            {0: "batch_size", 1: "sequence_length"},
            tuple({0: "batch_size", 2: "past_sequence_length"} for _ in past_names),
        ),
        [*inputs, *past_names],
        ["logits", *(name.replace("past_key_values", "present") for name in past_names)],
    )
    without_past = write(
        "model_without_past.onnx",
        (new, torch.ones(batch, num_new, dtype=torch.int64), positions),
        tuple({0: "batch_size", 1: "sequence_length"} for _ in inputs),
        inputs,
        ["logits"],
    )
    empty = dict.fromkeys(past_names, past[0][:, :, :0])
    compare_logits(model, lambda ids: _run(without_past, ids, {}), tolerance=1e-3)
    compare_logits(model, lambda ids: _run(with_past, ids, empty), tolerance=1e-3)


def _run(path: Path, ids: torch.Tensor, past: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits [B, T, V] of a graph. With `past`, the first token alone, then the others with its keys."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch, length = ids.shape
    parts, past = [], {name: tensor.numpy() for name, tensor in past.items()}
    for begin, end in [(0, 1), (1, length)] if past and length > 1 else [(0, length)]:
        logits, *present = session.run(
            None,
            {
                "input_ids": ids[:, begin:end].numpy(),
                "attention_mask": torch.ones(batch, end, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(begin, end).expand(batch, end - begin).numpy(),
                **past,
            },
        )
        past = dict(zip(past, present, strict=True))
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)
