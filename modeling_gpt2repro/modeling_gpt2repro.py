"""
GPT-2 (Radford et al. 2019) as a Hugging Face model: attention, MLP, block, trunk, language model.

The names of modules and parameters are GPT-2's own (`transformer.h.0.attn.c_attn.weight`, ...); the linear
layers are `nn.Linear`, so a weight here is the transpose of transformers' `Conv1D` weight and nothing else.

Shapes:  B batch   T new tokens   S past + new tokens   D n_embd   H heads   V vocabulary
"""

import inspect
import math

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_gpt2repro import GPT2ReproConfig
from .loss import linear_cross_entropy
from .mlp import mlp

logger = logging.get_logger(__name__)

# transformers 5.0 calls the argument `input_embeds` and wants `cache_position`; later 5.x do neither.
_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters
_MASK_INPUT = "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds"

# What transformers' GPT-2 takes and this model does not; unknown arguments go to the attention kernel, unread.
_NOT_HERE = {
    "token_type_ids": "GPT-2 was trained without token types",
    "encoder_hidden_states": "GPT-2 as published has no cross-attention",
    "encoder_attention_mask": "GPT-2 as published has no cross-attention",
    "head_mask": "transformers 5 has none either; prune or hook the attention instead",
}


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """
    Attention written out, for reading, for `output_attentions`, and as the reference of the fast kernels.

    Args:
        query: [B, H, T, D/H].  key, value: [B, H, S, D/H].
        attention_mask: [B or 1, 1, T, S], added to the scores (0 or a very negative number).

    Returns:
        output [B, T, H, D/H] and weights [B, H, T, S].
    """
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class GPT2ReproAttention(nn.Module):
    """Multi-head causal self-attention; the kernel is whatever `config._attn_implementation` names."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # which layer of a key-value cache is ours
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attn_pdrop
        self.is_causal = config.is_causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = residual_projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, cache_position=None, **kwargs):
        """[B, T, D] -> [B, T, D], and the weights [B, H, T, S] where the kernel gives them (eager)."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(heads_shape).transpose(1, 2)  # [B, H, T, D/H]
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            # transformers 5.0's static cache must be told where to write; later ones know, and pass over it.
            key, value = past_key_values.update(  # [B, H, S, D/H]
                key, value, self.layer_idx, {"cache_position": cache_position}
            )
        attend = eager_attention
        if self.config._attn_implementation != "eager":
            # An assignment of its own: vLLM looks for one in this source.
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape)  # [B, T, H, D/H] -> [B, T, D]
        return self.resid_dropout(self.c_proj(output)), weights


class GPT2ReproMLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between, [B, T, D] -> [B, T, D]."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = residual_projection(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if eager and all(is_plain(layer) for layer in (self.c_fc, self.act, self.c_proj)):
            output = mlp(hidden_states, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)
        else:
            output = self.c_proj(self.act(self.c_fc(hidden_states)))
        return self.dropout(output)


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Pre-norm block: the residual stream is only ever added to."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        attention_output, attention_weights = self.attn(
            self.ln_1(hidden_states), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention_output
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return hidden_states, attention_weights


def residual_projection(in_features, out_features):
    """
    A linear layer that writes into the residual stream, marked for its smaller initialisation.

    The mark is on the leaf because transformers 5 calls `_init_weights` only with modules that own
    parameters: GPT-2's `isinstance(module, Attention)` would never be reached here.
    """
    linear = nn.Linear(in_features, out_features)
    linear.is_residual_projection = True
    return linear


def is_plain(module):
    """
    Whether a linear layer or GELU is still what this file made it, so that its parameters may be used without
    calling it. LoRA, quantisation, tensor parallelism, offloading and hooks make it something else.
    """
    weight = getattr(module, "weight", None)
    return (
        type(module) in (nn.Linear, nn.GELU, LanguageModelHead)
        and type(weight) in (nn.Parameter, torch.Tensor, type(None))  # a quantised weight is a subclass
        and "forward" not in vars(module)  # where accelerate's offloading puts its own
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
    )


