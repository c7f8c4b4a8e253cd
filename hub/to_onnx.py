"""
A checkpoint as ONNX graphs, through torch.onnx. Inputs, outputs and their sizes have the names that Optimum gives them:
transformers.js makes its first, empty keys and values by those.

    onnx/model.onnx                 one step of generation: new tokens and the keys and values of those before them
    onnx/model_without_past.onnx    a whole text at once

B batch   T new tokens   S past + new tokens   H heads   V vocabulary
"""

import logging
import warnings

import torch
from transformers import DynamicCache

from hub.export import compare_logits, save_tokenizer

OPSET = 18
_LARGE_BYTES = 1.9e9


class _Graph(torch.nn.Module):
    """The model with tensors alone as inputs and outputs, which is what a graph has."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past=()):
        """
        Args:
            input_ids, position_ids: [B, T].
            attention_mask: [B, S], 1 for a token and 0 for padding.
            past: key, value, key, value, ... of each layer, [B, H, S - T, D/H]; () for a graph without them.

        Returns:
            logits [B, T, V], and with `past` the same of all S tokens.
        """
        num_new, num_all = input_ids.shape[1], attention_mask.shape[1]
        cache = None
        if past:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
        places = torch.arange(num_all)
        sees = (places <= places[num_all - num_new :, None]) & (attention_mask[:, None, None, :] != 0)
        # Not minus infinity: a padded token sees nothing, and softmax would give it NaN.
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)
        outputs = self.model(
            input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=bool(past),
        )
        present = (
            [tensor for layer in outputs.past_key_values.layers for tensor in (layer.keys, layer.values)]
            if past
            else []
        )
        return (outputs.logits, *present)


def write_onnx(model, tokenizer, folder):
    """See `hub.export`."""
    import onnx_ir

    config = model.config
    model.to_gpt2().config.save_pretrained(folder)  # what transformers.js and Optimum look the shape up in
    model.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "onnx").mkdir()
    model.set_attn_implementation("eager")  # written out in operators that every runtime has

    past_names = [f"past_key_values.{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    # Sizes that differ from each other and from 0 and 1, so that none is taken for a constant.
    batch, num_new, num_past = 2, 3, 5
    new = torch.zeros(batch, num_new, dtype=torch.int64)
    positions = torch.arange(num_new).expand(batch, num_new)
    past = tuple(torch.zeros(batch, config.n_head, num_past, config.n_embd // config.n_head) for _ in past_names)

    def write(file, arguments, shapes, input_names, output_names):
        path = folder / "onnx" / file
        with _quiet(), torch.no_grad():
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
        # The weights stand in the graph's own file, which can hold 2 GB, or beside it under Optimum's name.
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
    compare_logits(model, lambda ids: _run_without_past(without_past, ids), tolerance=1e-3)
    compare_logits(model, lambda ids: _run_with_past(with_past, ids, past_names, past[0].shape), tolerance=1e-3)


def _run_without_past(path, ids):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    [logits] = session.run(
        None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    )
    return torch.from_numpy(logits)


def _run_with_past(path, ids, past_names, past_shape):
    """The first token with no past, then the others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (batch, length), (_, heads, _, width) = ids.shape, past_shape
    past, parts = [torch.zeros(batch, heads, 0, width).numpy()] * len(past_names), []
    for begin, end in ((0, 1), (1, length)) if length > 1 else ((0, 1),):
        logits, *past = session.run(
            None,
            {
                "input_ids": ids[:, begin:end].numpy(),
                "attention_mask": torch.ones(batch, end, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(begin, end).expand(batch, end - begin).numpy(),
                **dict(zip(past_names, past, strict=True)),
            },
        )
        parts.append(torch.from_numpy(logits))
    return torch.cat(parts, dim=1)


class _quiet:
    """Without what torch.onnx says of packages that are not there and of names of axes."""

    def __enter__(self):
        self._loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error):
        self._warnings.__exit__(*error)
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
