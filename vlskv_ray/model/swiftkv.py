"""SwiftKV (arXiv 2410.03960) for the text backbones of stock transformers models.

For each of `BACKBONES` this module registers a model type with transformers' Auto classes, `llama` becoming
`llama_swiftkv`. A stock vision-language class builds its text model from `config.text_config`, so that model type is
the whole conversion. The backbone's own `forward` runs unchanged (masks, rotary embeddings, cache); only its layers
from `num_key_value_layers` on are replaced, and they share one `SwiftKVPass` handed down in the forward's `**kwargs`.

Shapes: B samples, T tokens, S keys (cache included), D hidden, H query heads, K key/value heads, E head size,
n kept tokens of all samples together.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    QuantizedCache,
)
from transformers.cache_utils import DummyLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BACKBONES = ("llama", "mistral", "qwen2", "qwen3")
"""Text model types whose SwiftKV form is proven exact by the tests; no other is accepted."""

Stock: Any = object  # stands for the class of transformers that each mixin below is put over


# ------------------------------------------------------------------------------------------------------------- config
@dataclass(kw_only=True)
class SwiftKVConfig(Stock):
    """What a SwiftKV config adds to its backbone's."""

    swiftkv: bool = False
    """On: the student. Off: the teacher, bit for bit."""
    num_key_value_layers: int | None = None
    """N: layers with keys and values of their own; the layers above project theirs from the input of layer N."""
    key_value_group_size: int = 1
    """Neighbouring layers from N on that share one pair of key and value projections, and one cache."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_layers is None:
            self.num_key_value_layers = self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_swiftkv(self) -> None:
        assert self.num_key_value_layers is not None
        check_layers(self.num_hidden_layers, self.num_key_value_layers, self.key_value_group_size)
        kinds = getattr(self, "layer_types", None)
        if kinds and any(kinds[i] != kinds[self.key_value_leader(i)] for i in range(len(kinds))):
            raise ValueError(
                f"key_value_group_size={self.key_value_group_size} puts layers with full and with sliding attention in "
                f"one group, which cannot share a cache; use 1"
            )

    def key_value_leader(self, layer_idx: int) -> int:
        """The layer whose keys and values layer `layer_idx` reads: the first of its group, or itself."""
        assert self.num_key_value_layers is not None
        return layer_idx - max(layer_idx - self.num_key_value_layers, 0) % self.key_value_group_size

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """Read by transformers' caches: a layer marked "reuse" stores nothing."""
        if not self.swiftkv:
            return None
        layers = range(self.num_hidden_layers)
        return [None if self.key_value_leader(i) == i else "reuse" for i in layers]


def check_layers(num_hidden_layers: int, num_key_value_layers: int, key_value_group_size: int) -> None:
    """Raises ValueError where the layers above `num_key_value_layers` do not form whole groups."""
    if not 1 <= num_key_value_layers <= num_hidden_layers:
        raise ValueError(f"num_key_value_layers={num_key_value_layers}: the model has {num_hidden_layers} layers")
    upper = num_hidden_layers - num_key_value_layers
    if key_value_group_size < 1 or upper % key_value_group_size:
        raise ValueError(
            f"key_value_group_size={key_value_group_size} does not divide the {upper} layers above "
            f"num_key_value_layers={num_key_value_layers}"
        )


