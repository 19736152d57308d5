"""A student's keys and values fitted to its teacher's own in closed form, before any training; see docs/fit.md.

The keys (before rotation and key norm) and values of a layer above N are linear in what the student makes them of, the
normed trunk x. So the weights that come nearest to the teacher's y solve a linear least-squares problem:

    minimize over W:  sum over tokens of a |W x - y|^2  +  ridge |W - W_copied|^2

where a is the attention that the token receives in that layer from the supervised positions: what nobody looks at does
not count. All that is needed of the tokens are sums over them, of a x x' and a x y', which are added in float64.

Shapes: T tokens of all samples of a batch in one row, n supervised positions, D what a projection takes (1 more with a
bias), U groups of layers above N (or layers), M layers of a group, K key/value heads, E head size.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlskv_ray.data.collate import Batch, supervised_positions
from vlskv_ray.model.swiftkv import SwiftKVPass, swiftkv_backbone

FLOOR = 0.02
"""Of the mean attention in its sample that each token counts for at least."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the mean of the diagonal of sum a x x'; without any limit the weights are the copied ones."""
QUERIES_AT_ONCE = 128
"""Supervised positions whose attention is held at a time."""
PARTS = ("k_proj", "v_proj")
Setting = tuple[int, int]
"""N and group size."""


