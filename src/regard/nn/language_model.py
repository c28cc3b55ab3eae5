"""A decoder whose every layer names its mixer: one test bed, so that mixers are compared under equal conditions.

    h <- embedding(tokens) (+ position embedding, when no mixer tells positions apart)
    h <- h + mixer_l(RMSNorm(h));  h <- h + SwiGLU(RMSNorm(h))         for each layer l
    logits = embedding^T RMSNorm(h)

Hybrids are a list: `LanguageModelConfig(mixers=["sliding", "softmax"])` alternates the two. It is a transformers model:
`generate()`, `save_pretrained()` (safetensors) and `regard.attach` work as on any other, and recurrent mixers generate with
memory that does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from regard._errors import InputError, at_least_one
from regard.nn.feed_forward import SwiGLU
from regard.nn.mixer import Mixer
from regard.nn.mixers import make_mixer
from regard.nn.states import States, all_valid, positions_of

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
"""What this version of transformers calls the cache that a model takes and returns."""


class LanguageModelConfig(PretrainedConfig):
    """The shape of a `LanguageModel`.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: heads of every mixer.
        mixers: names of `regard.nn.MIXERS`, repeated over the layers; a pair `(name, options)` passes options on.
        intermediate_size: width of the feed-forward layers, 8/3 of `hidden_size` rounded up to 32 by default; 0 leaves
            them out.
        max_position_embeddings: positions that are embedded when none of the mixers tells positions apart.

    Raises:
        InputError: no mixers, or a number below 1.
    """

    model_type = "regard"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        mixers: Sequence[Any] = ("softmax",),
        intermediate_size: int | None = None,
        max_position_embeddings: int = 2048,
        **rest: Any,
    ) -> None:
        at_least_one(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        )
        if not mixers or isinstance(mixers, str):
            raise InputError.of("mixers", given=mixers, expected="a list of one or more names")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mixers = [one if isinstance(one, str) else list(one) for one in mixers]
        if intermediate_size is None:
            intermediate_size = -(-hidden_size * 8 // 3 // 32) * 32
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        rest = {"tie_word_embeddings": True, "use_cache": True, "bos_token_id": None, **rest}
        rest.setdefault("eos_token_id", None)
        super().__init__(**rest)

    def mixer(self, layer: int) -> tuple[str, dict[str, Any]]:
        """Name and options of a layer's mixer."""
        chosen = self.mixers[layer % len(self.mixers)]
        return (chosen, {}) if isinstance(chosen, str) else (chosen[0], dict(chosen[1]))


class Block(nn.Module):
    """One layer: a mixer and a feed-forward layer, each behind a norm and beside the residual stream."""

    def __init__(self, config: LanguageModelConfig, layer: int) -> None:
        super().__init__()
        name, options = config.mixer(layer)
        width = config.hidden_size
        self.input_layernorm = nn.RMSNorm(width, eps=1e-6)
        self.self_attn = make_mixer(name, width, config.num_attention_heads, **options)
        self.mlp: nn.Module | None = None
        if config.intermediate_size:
            self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-6)
            self.mlp = SwiGLU(width, config.intermediate_size)

    def forward(self, hidden: Tensor, valid: Tensor | None, state: Any) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(hidden), valid=valid, state=state)
        hidden = hidden + mixed
        return (
            hidden if self.mlp is None else hidden + self.mlp(self.post_attention_layernorm(hidden))
        )


class LanguageModel(PreTrainedModel, GenerationMixin):
    """A causal language model of mixers.

    Cost: that of its mixers, and 3 x width x intermediate_size multiplications a token and layer for the feed-forward part.

    >>> import torch
    >>> model = LanguageModel(LanguageModelConfig(hidden_size=32, num_hidden_layers=2, mixers=["sliding", "softmax"]))
    >>> model(torch.randint(256, (1, 12))).logits.shape
    torch.Size([1, 12, 256])
    """

    config_class = LanguageModelConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _supports_sdpa = True

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.embed_positions: nn.Embedding | None = None
        if not any(mixer.positional for mixer in self.mixers):
            self.embed_positions = nn.Embedding(config.max_position_embeddings, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings from N(0, 0.02^2); every other module keeps the initialisation that it gave itself."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def mixers(self) -> list[Mixer]:
        return [block.self_attn for block in self.layers]  # type: ignore[misc]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def states(self) -> States:
        """An empty memory: `model(ids, past_key_values=model.states())`."""
        return States(len(self.layers))

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        cache: States | None = None,
        past_key_values: States | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position, and the loss when there are labels.

        Args:
            input_ids: new tokens.
            attention_mask: `[batch, tokens seen + new]`, 0 at padding.
            labels: the tokens themselves (they are shifted here); -100 is left out of the loss. In training the mixers'
                own losses are added.
            cache: what the model remembers of earlier tokens (`past_key_values` is the same).

        Raises:
            InputError: no tokens, or a token or position that is out of range.
        """
        if input_ids.shape[1] == 0:
            raise InputError.of(
                "input_ids", given=tuple(input_ids.shape), expected="1 or more tokens"
            )
        memory = cache if cache is not None else past_key_values
        if memory is None and use_cache and not self.training:
            memory = self.states()
        if memory is not None and not isinstance(memory, States):
            raise InputError.of(
                "cache", given=type(memory).__name__, expected="made by model.states()"
            )
        hidden = self.embed_tokens(input_ids)
        valid = self._valid(input_ids, attention_mask)
        known = all_valid(input_ids) if valid is None else valid
        positions = positions_of(known) if memory is None else memory.step(known)
        if self.embed_positions is not None:
            last = int(positions.max())
            if last >= self.config.max_position_embeddings:
                raise InputError.of(
                    "position", given=last, expected=f"below {self.config.max_position_embeddings}"
                )
            hidden = hidden + self.embed_positions(positions)
        for i, block in enumerate(self.layers):
            hidden = block(hidden, valid, None if memory is None else memory.states[i])
        logits = self.lm_head(self.norm(hidden))
        loss = None if labels is None else self._loss(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: memory})  # type: ignore[arg-type]

    @staticmethod
    def _valid(
        ids: Int[Tensor, "batch tokens"], mask: Tensor | None
    ) -> Bool[Tensor, "batch tokens"] | None:
        if mask is None:
            return None
        valid = mask[:, -ids.shape[1] :].bool()
        return None if bool(valid.all()) else valid

    def _loss(self, logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
        loss = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        if self.training:
            for mixer in self.mixers:
                for added in mixer.losses.values():
                    loss = loss + added / len(self.layers)
        return loss

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> bool:
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = self.states()
        return False
