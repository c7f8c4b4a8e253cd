"""GPT-2 (Radford et al. 2019) as a Hugging Face model: attention, MLP, block, trunk, language model, classifiers.

Modules and parameters have the names of transformers' GPT-2 (`transformer.h.0.attn.c_attn.weight`, ...). The linear
layers are `nn.Linear`, so their weights are the transpose of the `Conv1D` weights there.

Shapes:  B batch   T new tokens   S past + new tokens   D n_embd   H heads   V vocabulary
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.modules.module import _has_any_global_hook
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, GPT2LMHeadModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2repro import GPT2ReproConfig
from .conversion import convert_from_gpt2, convert_to_gpt2
from .loss import LOGITS_NOT_COMPUTED, linear_cross_entropy
from .mlp import recomputing_mlp

# Arguments of transformers' GPT-2 that would be passed on to the attention kernel, which ignores them.
_UNSUPPORTED_ARGUMENTS = ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask", "head_mask")


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step, for `output_attentions` and as the reference for the fast kernels.

    Query is [B, H, T, D/H], key and value are [B, H, S, D/H]. The mask [B or 1, 1 or H, T, S] is added to the scores.

    Returns:
        The output [B, T, H, D/H] and the attention weights [B, H, T, S].
    """
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def residual_projection(in_features: int, out_features: int) -> nn.Linear:
    """Create a linear layer whose output is added to the residual stream, with a mark for its smaller initialization.

    The mark is on the layer itself because transformers 5 calls `_init_weights` of models outside the library only for
    modules that own parameters, not for the attention and the MLP around them.
    """
    linear: Any = nn.Linear(in_features, out_features)
    linear.is_residual_projection = True
    return linear