class LanguageModelHead(nn.Linear):
    """The last linear layer; given targets, it computes their loss and not all the logits."""

    def forward(self, hidden_states, targets=None, num_items=None):
        """
        Args:
            hidden_states: [..., D].
            targets: [N] token ids, one for each hidden state; -100 is ignored.
            num_items: what the summed loss is divided by.

        Returns:
            logits [..., V]; with targets the loss, a scalar.
        """
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states.flatten(0, -2), self.weight, targets, num_items=num_items)


class LogitsNotComputed:
    """
    The value of `outputs.logits` in training with labels: any use of it raises an error with the remedy.

    Not None, so that the error is not "'NoneType' object is not subscriptable"; and without any attribute of a tensor,
    so that accelerate, DDP and torch.compile pass it on unread.
    """

    MESSAGE = (
        "logits are not computed in training with labels, where they would be the largest tensor of the step. To get "
        "them: model.config.logits_in_training = True, or model(..., return_logits=True), or leave the labels out"
    )

    def __getattr__(self, name: str):
        raise AttributeError(f"{self.MESSAGE} (outputs.logits.{name})")

    def _refuse(self, *args, **kwargs):
        raise TypeError(LogitsNotComputed.MESSAGE)

    __torch_function__ = classmethod(_refuse)
    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __neg__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __pow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse


_LOGITS_NOT_COMPUTED = LogitsNotComputed()


