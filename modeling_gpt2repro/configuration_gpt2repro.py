"""GPT2ReproConfig: the shape of a GPT-2, under GPT-2's own field names."""

import sys

from transformers import PreTrainedConfig

# layers, heads, width of the four models (GPT-2 paper, table 2, by their true parameter counts: the paper's own
# 117M, 345M, 762M and 1542M were miscounted, see the note at https://github.com/openai/gpt-2).
SIZES = {
    "124M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}


class GPT2ReproConfig(PreTrainedConfig):
    """
    Configuration of a GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    The defaults are the 124M model. Field names are those of transformers' `GPT2Config`; the library's
    standard names (`hidden_size`, `num_hidden_layers`, ...) are aliases of them.

    Args:
        vocab_size: number of tokens; 50,257 is GPT-2's BPE (50,000 merges, 256 bytes, `<|endoftext|>`).
        n_positions: longest sequence, in tokens (the rows of the learned position embedding).
        n_embd: width of the residual stream, in channels. A multiple of `n_head`.
        n_layer: number of blocks.
        n_head: attention heads in a block.
        n_inner: width of the MLP's hidden layer; `None` means 4 * n_embd.
        activation_function: `"gelu_new"`, the tanh approximation of GELU, is the only one GPT-2 has.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities; 0 as in the GPT-3 paper's pre-training.
        layer_norm_epsilon: epsilon of every LayerNorm.
        initializer_range: standard deviation of the normal initialisation (GPT-2's released code: 0.02).
        use_cache: whether inference keeps the keys and values of past tokens.
        bos_token_id, eos_token_id: `<|endoftext|>`, GPT-2's only special token.
        tie_word_embeddings: whether the head shares the token embedding's matrix, as GPT-2's does.
        is_causal: `False` lets every token attend to those after it too (text encoders made from a GPT-2);
            such a model has no cache and cannot generate.
        logits_in_training: whether the language model also returns logits when it is trained with labels, as a loss of
            your own needs. They are the largest tensor of a training step; without them `loss` is computed in chunks.

    Raises:
        ValueError: a field that cannot be; the message names the field, the value and what would do.
    """

    model_type = "gpt2repro"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list to it)
    attribute_map = {  # noqa: RUF012 (transformers reads this plain class attribute)
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
    }

    def __init__(
        self,
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        n_inner=None,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=None,
        tie_word_embeddings=True,
        is_causal=True,
        logits_in_training=False,
        **kwargs,
    ):
        # Fields come before super().__init__(), which validates the finished config.
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
        self._check_shape()
        # Passed on *and* set: which of the two transformers does with them changed between 5.0 and 5.23.
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def from_size(cls, size, **fields):
        """
        One of GPT-2's four sizes: `GPT2ReproConfig.from_size("350M")`.

        Args:
            size: "124M" (124,439,808 parameters), "350M" (354,823,168), "774M" (774,030,080) or
                "1558M" (1,557,611,200).
            fields: any other field of the config (`resid_pdrop=0.1`); the shape itself is the size's.

        Raises:
            ValueError: an unknown size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        n_layer, n_head, n_embd = SIZES[size]
        return cls(**{"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **fields})

    def to_dict(self):
        """Return all fields. PEFT calls this right before it looks up its defaults, so they are added here."""
        add_peft_defaults(self.model_type)
        return super().to_dict()

    def _check_shape(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
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
                raise ValueError(f"{name} is a dropout probability in [0, 1), got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if self.activation_function != "gelu_new":
            raise ValueError(
                f"activation_function must be 'gelu_new' (GPT-2's tanh GELU), got {self.activation_function!r}"
            )


def add_peft_defaults(model_type: str) -> None:
    """If PEFT is imported, give `model_type` its defaults for GPT-2 (`target_modules`, ...): the names are the same."""
    for name, table in vars(sys.modules.get("peft.utils.constants", object)).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and "gpt2" in table:
            table.setdefault(model_type, table["gpt2"])


GPT2ReproConfig.register_for_auto_class()

__all__ = ["GPT2ReproConfig"]