class GPT2ReproAttention(nn.Module):
    """Multi-head self-attention with the kernel that `config._attn_implementation` names."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # index of this layer in the key-value cache
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attn_pdrop
        self.is_causal = config.is_causal
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = residual_projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [B, T, D] to [B, T, D]. Also return the weights [B, H, T, S] if the kernel computes them (eager)."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part.view(heads_shape).transpose(1, 2)  # [B, H, T, D/H]
            for part in self.c_attn(hidden_states).chunk(3, dim=-1)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, H, S, D/H]
        attend = eager_attention
        if self.config._attn_implementation != "eager":
            # vLLM searches this source for the assignment, and does not recognize the get_interface() of Llama.
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


def is_unmodified(module: nn.Module) -> bool:
    """Return True if the parameters of a linear layer or GELU may be used without calling the module.

    LoRA, quantization, tensor parallelism, offloading and hooks replace or wrap the module, and then it must be called.
    """
    weight = getattr(module, "weight", None)
    return (
        type(module) in (nn.Linear, nn.GELU, LanguageModelHead)
        and type(weight) in (nn.Parameter, torch.Tensor, type(None))  # a quantized weight is a subclass
        and "forward" not in vars(module)  # accelerate's offloading replaces it
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
    )


class GPT2ReproMLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, config: GPT2ReproConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = residual_projection(config.n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._is_unmodified():
            # The same result without keeping the GELU's output (2% slower). torch.compile makes this trade itself.
            output = recomputing_mlp(
                hidden_states, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
            )
        else:
            output = self.c_proj(self.act(self.c_fc(hidden_states)))
        return self.dropout(output)

    def _is_unmodified(self) -> bool:
        has_biases = getattr(self.c_fc, "bias", None) is not None and getattr(self.c_proj, "bias", None) is not None
        is_tanh = getattr(self.act, "approximate", None) == "tanh"
        return has_biases and is_tanh and all(is_unmodified(layer) for layer in (self.c_fc, self.act, self.c_proj))


class GPT2ReproBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention and MLP each add their output to the residual stream."""

    def __init__(self, config: GPT2ReproConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ReproAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ReproMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        attention_output, _ = self.attn(
            self.ln_1(hidden_states), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class LanguageModelHead(nn.Linear):
    """The last linear layer. If it is called with targets, it computes their loss without the full logits."""

    def forward(
        self, hidden_states: Tensor, targets: Tensor | None = None, num_items: int | Tensor | None = None
    ) -> Tensor:
        """Map hidden states [..., D] to logits [..., V], or with targets [N] to their loss (see loss.py)."""
        if targets is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(hidden_states.flatten(0, -2), self.weight, targets, num_items)


class GPT2ReproPreTrainedModel(PreTrainedModel):
    """Base class of the models: initialization, and the attributes that transformers reads."""

    config_class = GPT2ReproConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "wte"
    _no_split_modules = ["GPT2ReproBlock"]  # noqa: RUF012 (read by transformers, like the two below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": GPT2ReproBlock, "attentions": GPT2ReproAttention}  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Return True. transformers would search this file for `get_interface(`, which is avoided for vLLM."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize the parameters of one module as transformers' GPT-2 does.

        Weights are normal with standard deviation 0.02 (OpenAI's code, which has 0.01 for the positions). Projections
        into the residual stream are scaled by 1/sqrt(N), with N = 2 n_layer of them (GPT-2 paper, section 2.3). Biases
        are 0 and LayerNorms are the identity. Use only `nn.init` functions here: from_pretrained patches them so that
        they skip loaded weights.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            if getattr(module, "is_residual_projection", False):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save with an `auto_map` of all classes. transformers would write only the class that is saved."""
        self.config.auto_map = {"AutoConfig": "configuration_gpt2repro.GPT2ReproConfig"}
        for auto_class, (model_class, _) in AUTO_CLASSES.items():
            self.config.auto_map[auto_class] = f"modeling_gpt2repro.{model_class.__name__}"
        return super().save_pretrained(*args, **kwargs)


class GPT2ReproModel(GPT2ReproPreTrainedModel):
    """GPT-2 without the head: maps token ids to the last hidden states."""

    def __init__(self, config: GPT2ReproConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2ReproBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the last hidden states.

        Args:
            input_ids: Token ids, [B, T].
            attention_mask: [B, S], 1 for tokens and 0 for padding (left or right). A 4D mask [B or 1, 1 or H, T, S]
                replaces the causal mask. It is boolean (True: attend) or floating point (added to the scores). Flex
                attention also takes a `BlockMask`.
            position_ids: [B, T]. By default they count the tokens of `attention_mask`, without padding. If they
                restart within a row, and no mask and no cache is given, the row holds packed documents, which do not
                attend to each other.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Token embeddings instead of `input_ids`, [B, T, D].
            use_cache: Return a cache. By default only outside training.
            is_causal: Attend only to earlier tokens. The default is `config.is_causal`.
            kwargs: Passed on to the attention kernel. `output_hidden_states=True` returns the n_layer + 1 hidden
                states [B, T, D], the last one after ln_f; newer transformers also take a list of indices. With
                `output_attentions=True`, kernels that compute the attention weights [B, H, T, S] (eager) return them.

        Raises:
            ValueError: Arguments that would otherwise be ignored or give wrong results, or too many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        for name in _UNSUPPORTED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by this model")
        is_causal = self.config.is_causal if is_causal is None else is_causal
        if use_cache is None:
            use_cache = self.config.use_cache and is_causal and not self.training
        if not is_causal and (use_cache or past_key_values is not None):
            raise ValueError("bidirectional attention (is_causal=False) has no cache: tokens attend to later ones")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)

        num_new = inputs_embeds.shape[1]
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # A row may be longer if it has position ids and no cache: vLLM packs short texts into one row. A static cache
        # has its length in a tensor, and comparing that would make the host wait for the device.
        may_be_longer = position_ids is not None and not use_cache and past_key_values is None
        if not may_be_longer and isinstance(num_past, int) and num_past + num_new > self.config.n_positions:
            raise ValueError(
                f"a sequence of {num_past + num_new} tokens does not fit n_positions={self.config.n_positions}: "
                "shorten the input or reduce max_new_tokens"
            )
        # Create the mask before the cache: transformers detects packed documents only without a cache.
        mask = self._attention_mask(attention_mask, inputs_embeds, position_ids, past_key_values, is_causal)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        elif position_ids is None:
            position_ids = (torch.arange(num_new, device=inputs_embeds.device) + num_past).unsqueeze(0)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        device_type = hidden_states.device.type
        if self.config.residual_in_autocast_dtype and torch.is_autocast_enabled(device_type):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        del inputs_embeds  # otherwise it would stay in memory through all blocks
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                is_causal=is_causal,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _attention_mask(
        self,
        attention_mask: Tensor | BlockMask | None,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        is_causal: bool,
    ) -> Tensor | BlockMask | None:
        """Convert the mask to the form that the kernel needs. None (causal or full attention) allows flash kernels."""
        kernel = self.config._attn_implementation
        if isinstance(attention_mask, BlockMask):
            return attention_mask
        if attention_mask is not None and attention_mask.ndim == 4:
            if kernel == "flex_attention" or "flash" in kernel:
                # transformers would pass it to flex as a score bias, which crashes the CPU kernel of torch 2.13.
                raise ValueError(
                    f"attn_implementation={kernel!r} does not support a 4D attention_mask tensor: use 'sdpa' or "
                    "'eager', or pass a BlockMask to 'flex_attention'"
                )
            if attention_mask.dtype == torch.bool and kernel == "sdpa":
                return attention_mask
            if attention_mask.dtype == torch.bool:
                additive = torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype)
                return additive.masked_fill(~attention_mask, torch.finfo(inputs_embeds.dtype).min)
            if attention_mask.is_floating_point():
                return attention_mask.to(inputs_embeds.dtype)
            raise ValueError(f"a 4D attention_mask must be boolean or floating point, got {attention_mask.dtype}")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be 2D or 4D, got shape {tuple(attention_mask.shape)}")
        if attention_mask is not None and past_key_values is None and attention_mask.shape != inputs_embeds.shape[:2]:
            raise ValueError(  # transformers would read the first columns of a longer mask
                f"attention_mask has shape {tuple(attention_mask.shape)}, and the input without a cache has "
                f"{tuple(inputs_embeds.shape[:2])}"
            )
        # transformers finds packed documents only for causal masks, and for flash attention only in a batch of one row.
        may_leak = not is_causal or ("flash" in kernel and len(inputs_embeds) > 1)
        may_leak = may_leak and attention_mask is None and not torch.compiler.is_compiling()
        if may_leak and position_ids is not None and (position_ids.diff(dim=-1) < 0).any():
            raise ValueError(
                "packed documents (position_ids that restart) need causal attention, and with flash attention a batch "
                "of one row: use 'sdpa'"
            )
        if not is_causal:
            return create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        if kernel == "sdpa" and attention_mask is None and position_ids is None and past_key_values is None:
            # create_causal_mask returns None too, except under torch.compile: in torch before 2.14, transformers
            # mistakes it for an export.
            return None
        # By position: the fourth parameter has another name from transformers 5.24 on.
        return create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)


class GPT2ReproForCausalLM(GPT2ReproPreTrainedModel, GenerationMixin):
    """GPT-2 with a language-model head, which shares the matrix of the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (read by transformers)

    def __init__(self, config: GPT2ReproConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2ReproModel(config)
        self.lm_head = LanguageModelHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits and, with labels, the loss. Arguments not listed here: see `GPT2ReproModel.forward`.

        Args:
            labels: Token ids, [B, T], usually equal to `input_ids`: they are shifted by one position here, as in all
                of transformers. -100 is ignored.
            num_items_in_batch: Divisor of the summed loss. The default is the number of labels that are not ignored.
            use_cache: Return a cache. By default only outside training and without labels.
            logits_to_keep: Compute logits only for this many last positions, or for the positions in an index tensor.
                0 keeps all. The loss always covers all positions.
            return_logits: Compute logits. The default is True, except in training with labels, where the default is
                `config.logits_in_training`.
            kwargs: `shift_labels` [B, T] are labels that are already shifted. They take precedence over `labels`
                (Trainer's context parallelism passes both).

        Returns:
            The loss (a scalar in float32) if labels are given; logits [B, T, V], which are None with
            return_logits=False and a `LogitsNotComputed` if the default leaves them out.
        """
        # Not a parameter: Trainer requires every parameter with "label" in its name to be in the batch.
        targets = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            # Drop the first label and ignore the last position, which has no next token.
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None and targets is not None else use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = None if targets is None else self._loss(hidden_states, targets.flatten(), num_items_in_batch)
        logits: Any = None
        if return_logits is None and self.training and targets is not None and not self.config.logits_in_training:
            # nn.DataParallel can gather only tensors and None from its replicas.
            logits = None if getattr(self, "_is_replica", False) else LOGITS_NOT_COMPUTED
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

    def _loss(self, hidden_states: Tensor, targets: Tensor, num_items: int | Tensor | None) -> Tensor:
        """Compute the loss of the targets [N], without the full logits unless the head must be called for them.

        Where logits are returned too, the head is multiplied twice: that takes less memory than their float32 copy.
        """
        head = self.lm_head
        targets = targets.to(hidden_states.device)
        if isinstance(num_items, Tensor):
            num_items = num_items.to(hidden_states.device)
        if head.bias is None and is_unmodified(head):  # nn.Linear too: resizing the vocabulary creates one
            return linear_cross_entropy(hidden_states.flatten(0, 1), head.weight, targets, num_items)
        # By name: importing FSDP takes time, and fails where torch is built without it.
        is_fsdp2 = any(base.__name__ == "FSDPModule" for base in type(head).__mro__)
        if head.bias is None and isinstance(head, LanguageModelHead) and is_fsdp2:
            return head(hidden_states, targets, num_items)  # the full weight exists only while the head is called
        logits = head(hidden_states)  # LoRA, quantization, offloading, hooks
        return self.loss_function(logits, None, logits.shape[-1], num_items, shift_labels=targets)

    @classmethod
    def from_gpt2(cls, model_or_path: GPT2LMHeadModel | str, **kwargs: Any) -> Self:
        """Copy a transformers GPT-2: `GPT2ReproForCausalLM.from_gpt2("openai-community/gpt2")`.

        The keyword arguments are those of `GPT2LMHeadModel.from_pretrained`. A model in memory takes none. Options that
        the published GPT-2 does not have (cross-attention, ...) raise a ValueError.
        """
        return convert_from_gpt2(cls, model_or_path, **kwargs)

    def to_gpt2(self) -> GPT2LMHeadModel:
        """Copy the model into a `GPT2LMHeadModel`, which all engines that support GPT-2 can open."""
        return convert_to_gpt2(self)


class GPT2ReproClassifier(GPT2ReproPreTrainedModel):
    """Base class of the classifiers. The generic heads of transformers create the trunk by AutoModel.from_config."""

    def __init__(self, config: GPT2ReproConfig) -> None:
        # transformers imports the configuration file of a checkpoint with custom code twice, and `config` may be an
        # instance of the other copy. If AutoModel does not know that class, it asks whether to trust custom code.
        AutoModel.register(type(config), GPT2ReproModel, exist_ok=True)
        super().__init__(config)


class GPT2ReproForSequenceClassification(GenericForSequenceClassification, GPT2ReproClassifier):
    """GPT-2 with a score per sequence, from its last token that is not padding (transformers' generic head)."""

    base_model_prefix = "transformer"  # the generic head, which comes first, has "model"


class GPT2ReproForTokenClassification(GenericForTokenClassification, GPT2ReproClassifier):
    """GPT-2 with a score per token (transformers' generic head)."""

    base_model_prefix = "transformer"  # as above


# The classifiers' generic heads call AutoModel; __init__.py registers the other Auto classes.
AutoModel.register(GPT2ReproConfig, GPT2ReproModel, exist_ok=True)
AUTO_CLASSES: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "AutoModel": (GPT2ReproModel, modeling_auto.MODEL_MAPPING_NAMES),
    "AutoModelForCausalLM": (GPT2ReproForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "AutoModelForSequenceClassification": (
        GPT2ReproForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "AutoModelForTokenClassification": (
        GPT2ReproForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
}
for auto_class, (model_class, class_names) in AUTO_CLASSES.items():
    # Let save_pretrained copy these files next to the weights.
    model_class.register_for_auto_class(auto_class)
    # Trainer (to shift labels for label smoothing), pipelines and model cards look up a model's task by class name.
    class_names[GPT2ReproConfig.model_type] = model_class.__name__

__all__ = [
    "GPT2ReproForCausalLM",
    "GPT2ReproForSequenceClassification",
    "GPT2ReproForTokenClassification",
    "GPT2ReproModel",
    "GPT2ReproPreTrainedModel",
]