def is_sharded(module):
    """Whether FSDP2 holds the parameters: they are whole while the module is called, and it may be called as ever."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def hidden_state_indices(request: bool | int | list[int] | None, count: int) -> set[int]:
    """Return which of `count` hidden states `output_hidden_states` asks for: True for all, or one or more indices."""
    if not request:
        return set()
    if request is True:
        return set(range(count))
    indices = [request] if isinstance(request, int) else request
    return {index % count for index in indices if -count <= index < count}


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """Initialisation and what the rest of transformers needs to know about the model."""

    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ("GPT2ReproBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls):
        """Yes. transformers would look for a phrase in this file, and the phrase differs between 5.x versions."""
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        """
        Normal(0, 0.02); projections into the residual stream are scaled by 1/sqrt(N) with N = 2 n_layer of
        them (GPT-2 paper, section 2.3). Biases 0, LayerNorms at the identity. Only `nn.init` functions:
        from_pretrained patches those to leave loaded weights alone.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            if getattr(module, "is_residual_projection", False):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def save_pretrained(self, *args, **kwargs):
        """transformers', but `auto_map` names every class: left alone it names only the one being saved."""
        self.config.auto_map = {
            "AutoConfig": "configuration_gpt2repro.GPT2ReproConfig",
            "AutoModel": "modeling_gpt2repro.GPT2ReproModel",
            "AutoModelForCausalLM": "modeling_gpt2repro.GPT2ReproForCausalLM",
            "AutoModelForSequenceClassification": "modeling_gpt2repro.GPT2ReproForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_gpt2repro.GPT2ReproForTokenClassification",
        }
        return super().save_pretrained(*args, **kwargs)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """GPT-2 without the head: token ids in, last hidden states out."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, new_embeddings):
        self.wte = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        is_causal=None,
        **kwargs,
    ):
        """
        Args:
            input_ids: [B, T] token ids, or `inputs_embeds` [B, T, D] in their place.
            attention_mask: [B, S], 1 for a token and 0 for padding (left or right); or 4D, [B or 1, 1 or H, T, S],
                boolean (True: attend) or floating (added to the scores), which replaces the causal mask.
            position_ids: [B, T]; counted from `attention_mask` (padding does not count) when not given. Where they
                restart, and there is neither mask nor cache, documents are packed: each attends to itself alone.
            past_key_values: a transformers `Cache`.
            use_cache: return a cache; by default only outside training.
            output_attentions: needs `attn_implementation="eager"`, the fast kernels have no weights to give.
            is_causal: whether tokens attend only to themselves and earlier ones; `config.is_causal` when None.
            kwargs: passed on to the attention kernel.

        Returns:
            BaseModelOutputWithPast: last_hidden_state [B, T, D]; on request past_key_values,
            hidden_states (n_layer + 1 of [B, T, D], the last one after ln_f), attentions ([B, H, T, S] each).

        Raises:
            ValueError: both or neither of the inputs, positions past n_positions, attentions of a kernel that
                has none, a mask that does not fit, a cache for bidirectional attention.
        """
        config = self.config
        for name in _NOT_HERE:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: {_NOT_HERE[name]}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise ValueError(
                f"past_key_values is a transformers Cache (DynamicCache, StaticCache, ...), got a "
                f"{type(past_key_values).__name__}"
            )
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        kept_hidden_states = hidden_state_indices(output_hidden_states, config.n_layer + 1)
        is_causal = config.is_causal if is_causal is None else is_causal
        if use_cache is None:
            use_cache = config.use_cache and is_causal and not self.training
        if not is_causal and (use_cache or past_key_values is not None):
            raise ValueError("bidirectional attention (is_causal=False) has no cache: tokens attend to later ones")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)

        num_new = inputs_embeds.shape[1]
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # Without a cache, a row with position ids may be longer: short texts one after the other, as vLLM gives them.
        is_packed = position_ids is not None and not use_cache and past_key_values is None
        if not is_packed and isinstance(num_past, int) and num_past + num_new > config.n_positions:
            raise ValueError(
                f"a sequence of {num_past + num_new} tokens does not fit n_positions={config.n_positions}: "
                "the model has no position embedding past that; shorten the input or ask for fewer new tokens"
            )
        past_and_new = kwargs.pop("cache_position", None)  # given by transformers 5.0's generate()
        if past_and_new is None:
            past_and_new = torch.arange(num_new, device=inputs_embeds.device) + num_past
        # The mask is made before a cache of our own: position ids that restart (packed documents) count
        # only where there is none yet.
        mask = self._attention_mask(
            attention_mask, inputs_embeds, position_ids, past_key_values, past_and_new, is_causal
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        if position_ids is None:
            if torch.is_tensor(attention_mask) and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
            else:
                position_ids = past_and_new.unsqueeze(0)
        self._check_positions(position_ids)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        del inputs_embeds  # nothing needs it any more, and a name would keep it in memory through all blocks

        all_hidden_states = () if output_hidden_states else None
        all_attentions = () if output_attentions else None
        for index, block in enumerate(self.h):
            if output_hidden_states:
                all_hidden_states += (hidden_states if index in kept_hidden_states else None,)
            hidden_states, attention_weights = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                is_causal=is_causal,
                cache_position=past_and_new,
                **kwargs,
            )
            if output_attentions and attention_weights is not None:
                all_attentions += (attention_weights,)
        hidden_states = self.ln_f(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states if config.n_layer in kept_hidden_states else None,)
        if output_attentions and not all_attentions and not torch.compiler.is_compiling():
            logger.warning_once(
                f"output_attentions=True gives no attentions with attn_implementation={config._attn_implementation!r}, "
                "whose kernel never forms the weights: load the model with attn_implementation='eager'"
            )

        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
        )

    def _check_positions(self, position_ids):
        """Raises ValueError for positions that have no embedding."""
        if position_ids.device.type != "cpu" or torch.compiler.is_compiling() or not position_ids.numel():
            return  # on a GPU looking would stop its queue at every call; there the embedding's own assertion fires
        first, last = position_ids.min().item(), position_ids.max().item()
        if first < 0 or last >= self.config.n_positions:
            raise ValueError(
                f"position_ids from {first} to {last} do not fit n_positions={self.config.n_positions}: "
                f"the model knows positions 0 to {self.config.n_positions - 1}"
            )

    def _attention_mask(self, attention_mask, inputs_embeds, position_ids, past_key_values, past_and_new, is_causal):
        """
        The mask in the form that the attention kernel wants; None where its own causal (or full) attention will do,
        so that the flash kernels run.

        Args:
            attention_mask: None, [B, S] (1 for a token), or [B or 1, 1 or H, T, S]: boolean (True: attend) or
                floating (added to the scores).
            position_ids: as the caller gave them. Without a mask and a cache, restarts in them mean packed
                documents, which do not attend to each other.
        """
        kernel = self.config._attn_implementation
        if attention_mask is not None and not torch.is_tensor(attention_mask):
            return attention_mask  # flex attention's BlockMask
        if attention_mask is not None and attention_mask.ndim == 4:
            if kernel == "flex_attention" or "flash" in kernel:
                # flex takes one as a score bias, and torch 2.13's CPU kernel then crashes the process.
                raise ValueError(
                    f"attn_implementation={kernel!r} takes no 4D attention_mask tensor: use 'sdpa' or 'eager' "
                    "(or, with flex_attention, give a BlockMask)"
                )
            if attention_mask.dtype == torch.bool:
                if kernel == "sdpa":
                    return attention_mask
                lowest = torch.finfo(inputs_embeds.dtype).min
                return torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype).masked_fill(~attention_mask, lowest)
            if attention_mask.is_floating_point():
                return attention_mask.to(inputs_embeds.dtype)
            raise ValueError(
                f"a 4D attention_mask is boolean (True: attend) or floating (added to the scores), "
                f"got {attention_mask.dtype}"
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask is 2D or 4D, got the shape {tuple(attention_mask.shape)}")
        if attention_mask is not None and past_key_values is None and attention_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit the input's "
                f"batch and length {tuple(inputs_embeds.shape[:2])}"
            )
        if (
            kernel == "sdpa"
            and is_causal
            and attention_mask is None
            and position_ids is None
            and past_key_values is None
        ):
            # transformers would say so too, but not while torch 2.10 or 2.11 compiles: it takes that for an export.
            return None
        arguments = {"config": self.config, _MASK_INPUT: inputs_embeds, "attention_mask": attention_mask}
        if not is_causal:
            return create_bidirectional_mask(**arguments)
        if "cache_position" in _MASK_PARAMETERS:
            arguments["cache_position"] = past_and_new
        return create_causal_mask(**arguments, past_key_values=past_key_values, position_ids=position_ids)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-model head, which shares the token embedding's matrix."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config):
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = LanguageModelHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        logits_to_keep=0,
        return_logits=None,
        **kwargs,
    ):
        """
        Args (beside those of `GPT2ReproModel.forward`):
            labels: [B, T] token ids, as a rule `input_ids` themselves: the shift by one position happens
                here (transformers' convention). -100 is ignored.
            shift_labels (a keyword argument): [B, T], the token that follows each position, already shifted;
                used instead of `labels` if both are given (Trainer's context parallelism gives both).
            num_items_in_batch: what the summed loss is divided by; by default the labels that count.
            logits_to_keep: logits of the last so many positions only, or of the positions in an index
                tensor; 0 keeps all. The loss is over all positions regardless.
            return_logits: whether to compute logits. By default yes, but when training on labels, where they
                would be the largest tensor of the step, only if `config.logits_in_training` is set.

        Returns:
            CausalLMOutputWithPast: loss (scalar float32) with labels; logits [B, T, V], None with
            return_logits=False, or by default in training with labels a `LogitsNotComputed`; and past_key_values,
            hidden_states, attentions as in `GPT2ReproModel.forward`.
        """
        # Not in the signature: Trainer takes every argument there that is called a label for one that must be given.
        shift_labels = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if use_cache is None and has_labels:
            use_cache = False
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        loss = None
        if has_labels:
            if shift_labels is None:
                # The last position has no next token to predict.
                shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            shift_labels = shift_labels.flatten().to(hidden_states.device)
            if num_items_in_batch is None:
                num_items_in_batch = (shift_labels != -100).sum()
            elif torch.is_tensor(num_items_in_batch):
                num_items_in_batch = num_items_in_batch.to(hidden_states.device)
            has_bias = self.lm_head.bias is not None
            if isinstance(self.lm_head, LanguageModelHead) and is_sharded(self.lm_head) and not has_bias:
                loss = self.lm_head(hidden_states, shift_labels, num_items_in_batch)
            elif is_plain(self.lm_head) and not has_bias:  # also a new one, after resizing the vocabulary
                loss = linear_cross_entropy(
                    hidden_states.flatten(0, 1), self.lm_head.weight, shift_labels, num_items=num_items_in_batch
                )
            else:  # LoRA, quantisation, offloading, hooks: whatever the head has become, it is called
                all_logits = self.lm_head(hidden_states).flatten(0, 1).float()
                loss = nn.functional.cross_entropy(all_logits, shift_labels, reduction="sum") / num_items_in_batch
        logits = None
        if return_logits is None and self.training and has_labels and not self.config.logits_in_training:
            # nn.DataParallel gathers the outputs of its replicas, which takes tensors or None.
            logits = None if getattr(self, "_is_replica", False) else _LOGITS_NOT_COMPUTED
        elif return_logits is None or return_logits:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, positions])

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_gpt2(cls, model_or_path, **kwargs):
        """
        A copy of transformers' GPT-2: `GPT2ReproForCausalLM.from_gpt2("openai-community/gpt2")`.

        Args:
            model_or_path: a `GPT2LMHeadModel`, or what its `from_pretrained` takes (Hub id or folder).
            kwargs: passed to `GPT2LMHeadModel.from_pretrained` (`revision`, `dtype`, ...).

        Raises:
            ValueError: the model has something GPT-2 as published has not (cross-attention, ...).
        """
        from .conversion import from_gpt2

        return from_gpt2(cls, model_or_path, **kwargs)

    def to_gpt2(self):
        """The same weights as a plain `GPT2LMHeadModel`, which every engine that knows GPT-2 can open."""
        from .conversion import to_gpt2

        return to_gpt2(self)


class GPT2ReproClassifier(GPT2ReproPreTrainedModel):
    """Base of the classifiers, whose generic heads build their trunk with AutoModel.from_config."""

    base_model_prefix = "transformer"

    def __init__(self, config):
        # With custom code from a folder, transformers imports the configuration file twice, and `config` may be of the
        # class that this file did not import. AutoModel has to know that one, or it asks about custom code.
        AutoModel.register(type(config), GPT2ReproModel, exist_ok=True)
        super().__init__(config)


class GPT2ReproForSequenceClassification(GenericForSequenceClassification, GPT2ReproClassifier):
    """A score for the whole sequence from its last token that is not padding (transformers' generic head)."""

    base_model_prefix = "transformer"


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproClassifier):
    """A score for every token (transformers' generic head)."""

    base_model_prefix = "transformer"


AutoModel.register(GPT2ReproConfig, GPT2ReproModel, exist_ok=True)

# Trainer (label smoothing shifts the labels), pipelines and model cards look up what a class does by its name.
for names, model_class in (
    (modeling_auto.MODEL_MAPPING_NAMES, GPT2ReproModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GPT2ReproForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, GPT2ReproForSequenceClassification),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, GPT2ReproForTokenClassification),
):
    names[GPT2ReproConfig.model_type] = model_class.__name__

# save_pretrained then copies these files next to the weights.
GPT2ReproModel.register_for_auto_class("AutoModel")
GPT2ReproForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPT2ReproForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GPT2ReproForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "GPT2ReproForCausalLM",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