# --------------------------------------------------------------------------------------------------- one forward pass
class SwiftKVPass:
    """What the layers from N on share during one forward pass.

    Args:
        keep: the tokens that need an output, None for all. int: the last so many of each sequence, as [B, keep, D].
            int64[B or 1, P]: those at these positions, from the end if negative, as [B, P, D].
            bool[B, T]: those marked, of all sequences in one row [1, n, D]. Then the whole text model runs without
            padding, which must be on the right, on all sequences in one row; and with an empty cache.
        distill: run the teacher's layers as well, without gradient. The forward then returns the teacher's hidden
            states, and the student's are in `student`.
        teacher_alone: of a pass with `distill`, leave out the student, which is None then.

    After a pass with `distill`, both of `student` and the returned hidden states belong to the kept tokens and have
    gone through the final norm; `student_input` and `teacher_input` are they as they entered the last layer.
    """

    def __init__(self, keep: int | Tensor | None = None, distill: bool = False, teacher_alone: bool = False) -> None:
        self.keep, self.distill, self.teacher_alone = keep, distill, teacher_alone
        self.lengths: list[int] | None = None  # of the sequences that stand in one row, where they do
        self.trunk: Tensor | None = None  # [B, T, D] what enters layer N
        self.source: Tensor | None = None  # [B, T, D] norm_swiftkv of it: all keys and values come of that
        self.key_value: tuple[Tensor, Tensor] | None = None  # [B, K, S, E] each, of the group being run
        self.student: Tensor | None = None  # [B, T, D], [B, keep, D], [B, P, D] or [1, n, D]
        self.position_embeddings: tuple[Tensor, Tensor] | None = None  # of the kept tokens
        self.student_input: Tensor | None = None  # likewise, as it entered the last layer
        self.teacher_input: Tensor | None = None
        self.norm: nn.Module | None = None
        self._masks: dict[Any, Any] = {}  # what `of_each` gave

    @property
    def packs(self) -> bool:
        """Whether the text model runs on all sequences in one row."""
        return isinstance(self.keep, Tensor) and self.keep.dtype == torch.bool

    def pack(self, there: Tensor) -> Tensor:
        """Makes one row of all sequences. `there` bool[B, T] marks their tokens; int64[1, sum of lengths], positions.

        ValueError where padding is not on the right.
        """
        assert isinstance(self.keep, Tensor)
        if (there[:, 1:] > there[:, :-1]).any():
            raise ValueError("kept tokens are chosen in sequences padded on the right only")
        self.lengths, self.keep = there.sum(1).tolist(), self.keep[there][None]
        return torch.cat([torch.arange(length, device=there.device) for length in self.lengths])[None]

    def enter(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
        """Called by layer N with its input float[B, T, D]."""
        assert self.norm is not None
        if self.distill:  # all below is frozen, whatever hooks have embeddings ask for a gradient
            hidden_states = hidden_states.detach()
        self.trunk, self.source = hidden_states, self.norm(hidden_states)
        self.student = None if self.teacher_alone else self.select(hidden_states)
        self.position_embeddings = (self.select(position_embeddings[0]), self.select(position_embeddings[1]))

    def select(self, x: Tensor) -> Tensor:
        """The kept tokens of `x`, [B or 1, T, ...]."""
        if self.keep is None:
            return x
        if isinstance(self.keep, int):
            return x[:, -self.keep :]
        if self.packs:
            return x[self.keep][None]  # [1, n, ...]
        return x[torch.arange(len(x), device=x.device)[:, None], self.keep]  # [B or 1, P, ...]

    def select_mask(self, mask: Tensor | None, num_keys: int) -> Tensor | None:
        """The kept rows of an attention mask [B or 1, 1, T, S], or of the causal one that None stands for.

        None comes with an empty cache, whose keys are more than T where it has room for tokens to come, or with a
        single token, which sees every key.
        """
        if self.keep is None or self.packs:
            return mask
        if mask is not None:
            return self.select(mask.transpose(1, 2)).transpose(1, 2)
        assert self.source is not None
        length, device = self.source.shape[1], self.source.device
        last = self.select(torch.arange(length, device=device)[None])  # key that each query sees at last
        if length == 1:
            last = last + num_keys - 1
        if isinstance(self.keep, int) and last.shape[1] == 1 and length in (1, num_keys):
            return None  # one query that sees everything
        return (torch.arange(num_keys, device=device) <= last[..., None])[:, None]

    def of_each(self, num_queries: int, sliding_window: int | None) -> tuple[list[int], list[Tensor | None]]:
        """How many queries each sequence of the row has, all or the kept ones, and what they see of its keys.

        A mask is bool[queries, keys]; None stands for the causal one of a whole sequence.
        """
        assert self.lengths is not None and isinstance(self.keep, Tensor)
        whole = num_queries == sum(self.lengths)
        if (whole, sliding_window) not in self._masks:
            counts: list[int] = []
            masks: list[Tensor | None] = []
            for length, kept in zip(self.lengths, self.keep[0].split(self.lengths), strict=True):
                keys = torch.arange(length, device=kept.device)
                queries = keys if whole else kept.nonzero()  # [n, 1]
                counts.append(len(queries))
                if whole and (sliding_window is None or length <= sliding_window):
                    masks.append(None)
                    continue
                behind = queries.view(-1, 1) - keys  # how far
                masks.append((behind >= 0) & (behind < (sliding_window or length)))
            self._masks[whole, sliding_window] = counts, masks
        of_each: tuple[list[int], list[Tensor | None]] = self._masks[whole, sliding_window]
        return of_each


def attend_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    swiftkv: SwiftKVPass,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of sequences that stand in one row: float[1, H, n, E] by keys and values [1, K, S, E] to [1, n, H, E].

    One call for each, so that no token is padding and nothing that a mask hides is computed for whole sequences.
    """
    counts, masks = swiftkv.of_each(query.shape[2], sliding_window)
    states = (query.split(counts, 2), key.split(swiftkv.lengths, 2), value.split(swiftkv.lengths, 2))
    rounds = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")  # it would take `_attend`'s float32 back
    with torch.autocast("cpu", enabled=False) if rounds else nullcontext():
        outputs = [_attend(q, k, v, mask, scaling) for q, k, v, mask in zip(*states, masks, strict=True) if q.shape[2]]
    return (torch.cat(outputs, dim=2) if outputs else query).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one sequence; mask None is the causal one. A short one's on a CPU in float32: torch takes half of
    the time for forward and gradient that it takes in bfloat16, and rounds less."""
    is_slow = query.dtype == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] <= SHORT
    dtype = torch.float32 if is_slow else query.dtype
    given, (query, key, value) = query.dtype, (x.to(dtype) for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return output.to(given)


SHORT = 512
"""Tokens; measured with torch 2.13, whose CPU kernels are as fast in both types at about 700."""
BY_SEQUENCE = "swiftkv_by_sequence"
ALL_ATTENTION_FUNCTIONS.register(BY_SEQUENCE, attend_by_sequence)  # without a mask function: transformers makes none


# ----------------------------------------------------------------------------------------------- attention and layer
def _like(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)


class SwiftKVAttention(Stock):
    """Over a backbone's attention: queries of the tokens given, keys and values handed in."""

    stock: type[nn.Module]

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.q_proj_swiftkv = _like(self.q_proj)
        if config.key_value_leader(layer_idx) == layer_idx:
            self.k_proj_swiftkv, self.v_proj_swiftkv = _like(self.k_proj), _like(self.v_proj)

    def key_value_states(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], student: bool) -> Any:
        """Keys, rotated, and values float[B, K, T, E] of `x` float[B, T, D], by the student's or teacher's weights."""
        k_proj, v_proj = (self.k_proj_swiftkv, self.v_proj_swiftkv) if student else (self.k_proj, self.v_proj)
        keys = self._heads(k_proj(x), getattr(self, "k_norm", None))
        return self._rotate(keys, position_embeddings), self._heads(v_proj(x))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        key_value: tuple[Tensor, Tensor] | None = None,
        student: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock attention where no `key_value` is given; else its output for the queries of `hidden_states`."""
        if key_value is None:
            return super().forward(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
        q_proj = self.q_proj_swiftkv if student else self.q_proj
        queries = self._rotate(self._heads(q_proj(hidden_states), getattr(self, "q_norm", None)), position_embeddings)
        kwargs.pop("past_key_values", None)  # `key_value` holds what the cache gave
        eager = sys.modules[self.stock.__module__].eager_attention_forward
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        if "swiftkv" in kwargs:  # the config would not say so when gradient checkpointing comes here again
            attend = attend_by_sequence
        output, weights = attend(
            self,
            queries,
            *key_value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
            **kwargs,
        )
        return self.o_proj(output.flatten(-2)), weights  # [B, T, H, E] -> [B, T, D]

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))  # [B, T, H * E] -> [B, T, H, E]
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _rotate(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        rotate = sys.modules[self.stock.__module__].apply_rotary_pos_emb  # takes queries and keys: here one of them
        return rotate(x, x[:, :0], *position_embeddings)[0]


class SwiftKVLayer(Stock):
    """Over a backbone's decoder layer, from layer N on: stock norms, residuals and MLP around a `SwiftKVAttention`."""

    stock: type[nn.Module]
    self_attn: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config, self.layer_idx = config, layer_idx
        self.self_attn = _over(SwiftKVAttention, type(self.self_attn))(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        swiftkv: SwiftKVPass | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The teacher's layer where there is no pass or a distilling one; else the student's."""
        stock = functools.partial(super().forward, **kwargs)
        whole = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        if swiftkv is None:
            return stock(hidden_states, past_key_values=past_key_values, **whole)
        if swiftkv.lengths is not None:
            stock = functools.partial(stock, swiftkv=swiftkv)  # all the way to `attend_by_sequence`

        if swiftkv.source is None:
            assert position_embeddings is not None
            swiftkv.enter(hidden_states, position_embeddings)
        if self.config.key_value_leader(self.layer_idx) == self.layer_idx and not swiftkv.teacher_alone:
            swiftkv.key_value = self.self_attn.key_value_states(swiftkv.source, position_embeddings, student=True)
            if past_key_values is not None:
                swiftkv.key_value = past_key_values.update(*swiftkv.key_value, self.layer_idx)
        num_keys = hidden_states.shape[1] if swiftkv.key_value is None else swiftkv.key_value[0].shape[-2]
        kept = {
            "attention_mask": swiftkv.select_mask(attention_mask, num_keys),
            "position_embeddings": swiftkv.position_embeddings,
        }
        is_last = self.layer_idx == self.config.num_hidden_layers - 1
        if is_last:
            swiftkv.student_input = swiftkv.student
            swiftkv.teacher_input = swiftkv.select(hidden_states) if swiftkv.distill else None

        if not swiftkv.teacher_alone:
            student: Callable[[Tensor | None], Tensor]
            student = functools.partial(stock, key_value=swiftkv.key_value, student=True, **kept)
            if self.gradient_checkpointing and self.training:
                student = functools.partial(self._gradient_checkpointing_func, student)  # so much of it is pure
            swiftkv.student = student(swiftkv.student)
        if not swiftkv.distill:
            assert swiftkv.student is not None
            return swiftkv.student

        with torch.no_grad():
            if not is_last or swiftkv.keep is None:
                return stock(hidden_states, **whole)
            # of the teacher's last layer too only the kept tokens need a query, an MLP and an output
            key_value = self.self_attn.key_value_states(
                self.input_layernorm(hidden_states), position_embeddings, student=False
            )
            return stock(swiftkv.select(hidden_states), key_value=key_value, **kept)


def _over(mixin: Any, stock: Any) -> Any:
    """The class `mixin` over `stock`, made once, reachable by name in this module so that it pickles."""
    name = f"SwiftKV{stock.__name__}"
    if name not in globals():
        cls: Any = type(name, (mixin, stock), {"stock": stock, "__module__": __name__})
        cls.forward = mixin.forward  # GradientCheckpointingLayer wraps the forward of subclasses
        globals()[name] = cls
    return globals()[name]


# -------------------------------------------------------------------------------------------------------------- model
@contextmanager
def _attention(config: Any, implementation: str) -> Iterator[None]:
    """Has a model's attention done by another function; as before, afterwards."""
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def _is_lacking(weight: Tensor) -> bool:
    """Whether a checkpoint being loaded does not hold a weight: it is neither marked as loaded nor left on disk."""
    return not (getattr(weight, "_is_hf_initialized", False) or weight.is_meta)


class SwiftKVModel(Stock):
    """Over a backbone: the layers from N on take keys and values from the input of layer N, through `norm_swiftkv`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i in range(config.num_key_value_layers, config.num_hidden_layers):
            self.layers[i] = _over(SwiftKVLayer, type(self.layers[i]))(config, i)
        self.norm_swiftkv = copy.deepcopy(self.norm)
        self._is_hf_initialized = False  # the stock __init__ ended in post_init, before there was anything to do here
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        swiftkv: SwiftKVPass | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward, through `swiftkv` where one is given or the config's toggle is on."""
        stock = functools.partial(super().forward, past_key_values=past_key_values, **kwargs)
        padded = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        padded |= {"attention_mask": attention_mask, "position_ids": position_ids}
        if swiftkv is None and not self.config.swiftkv:
            return stock(**padded)
        swiftkv = swiftkv or SwiftKVPass()
        swiftkv.norm = self.norm_swiftkv
        if swiftkv.packs:
            assert isinstance(swiftkv.keep, Tensor)
            there = torch.ones_like(swiftkv.keep) if attention_mask is None else attention_mask.bool()
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            positions = swiftkv.pack(there)
            with _attention(self.config, BY_SEQUENCE):
                output = stock(inputs_embeds=embeds[there][None], position_ids=positions, swiftkv=swiftkv)
        else:
            output = stock(**padded, swiftkv=swiftkv)
        if swiftkv.student is not None and swiftkv.distill:
            swiftkv.student = self.norm(swiftkv.student)
        return output

    def from_trunk(self, trunk: Tensor, there: Tensor, swiftkv: SwiftKVPass) -> Tensor:
        """The student alone, from hidden states that enter layer N, as `swiftkv.trunk` of an earlier pass had them.

        Args:
            trunk: float[1, sum of lengths, D], all sequences in one row.
            there: bool[B, T], their tokens in a batch padded on the right.
            swiftkv: with `keep` bool[B, T], not distilling.

        Returns:
            float[1, n, D] of the kept tokens, after the final norm.
        """
        swiftkv.norm, positions = self.norm_swiftkv, swiftkv.pack(there)
        states, embeddings = trunk, self.rotary_emb(trunk, position_ids=positions)
        with _attention(self.config, BY_SEQUENCE):
            for layer in self.layers[self.config.num_key_value_layers :]:
                states = layer(states, position_embeddings=embeddings, swiftkv=swiftkv)
        return self.norm(states)

    # `from_pretrained` calls these for what the checkpoint lacks. A plain teacher lacks the SwiftKV weights, which
    # start from the teacher's; a student's checkpoint holds them, and no weight of it is touched.
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is not self or not hasattr(self, "norm_swiftkv"):  # the stock __init__ comes before there is one
            return
        try:
            self.start_from_teacher(_is_lacking)
        except RuntimeError as error:
            raise ValueError(
                f"SwiftKV weights start from the teacher's, which are quantised or on disk here ({error}); load the "
                f"teacher as it is, save the student, and load that so"
            ) from error

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As library code: a module of custom code that holds no weights itself, as this one, would be passed over.
        super()._initialize_weights(module)

    @torch.no_grad()
    def start_from_teacher(self, starts: Callable[[Tensor], bool] = lambda weight: True) -> None:
        """Norm of layer N and queries as the teacher's, keys and values the mean of their group's, biases too.

        `starts` tells which weights do, all if it is not given; nothing is read or computed for the others.
        """
        layers = self.layers[self.config.num_key_value_layers :]
        if len(layers) and starts(self.norm_swiftkv.weight):
            self.norm_swiftkv.weight.copy_(layers[0].input_layernorm.weight)
        for layer in layers:
            attention = layer.self_attn
            group = [x.self_attn for x in layers if self.config.key_value_leader(x.layer_idx) == layer.layer_idx]
            teachers = {"q_proj": [attention], "k_proj": group, "v_proj": group}
            for name, weight in attention.named_parameters():
                projection, _, key = name.partition("_swiftkv.")
                if key and teachers[projection] and starts(weight):  # keys and values are a group's first layer's
                    copied = [getattr(x, projection).get_parameter(key) for x in teachers[projection]]
                    weight.copy_(torch.stack(copied).mean(0))


class SwiftKVForCausalLM(Stock):
    """Over a backbone's language model, for text-only use."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.post_init()


# ------------------------------------------------------------------------------------------------------ fast prefill
def _keep_what_generate_needs(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pre-hook of a whole model: tells its backbone for which tokens logits are asked, as `generate` asks for few."""
    keep, config = kwargs.get("logits_to_keep", 0), swiftkv_backbone(model).config
    # the masks of other attention functions do not consist of rows to select: with those all tokens are run
    if not config.swiftkv or config._attn_implementation not in ("sdpa", "eager") or "swiftkv" in kwargs:
        return args, kwargs
    if isinstance(keep, int) and keep > 0:
        kwargs["swiftkv"] = SwiftKVPass(keep=keep)
    elif isinstance(keep, Tensor) and keep.dtype == torch.int64 and keep.ndim in (1, 2) and keep.numel():
        kwargs |= {"swiftkv": SwiftKVPass(keep=keep.view(-1, keep.shape[-1])), "logits_to_keep": 0}  # all that come
    elif isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == _tokens(args, kwargs):
        positions, there = _positions(keep)
        kwargs |= {"swiftkv": SwiftKVPass(keep=positions), "logits_to_keep": there}
    return args, kwargs


def _tokens(args: Any, kwargs: dict[str, Any]) -> torch.Size:
    """[B, T] of what a model is given."""
    given = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]]
    return next(x for x in given if x is not None).shape[:2]