# ------------------------------------------------------------------------------------------------------------ the sums
@dataclass(frozen=True)
class FitSums:
    """Sums over tokens, float64; they add up over any split of the data."""

    gram: Tensor
    """sum a x x', [U, D, D]."""
    cross: Tensor
    """sum a x y' of keys and of values, [U, M, 2, D, K * E]."""
    queries: Tensor
    """sum |q|^2 of the supervised positions' queries, for each key/value head and frequency of the rotation,
    [U, M, K, E / 2]."""
    counts: Tensor
    """Samples, tokens and supervised positions, [3]."""

    @staticmethod
    def zeros(model: nn.Module, device: Any = None) -> "FitSums":
        """None yet, for a student's fit; on the model's own device unless another is given."""
        groups = groups_of(model)
        weight = groups[0][0].self_attn.k_proj.weight
        size = weight.shape[1] + (groups[0][0].self_attn.k_proj.bias is not None)
        units, members, head_size = len(groups), len(groups[0]), groups[0][0].self_attn.head_dim
        heads = weight.shape[0] // head_size
        shapes = {
            "gram": (units, size, size),
            "cross": (units, members, len(PARTS), size, weight.shape[0]),
            "queries": (units, members, heads, head_size // 2),
            "counts": (3,),
        }
        return FitSums(
            **{
                name: torch.zeros(shape, dtype=torch.float64, device=device or weight.device)
                for name, shape in shapes.items()
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def add_(self, other: "FitSums") -> None:
        """Adds others in place."""
        for name, tensor in self.tensors().items():
            tensor += getattr(other, name)

    def zero_(self) -> None:
        """Begins anew in place."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def empty_like(self) -> "FitSums":
        """Room for as many."""
        return FitSums(**{name: torch.empty_like(tensor) for name, tensor in self.tensors().items()})

    def __add__(self, other: "FitSums") -> "FitSums":
        return FitSums(**{name: tensor + getattr(other, name) for name, tensor in self.tensors().items()})


def fit_bytes(model: nn.Module, workers: int) -> int:
    """What one of so many workers holds of sums: those of the samples fitted to, those held out, and of several workers
    its own and another's."""
    sums = FitSums.zeros(model, "meta").tensors().values()
    return (4 if workers > 1 else 2) * sum(tensor.numel() * tensor.element_size() for tensor in sums)


def setting_of(model: nn.Module) -> Setting:
    """The one that a student has."""
    config = swiftkv_backbone(model).config
    return config.num_key_value_layers, config.key_value_group_size


@contextmanager
def as_setting(model: nn.Module, setting: Setting) -> Iterator[None]:
    """A student taken for one of another setting, which may be any where it has N = 1 and groups of 1, so that each
    layer has all weights; these stay as they are. Its own again, afterwards."""
    config, before = swiftkv_backbone(model).config, setting_of(model)
    config.num_key_value_layers, config.key_value_group_size = setting
    try:
        yield
    finally:
        config.num_key_value_layers, config.key_value_group_size = before


def groups_of(model: nn.Module) -> list[list[Any]]:
    """The layers above N, by the groups that share keys and values."""
    backbone = swiftkv_backbone(model)
    size, layers = backbone.config.key_value_group_size, backbone.layers[backbone.config.num_key_value_layers :]
    return [list(layers[at : at + size]) for at in range(0, len(layers), size)]


def add_batch(sums: FitSums, model: Any, batch: Batch, weights: tuple[float, float] = (1.0, 1.0)) -> None:
    """Adds the tokens of a batch to the sums of a student, see `add_to_all`."""
    add_to_all({setting_of(model): sums}, model, batch, weights)


@torch.no_grad()
def add_to_all(
    sums: Mapping[Setting, FitSums], model: Any, batch: Batch, weights: tuple[float, float] = (1.0, 1.0)
) -> None:
    """Adds the tokens of a batch to the sums of several settings, by one forward of the teacher.

    Args:
        sums: added to.
        model: the student, on which they are to be fitted; for other settings than its own see `as_setting`.
        batch: without known states.
        weights: how much the supervised positions of samples without and with images count.
    """
    keep = supervised_positions(batch.labels)
    if not keep.any():
        return
    backbone = swiftkv_backbone(model)
    layers = backbone.layers[min(n for n, _ in sums) :]
    with projected(layers, {n for n, _ in sums}) as seen:
        swiftkv = SwiftKVPass(keep=keep, distill=True, teacher_alone=True)
        model.base_model(**batch.model_inputs(model.config), use_cache=False, swiftkv=swiftkv)
    assert swiftkv.lengths is not None
    rows = torch.tensor(weights, device=keep.device)[batch.has_image.long()].split(1)  # by sample
    queries = torch.cat([row.expand(int(count)) for row, count in zip(rows, keep.sum(1), strict=True)])
    for layer in layers:  # the same for all settings
        of_layer = seen[layer.layer_idx]
        of_layer["received"] = attention_received(model, layer, of_layer, swiftkv, queries)
        of_layer["power"] = power_of_queries(layer, of_layer.pop("q_proj"), swiftkv, queries)
    for setting, of_setting in sums.items():
        with as_setting(model, setting):
            backbone.start_from_teacher(lambda weight: weight is backbone.norm_swiftkv.weight)
            add_layers(of_setting, groups_of(model), backbone.norm_swiftkv(seen[setting[0]]["trunk"])[0], seen)
        of_setting.counts.add_(of_setting.counts.new_tensor([len(keep), sum(swiftkv.lengths), int(keep.sum())]))


def add_layers(
    sums: FitSums, groups: Sequence[Sequence[Any]], source: Tensor, seen: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Adds tokens to all sums but the counts.

    Args:
        sums: added to.
        groups: of layers.
        source: float[T, D], the normed trunk.
        seen: by layer `k_proj` and `v_proj`, what attention each token has `received`, and the `power` of the queries.
    """
    x = source.double()
    for unit, layers in enumerate(groups):
        of_layers = [seen[layer.layer_idx] for layer in layers]
        received = torch.stack([of_layer["received"] for of_layer in of_layers]).sum(0)
        inputs = x if layers[0].self_attn.k_proj.bias is None else F.pad(x, (0, 1), value=1.0)
        weighted = (inputs * received[:, None]).T  # [D, T]
        sums.gram[unit] += weighted @ inputs
        for member, of_layer in enumerate(of_layers):
            sums.queries[unit, member] += of_layer["power"]
            for part, name in enumerate(PARTS):
                sums.cross[unit, member, part] += weighted @ of_layer[name][0].double()


@contextmanager
def projected(layers: Iterable[Any], trunks: Collection[int]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """What a forward of the teacher makes of tokens by the projections of layers above N: by layer and name, [1, T, H
    or K * E], queries of the last layer [1, n, H * E]; and what enters some of them, as `trunk` [1, T, D]."""
    seen: dict[int, dict[str, Tensor]] = {}

    def keep(of_layer: dict[str, Tensor], name: str) -> Any:
        return lambda module, arguments, output: of_layer.__setitem__(name, output)

    def keep_input(of_layer: dict[str, Tensor]) -> Any:
        return lambda module, arguments: of_layer.__setitem__("trunk", arguments[0])

    handles = []
    for layer in layers:
        of_layer = seen.setdefault(layer.layer_idx, {})
        if layer.layer_idx in trunks:
            handles.append(layer.register_forward_pre_hook(keep_input(of_layer)))
        for name in ("q_proj", *PARTS):
            handles.append(getattr(layer.self_attn, name).register_forward_hook(keep(of_layer, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_received(
    model: nn.Module, layer: Any, seen: Mapping[str, Tensor], swiftkv: SwiftKVPass, weights: Tensor
) -> Tensor:
    """float64[T]: how much attention the teacher's supervised positions pay to each token, in all heads of a layer.

    Args:
        model: whose layer it is.
        layer: above N.
        seen: its projections, see `projected`.
        swiftkv: of the forward.
        weights: float32[n] how much each position counts.
    """
    attention, lengths = layer.self_attn, swiftkv.lengths
    assert lengths is not None and isinstance(swiftkv.keep, Tensor) and swiftkv.position_embeddings is not None
    queries, keys = seen["q_proj"], seen["k_proj"]
    if queries.shape[1] == keys.shape[1]:
        queries = swiftkv.select(queries)
    positions = torch.cat([torch.arange(length, device=keys.device) for length in lengths])[None]
    embeddings = swiftkv_backbone(model).rotary_emb(keys, position_ids=positions)
    heads, rotate = attention._heads, attention._rotate
    q = rotate(heads(queries, getattr(attention, "q_norm", None)), swiftkv.position_embeddings)[0].float()  # [H, n, E]
    k = rotate(heads(keys, getattr(attention, "k_norm", None)), embeddings)[0].float()  # [K, T, E]
    window = getattr(attention, "sliding_window", None)
    received, first = [], 0
    for keys_of, kept in zip(k.split(lengths, 1), swiftkv.keep[0].split(lengths), strict=True):
        at = kept.nonzero()[:, 0]
        of_sample = torch.zeros(len(kept), dtype=torch.float64, device=k.device)
        for some in at.split(QUERIES_AT_ONCE):
            asking = q[:, first : first + len(some)].unflatten(0, (len(k), -1))  # [K, H / K, n, E]
            behind = some[:, None] - torch.arange(len(kept), device=k.device)
            scores = (asking @ keys_of[:, None].transpose(2, 3)) * attention.scaling
            scores.masked_fill_((behind < 0) | (behind >= (window or len(kept))), -torch.inf)
            of_query = scores.softmax(-1).sum((0, 1))  # [n, T]
            of_sample += weights[first : first + len(some)].double() @ of_query.double()
            first += len(some)
        received.append(of_sample + FLOOR * of_sample.mean())
    return torch.cat(received)


def power_of_queries(layer: Any, projected_queries: Tensor, swiftkv: SwiftKVPass, weights: Tensor) -> Tensor:
    """float64[K, E / 2]: sum |q|^2 over supervised positions and the heads that share keys; a rotation changes no |q|.

    Args:
        layer: of the queries.
        projected_queries: [1, T or n, H * E].
        swiftkv: of the forward.
        weights: float32[n] how much each position counts.
    """
    attention = layer.self_attn
    all_of_them = attention._heads(projected_queries)[0].double()  # [H, T or n, E]
    keep = swiftkv.keep
    assert isinstance(keep, Tensor)
    kept = all_of_them[:, keep[0]] if all_of_them.shape[1] == keep.shape[1] else all_of_them
    power = torch.einsum("hne,n->he", kept.square(), weights.double())  # [H, E]
    of_frequency = power.unflatten(1, (2, -1)).sum(1)  # number f and number f + E / 2 of a head are rotated together
    return of_frequency.unflatten(0, (-1, attention.num_key_value_groups)).sum(1)


# ----------------------------------------------------------------------------------------------------------- the fit
def projections_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a student's queries, keys and values, by their names, and biases."""
    return {name: parameter for name, parameter in model.named_parameters() if "_proj_swiftkv." in name}


def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts weights into a model in place of those of the same names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def fit(model: nn.Module, sums: FitSums, chosen: Mapping[str, Sequence[float | None]]) -> dict[str, Tensor]:
    """The weights that solve the problem above, and of layers that share keys those of their queries.

    Args:
        model: the student, whose weights are the copied ones.
        sums: over the tokens.
        chosen: by part, the ridge of each group of layers, None for the copied weights.

    Returns:
        by the names of its parameters, in their dtype.
    """
    fitted: dict[nn.Linear, Tensor] = {}
    for unit, layers in enumerate(groups_of(model)):
        attentions = [layer.self_attn for layer in layers]
        ridges = [chosen[name][unit] for name in PARTS]
        solved = {ridge: solve(sums, unit, layers, ridge) for ridge in set(ridges) if ridge is not None}
        own = [None if ridge is None else solved[ridge][part] for part, ridge in enumerate(ridges)]
        keys, values = own
        if values is not None:
            fitted[attentions[0].v_proj_swiftkv] = shared_values(attentions, values)
        if keys is not None:
            shared, queries = shared_keys(attentions, keys, sums.gram[unit], sums.queries[unit])
            fitted[attentions[0].k_proj_swiftkv] = shared
            fitted |= {attention.q_proj_swiftkv: weight for attention, weight in zip(attentions, queries, strict=True)}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module in fitted:
            parts = split(fitted[module], module)
            weights |= {f"{name}.{key}": parts[at].to(p.dtype) for at, (key, p) in enumerate(module.named_parameters())}
    return weights


def choose(model: nn.Module, sums: FitSums, held_out: FitSums) -> dict[str, list[float | None]]:
    """By part, for each group of layers the ridge whose weights are nearest on tokens that they are not fitted to.

    Where no layers share keys and values, the copied weights are one more choice.
    """
    chosen: dict[str, list[float | None]] = {name: [] for name in PARTS}
    for unit, layers in enumerate(groups_of(model)):
        errors: dict[str, dict[float | None, float]] = {name: {} for name in PARTS}
        if len(layers) == 1:
            for part, name in enumerate(PARTS):
                errors[name][None] = error(held_out, unit, 0, part, joined(getattr(layers[0].self_attn, name)))
        for ridge in RIDGES:
            for part, own in enumerate(solve(sums, unit, layers, ridge)):
                errors[PARTS[part]][ridge] = sum(
                    error(held_out, unit, member, part, weight) for member, weight in enumerate(own)
                )
        for name, of_part in errors.items():
            chosen[name].append(min(of_part, key=lambda ridge: of_part[ridge]))
    return chosen


def solve(sums: FitSums, unit: int, layers: Sequence[Any], ridge: float) -> list[list[Tensor]]:
    """float64[K * E, D] by part and layer of a group: the weights nearest to a layer's own keys or values, a bias in
    the last column. One factor of the tokens' matrix does for all of them."""
    gram, cross = sums.gram[unit], sums.cross[unit]
    ridge = ridge * float(gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    wanted = [
        cross[member, part] + ridge * joined(getattr(layer.self_attn, name)).T
        for part, name in enumerate(PARTS)
        for member, layer in enumerate(layers)
    ]
    solved = torch.cholesky_solve(torch.cat(wanted, dim=1), factor).T.split(cross.shape[-1])
    return [list(solved[part * len(layers) : (part + 1) * len(layers)]) for part in range(len(PARTS))]


def error(sums: FitSums, unit: int, member: int, part: int, weight: Tensor) -> float:
    """sum a |W x - y|^2 over tokens, but for a part of it that no W changes."""
    cross = sums.cross[unit, member, part]
    return float(((weight @ sums.gram[unit]) * weight).sum() - 2 * (weight.T * cross).sum())


# ---------------------------------------------------------------------------------------------------- layers that share
def shared_values(attentions: Sequence[Any], own: Sequence[Tensor]) -> Tensor:
    """float64[K * E, D]: the values that several layers share, from those fitted to each.

    What a layer adds for a value v is O v, by the columns O of its output projection that belong to the head. The
    shared value minimizes the sum over layers l of |O_l (v - v_l)|^2: a mean of the v_l weighted by O_l' O_l.
    """
    if len(own) == 1:
        return own[0]
    heads, size = len(own[0]) // attentions[0].head_dim, attentions[0].head_dim
    metrics = []
    for attention in attentions:
        outputs = attention.o_proj.weight.detach().double().unflatten(1, (heads, -1, size))  # [D, K, H / K, E]
        metrics.append(torch.einsum("dkge,dkgf->kef", outputs, outputs))
    total = torch.stack(metrics).sum(0)
    total = total + 1e-9 * total.diagonal(dim1=1, dim2=2).mean() * torch.eye(
        size, dtype=total.dtype, device=total.device
    )
    wanted = sum(metric @ weight.unflatten(0, (heads, size)) for metric, weight in zip(metrics, own, strict=True))
    return torch.linalg.solve(total, wanted).flatten(0, 1)


def shared_keys(
    attentions: Sequence[Any], own: Sequence[Tensor], gram: Tensor, queries: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The keys that several layers share, float64[K * E, D], and the queries that go with them, [H * E, D] each.

    Numbers f and f + E / 2 of a head are rotated together by the token's position, as the real and the imaginary part
    of one complex number. A score is the real part of a sum over f of conj(q[f]) k[f], so where layer l has k_l[f] it
    may as well have c_l[f] k[f], with conj(c_l[f]) q_l[f] for its query. The k and c that lose the least of all k_l,
    each weighted by how large its queries are, are the first principal component of the k_l, over the tokens.

    Where keys are normed after the projection, that does not hold: they are the mean of the layers', and queries stay.

    Args:
        attentions: of the layers.
        own: float64[K * E, D] each, fitted to its keys.
        gram: float64[D, D] of the tokens.
        queries: float64[M, K, E / 2], sums of |q|^2.
    """
    asked = [joined(attention.q_proj) for attention in attentions]
    if len(own) == 1:
        return own[0], asked
    if hasattr(attentions[0], "k_norm"):
        return torch.stack(tuple(own)).mean(0), asked
    heads, group = queries.shape[1], attentions[0].num_key_value_groups
    power = queries.clamp(min=1e-12 * float(queries.mean())).sqrt()  # [M, K, E / 2]
    weighted = power[..., None] * torch.stack([as_complex(weight, heads) for weight in own])  # [M, K, E / 2, D]
    covariance = torch.einsum("lkfd,de,mkfe->kflm", weighted, gram.to(weighted.dtype), weighted.conj())
    first = torch.linalg.eigh(covariance).eigenvectors[..., -1]  # [K, E / 2, M]
    turn = first.sum(-1, keepdim=True)  # any turn of it is as good: the one by which queries turn the least
    first = first * torch.where(turn.abs() > 1e-6, turn.conj() / turn.abs().clamp(min=1e-6), torch.ones_like(turn))
    size = power.square().mean(0).sqrt()  # so that queries and keys stay about as large as they were
    keys = torch.einsum("kfl,lkfd->kfd", first.conj(), weighted) / size[..., None]
    factors = first.movedim(-1, 0).conj() * size / power  # [M, K, E / 2]
    turned = [
        as_real(as_complex(weight, heads * group) * factor.repeat_interleave(group, 0)[..., None])
        for weight, factor in zip(asked, factors, strict=True)
    ]
    return as_real(keys), turned


def as_complex(weight: Tensor, heads: int) -> Tensor:
    """complex128[heads, E / 2, D] of float64[heads * E, D]: what is rotated together as one number."""
    real, imaginary = weight.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.complex(real, imaginary)


def as_real(weight: Tensor) -> Tensor:
    """The opposite."""
    return torch.stack([weight.real, weight.imag], 1).flatten(0, 2)


def joined(linear: nn.Linear) -> Tensor:
    """float64[K * E, D]: a projection's weight, with its bias in the last column if it has one."""
    columns = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(columns, dim=1).detach().double()


def split(weight: Tensor, linear: nn.Linear) -> tuple[Tensor, ...]:
    """The opposite of `joined`."""
    return (weight,) if linear.bias is None else (weight[:, :-1], weight[:, -1])
