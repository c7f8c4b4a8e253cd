"""Configuration of a GPT-2, with the field names of transformers' `GPT2Config`."""

import sys
from typing import Any, Self

import transformers

# Checked before the import below, since transformers 4 has no PreTrainedConfig.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 9):
    raise ImportError(
        f"the code of gpt2repro models needs transformers 5.9 or newer, this is {transformers.__version__}: run "
        "`pip install -U transformers`"
    )

from transformers import PreTrainedConfig

# Layers, heads and width of the four models (GPT-2 paper, table 2). The names are the correct parameter counts: the
# paper's 117M, 345M, 762M and 1542M were miscounted (see the note at https://github.com/openai/gpt-2).
SIZES = {
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


class GPT2ReproConfig(PreTrainedConfig):
    """Configuration of a GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    The defaults give the 124M model. The fields of transformers' `GPT2Config` are documented there. The library's
    standard names (`hidden_size`, `num_hidden_layers`, ...) are aliases.

    Args:
        is_causal: Attend only to earlier tokens. False makes a bidirectional model (a text encoder made from a
            GPT-2), which has no cache and cannot generate.
        logits_in_training: Also return logits in training with labels, for example for a custom loss. Logits are the
            largest tensor of a training step, and without them the loss is computed in chunks.
        residual_in_autocast_dtype: Under autocast, keep the residual stream in its 16-bit dtype and not in float32,
            which saves memory traffic and is less exact (benchmarks/LOG.md).
        kwargs: Other fields of `PreTrainedConfig`.

    Raises:
        ValueError: A field has an invalid value. The message names the field and the values that are allowed.
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer concatenates it with a list)
    attribute_map = {  # noqa: RUF012 (read by transformers)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.0,
        embd_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        is_causal: bool = True,
        logits_in_training: bool = False,
        residual_in_autocast_dtype: bool = False,
        **kwargs: Any,
    ) -> None:
        # The fields are set before super().__init__(), which validates the finished config.
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = 4 * n_embd if n_inner is None and isinstance(n_embd, int) else n_inner
        self.activation_function = activation_function
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.is_causal = is_causal
        self.logits_in_training = logits_in_training
        self.residual_in_autocast_dtype = residual_in_autocast_dtype
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check_fields()
        super().__init__(**kwargs)

    @classmethod
    def from_size(cls, size: str, **fields: Any) -> Self:
        """Create the config of a GPT-2 size ("124M", "350M", "774M" or "1558M"), with other fields as keywords."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        n_layer, n_head, n_embd = SIZES[size]
        return cls(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and register the defaults of PEFT, which calls this right before it looks them up."""
        add_peft_defaults(self.model_type)
        return super().to_dict()

    def _check_fields(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            below = self.n_embd // self.n_head * self.n_head
            nearest = f"{below} or {below + self.n_head}" if below else f"{self.n_head}"
            raise ValueError(
                f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and n_head={self.n_head}; "
                f"with {self.n_head} heads the nearest widths are {nearest}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} (a dropout probability) must be in [0, 1), got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if self.activation_function != "gelu_new":
            raise ValueError(
                f"activation_function must be 'gelu_new' (GPT-2's tanh GELU), got {self.activation_function!r}"
            )


def add_peft_defaults(model_type: str) -> None:
    """Copy PEFT's defaults for GPT-2 (`target_modules`, ...) to `model_type`, if PEFT is imported."""
    for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "gpt2" in table:
            table.setdefault(model_type, table["gpt2"])


GPT2ReproConfig.register_for_auto_class()

__all__ = ["GPT2ReproConfig"]