def _positions(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The positions int64[B, P] that bool[B, T] marks, rows filled up with their first, and bool[B, P] of the unfilled.

    The latter takes from the hidden states at these positions what `marked` takes from all.
    """
    counts = marked.sum(1, keepdim=True)
    there = torch.arange(max(int(counts.max()), 1), device=marked.device) < counts
    marked_first = marked.byte().argsort(dim=1, descending=True, stable=True)
    return torch.where(there, marked_first[:, : there.shape[1]], marked_first[:, :1]), there


def _add_fast_prefill(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Seen by torch each time a module gets a child: gives every generating model with a SwiftKV backbone the pre-hook.

    The models are stock classes built by stock code, in `from_pretrained` as in `from_config`, so this is where prompt
    tokens can be made to skip the upper layers for everybody who imported the package, without a class of our own.
    """
    if isinstance(parent, GenerationMixin) and child is not None:
        held = any(isinstance(m, SwiftKVModel) for m in parent.modules())
        if not held and any(isinstance(m, SwiftKVModel) for m in child.modules()):
            parent.register_forward_pre_hook(_keep_what_generate_needs, with_kwargs=True)


def _quantize_what_groups_keep(stock_init: Callable[..., None]) -> Callable[..., None]:
    """Over the constructor of transformers' quantised cache, which refuses a config some of whose layers store nothing.

    It is built as if all stored something; then those that read another's cache get the layer that other caches have
    in their place.
    """

    @functools.wraps(stock_init)
    def init(cache: Any, backend: str, config: Any, *args: Any, **kwargs: Any) -> None:
        text = config.get_text_config(decoder=True)
        modes = (text.kv_sharing_modes if isinstance(text, SwiftKVConfig) else None) or []
        if "reuse" in modes:
            config = copy.copy(text)
            config.swiftkv = False
        stock_init(cache, backend, config, *args, **kwargs)
        for i, mode in enumerate(modes):
            if mode == "reuse":
                cache.layers[i] = DummyLayer()

    return init


def has_swiftkv(config: Any) -> bool:
    """Whether the text model of a vision-language config is a SwiftKV backbone, switched on or off."""
    return str(config.text_config.model_type).endswith("_swiftkv")


def swiftkv_backbone(model: nn.Module) -> Any:
    """The SwiftKV text backbone of a model. ValueError if it has none."""
    for module in model.modules():
        if isinstance(module, SwiftKVModel):
            return module
    raise ValueError(f"{type(model).__name__} has no SwiftKV backbone; build it with vlskv_ray.model.build")


# ------------------------------------------------------------------------------------------------------- registration
def register(model_type: str) -> None:
    """Registers `<model_type>_swiftkv` with the Auto classes: a config, a backbone and a causal language model."""
    stock = CONFIG_MAPPING[model_type]
    name = stock.__name__.removesuffix("Config") + "SwiftKV"

    def define(suffix: str, *bases: type, **attributes: Any) -> type:
        cls = type(name + suffix, bases, {"__module__": __name__, **attributes})
        globals()[cls.__name__] = cls  # so that it pickles
        return cls

    config = strict(define("Config", SwiftKVConfig, stock, model_type=f"{model_type}_swiftkv"))
    recorded = MODEL_MAPPING[stock]._can_record_outputs  # names the backbone's layer and attention classes
    layer, _ = _over(SwiftKVLayer, recorded["hidden_states"]), _over(SwiftKVAttention, recorded["attentions"])
    unsplit = sorted({*MODEL_MAPPING[stock]._no_split_modules, layer.__name__})
    model = define("Model", SwiftKVModel, MODEL_MAPPING[stock], config_class=config, _no_split_modules=unsplit)
    language_model = define("ForCausalLM", SwiftKVForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING[stock], config_class=config)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, language_model, exist_ok=True)


for _model_type in BACKBONES:
    register(_model_type)
nn.modules.module.register_module_module_registration_hook(_add_fast_prefill)
QuantizedCache.__init__ = _quantize_what_groups_keep(QuantizedCache.__init__)
