"""The module: arguments, shapes, state, three forwards. The arithmetic is in ``functional``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from . import backends, checks, formulations, functional, ring
from .clip_node import ClipCall
from .clips import ClipWay, way_of_clip
from .modes import checked_mode, make_known_upstream, surrounding_active, surrounding_mode
from .operands import (
    Options,
    RepeatedStep,
    Tokens,
    Weights,
    as_tokens,
    is_shared,
    of_each,
    told_apart,
)
from .precision import autocast_dtype
from .repeat import Found, Repeat
from .ring import INPUT_STATES, State
from .streams import AUTOCAST_DTYPES, StatefulStreams
from .tracing import is_transformed, needs_gradient

ONE_QUERY = "it attends with one query"  # why no backend has a forward of all queries
# Attributes on which it depends how a step is taken; those that say how clips are laid out; and
# those on which it depends how a clip is attended to.
_DECIDING = ("training", "_dropout", "add_zero_attn", "batch_invariant")
_LAYOUT = ("batch_first", "embed_dim_second")
_DECIDING_CLIPS = (
    "training",
    "_dropout",
    "add_zero_attn",
    "_num_heads",
    "_query_index",
    "forward_returns_attn_mask",
    "single_output_forward",
    *_LAYOUT,
)
_OWN_WEIGHTS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
_ALL_WEIGHTS = (*_OWN_WEIGHTS, "out_proj.weight", "out_proj.bias")
_OF_WEIGHTS = ("embed_dim", "head_dim", "kdim", "vdim")  # what the weights fix
# Arguments that attention of all queries does not have.
_OF_SINGLE_OUTPUT = (
    "query_index",
    "forward_returns_attn_mask",
    "embed_dim_second",
    "single_output_forward",
    "formulation",
    "cache_dtype",
    "batch_invariant",
)
# Arguments that are checked together.
_CHECKED = ("embed_dim", "num_heads", "kdim", "vdim", "sequence_len", "query_index")


def _deciding_shape(name: str, doc: str) -> Any:
    """An attribute of the module on which the shape of its state depends."""
    held = "_" + name

    def read(module: SingleOutputMultiheadAttention) -> Any:
        return getattr(module, held)

    def write(module: SingleOutputMultiheadAttention, value: Any) -> None:
        module._set_size(name, value)

    return property(read, write, doc=doc)


class SingleOutputMultiheadAttention(StatefulStreams, nn.MultiheadAttention):
    """Multi-head attention of one query over the last ``sequence_len`` tokens of a stream.

    A drop-in for the class of the same name in ``continual-inference`` (Hedegaard et al.,
    "Continual Transformers", arXiv 2201.06268, section 3.3) with the parameters of
    ``torch.nn.MultiheadAttention``. ``forward`` takes a clip; ``forward_step`` one token per
    stream, ``forward_steps`` several, and both remember the tokens before. In inference the state
    is a ring that is written in place; where a gradient is needed each call makes a new one, and
    the gradient flows into the calls before, until ``detach_state``. Without ``torch.no_grad``
    memory therefore grows with every step, in ``eval()`` too.

    Args:
        embed_dim: features of a query token and of the output, ``E``.
        num_heads: heads ``H``; ``E`` must be divisible by it.
        dropout: probability to drop an attention weight while training.
        bias: whether the projections have biases.
        add_bias_kv: add one learned key and value to what every query sees.
        add_zero_attn: add one key and value of zeros to what every query sees.
        kdim: features of a key token; ``embed_dim`` if None.
        vdim: features of a value token; ``embed_dim`` if None.
        batch_first: clips are ``(N, L, E)`` and not ``(L, N, E)``.
        device: of the parameters.
        dtype: of the parameters.
        sequence_len: tokens in the window, ``L``; required.
        query_index: which token of the window asks, from ``-sequence_len`` to ``sequence_len - 1``.
        forward_returns_attn_mask: whether ``forward`` returns the attention weights too.
        embed_dim_second: clips are ``(N, E, L)``; needs ``batch_first``.
        single_output_forward: whether ``forward`` computes one query only; if not, it is that of
            ``torch.nn.MultiheadAttention``, as layers of torch that hold one expect.
        formulation: what steps remember. ``kv``: projected keys and values. ``input``: the tokens
            themselves, half the memory and traffic for more arithmetic; for self-attention, where
            key and value are the query. ``auto`` decides when the streams begin.
        cache_dtype: ``torch.int8`` or ``torch.float8_e4m3fn`` to keep in 8 bits what steps
            remember, rounded, with a scale for every token (and head): for inference only. None
            to keep it as it is.
        batch_invariant: whether the outputs of a stream must be the same, bit for bit, in whatever
            row and batch size its steps run. Steps then take kernels of this package only, of one
            way of computing for all batch sizes, and raise a RuntimeError where there is none. An
            attribute of the same name may be set at any time.

    The arguments are attributes, too. ``num_heads``, ``sequence_len``, ``query_index`` and
    ``cache_dtype``, on which the shape of the state depends, may be set while there is none, as
    before the first step or after ``clean_state``; what the weights fix may not be set.
    ``out_proj`` may be another ``torch.nn.Linear``: its weight and bias are read, and its forward
    is not called. It may have an adapter, as of ``peft``, that is merged into them or switched off.

    Raises:
        ValueError: a size or an index is out of its range.
        TypeError: a size is not an integer, or ``dropout`` no number.

    Example:
        >>> import torch, continual_mha as co
        >>> mha = co.SingleOutputMultiheadAttention(64, num_heads=4, sequence_len=3)
        >>> with torch.inference_mode():  # five tokens of two streams
        ...     outputs = [mha.forward_step(token) for token in torch.rand(5, 2, 64)]
        >>> [output is None for output in outputs]  # until three tokens were seen
        [True, True, False, False, False]
        >>> outputs[-1].shape
        torch.Size([2, 64])
    """

    stride = (1,)
    padding = (0,)

    embed_dim = _deciding_shape("embed_dim", "Features of a query token and of the output.")
    num_heads = _deciding_shape("num_heads", "Heads.")
    head_dim = _deciding_shape("head_dim", "Features of a head.")
    kdim = _deciding_shape("kdim", "Features of a key token.")
    vdim = _deciding_shape("vdim", "Features of a value token.")
    sequence_len = _deciding_shape("sequence_len", "Tokens in the window.")
    query_index = _deciding_shape("query_index", "Which token of the window asks.")
    cache_dtype = _deciding_shape("cache_dtype", "The 8 bits that rings are kept in, or None.")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sequence_len: int | None = None,
        query_index: int = -1,
        forward_returns_attn_mask: bool = True,
        embed_dim_second: bool = False,
        single_output_forward: bool = True,
        *,
        formulation: str = "auto",
        cache_dtype: torch.dtype | None = None,
        batch_invariant: bool = False,
    ) -> None:
        checks.check_arguments(embed_dim, num_heads, kdim, vdim, sequence_len, query_index)
        checks.check_formulation(formulation, embed_dim, kdim or embed_dim, vdim or embed_dim)
        checks.check_cache_dtype(cache_dtype)
        if embed_dim_second and not batch_first:
            raise ValueError(
                "embed_dim_second=True means clips of shape (N, E, L) and needs batch_first=True"
            )
        super().__init__(
            operator.index(embed_dim),
            operator.index(num_heads),
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            None if kdim is None else operator.index(kdim),
            None if vdim is None else operator.index(vdim),
            batch_first,
            device,
            dtype,
        )
        assert sequence_len is not None
        self.sequence_len = operator.index(sequence_len)
        self.query_index = operator.index(query_index)
        self.forward_returns_attn_mask = forward_returns_attn_mask
        self.embed_dim_second = embed_dim_second
        self.single_output_forward = single_output_forward
        self._call_mode = "forward"
        self._formulation = formulation
        self.cache_dtype = cache_dtype
        self.batch_invariant = batch_invariant
        self._init_streams()
        self._lay_out()
        make_known_upstream(type(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        make_known_upstream(type(self))  # nothing else tells it of a module that was unpickled

    def _lay_out(self) -> None:
        """Know how states and weights look, from what they depend on."""
        sizes = (self.num_heads, self.head_dim, self.sequence_len, self.delay, self.cache_dtype)
        self._layouts = {kept: ring.Layout(kept, *sizes) for kept in ("kv", "input")}
        self._weight_shapes = checks.shapes_of_weights(self.embed_dim, self.kdim, self.vdim)
        self._state_types = tuple(layout.state_type() for layout in self._layouts.values())

    def _set_size(self, name: str, value: Any) -> None:
        """Set an attribute that decides the shape of the state, if it can be that now.

        Raises:
            ValueError: there is a state of another shape; the weights fix it; it is out of range.
            TypeError: a size or an index is not an integer.
        """
        held = self.__dict__
        if "_layouts" not in held:  # under construction, where all of them are checked together
            held["_" + name] = value
            return
        before = held["_" + name]
        if checks.is_integer(value):
            value = operator.index(value)
        if type(value) is type(before) and value == before:
            return
        checks.check_change(name, before, value, name in _OF_WEIGHTS, self._clock is not None)
        if name == "cache_dtype":
            checks.check_cache_dtype(value)
        else:
            checks.check_arguments(
                **{size: getattr(self, size) for size in _CHECKED} | {name: value}
            )
        held["_" + name] = value
        held["_head_dim"] = self.embed_dim // self.num_heads
        self._lay_out()

    # -- what it is ------------------------------------------------------------------------------

    @property
    def receptive_field(self) -> int:
        """Tokens that an output depends on: ``sequence_len``."""
        return self.sequence_len

    @property
    def delay(self) -> int:
        """Steps from a token's arrival to the output for it as the query."""
        index = self.query_index
        return self.sequence_len - index - 1 if index >= 0 else -index - 1

    @property
    def _state_shape(self) -> int:
        """Parts of a state, for ``continual``; of one stream's while the formulation is open."""
        if self.formulation != "auto":
            layout = self._layout()
        else:
            layout = self._layout_of_new(1, checks.out_weight(self))
        return len(layout.state_type()._fields)

    @property
    def _dynamic_state_inds(self) -> list[bool]:
        """Which parts of a state have an axis of streams, for ``continual``: all but the clock."""
        return [True] * (self._state_shape - 1) + [False]

    @property
    def call_mode(self) -> str:
        """Which forward ``module(...)`` stands for: forward, forward_steps or forward_step."""
        return self._call_mode

    @call_mode.setter
    def call_mode(self, mode: Any) -> None:
        self._call_mode = checked_mode(mode)

    @property
    def dropout(self) -> float:
        """Probability to drop an attention weight while training."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: Any) -> None:
        self._dropout = checks.checked_dropout(dropout)

    def extra_repr(self) -> str:
        """The sizes, the window and its query, and what of the rest is not the default."""
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        parts += [f"sequence_len={self.sequence_len}", f"query_index={self.query_index}"]
        if self._formulation != "auto":
            parts.append(f"formulation={self._formulation!r}")
        if self.batch_invariant:
            parts.append("batch_invariant=True")
        if self.cache_dtype is not None:
            parts.append(f"cache_dtype={self.cache_dtype}")
        return ", ".join(parts)

    @classmethod
    def build_from(
        cls, module: nn.MultiheadAttention, sequence_len: int, **kwargs: Any
    ) -> SingleOutputMultiheadAttention:
        """A module with a copy of the weights and arguments of ``module``; ``kwargs`` override.

        Arguments are those of its class that this class has too, such as ``query_index`` of the
        class of the same name in ``continual-inference``. A weight that is parametrised or pruned
        is copied as it is at present. Those that a subclass of this class adds stay as it made
        them.

        Raises:
            ValueError: ``sequence_len`` does not reach to its ``query_index``.
            TypeError: ``module`` is not a ``torch.nn.MultiheadAttention``, or has weights besides.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise TypeError(
                f"build_from takes a torch.nn.MultiheadAttention, but got {type(module).__name__}"
            )
        out_weight = checks.out_weight(module)
        checks.check_source(module, _ALL_WEIGHTS)
        arguments: dict[str, Any] = {
            "embed_dim": module.embed_dim,
            "num_heads": module.num_heads,
            "dropout": module.dropout,
            "bias": module.in_proj_bias is not None,
            "add_bias_kv": module.bias_k is not None,
            "add_zero_attn": module.add_zero_attn,
            "kdim": module.kdim,
            "vdim": module.vdim,
            "batch_first": module.batch_first,
            "device": out_weight.device,
            "dtype": out_weight.dtype,
            "sequence_len": sequence_len,
        }
        built = cls(**{**arguments, **kwargs})
        built._take_over(module, kwargs)
        found = {name: operator.attrgetter(name)(module) for name in _ALL_WEIGHTS}
        weights = {name: weight.detach() for name, weight in found.items() if weight is not None}
        own = {n: w for n, w in built.state_dict().items() if n not in _ALL_WEIGHTS}
        built.load_state_dict(weights | own)
        return built.train(module.training)

    def _take_over(self, source: nn.MultiheadAttention, given: dict[str, Any]) -> None:
        """Take what ``source`` was told about a single output, but for what is ``given``."""
        parameters = inspect.signature(SingleOutputMultiheadAttention).parameters
        for name in _OF_SINGLE_OUTPUT:
            default = parameters[name].default
            held = "_formulation" if name == "formulation" else name  # not what streams made of it
            value = getattr(source, held, default)
            another_layout = name == "embed_dim_second" and not self.batch_first
            if name not in given and value != default and not another_layout:
                setattr(self, name, value)

    # -- state -----------------------------------------------------------------------------------

    def warm_up(self, step_shape: tuple[int, ...]) -> None:
        """Feed zeros until the next token gets an output.

        Args:
            step_shape: shape of a query token, ``(N, E)``.

        Raises:
            ValueError: ``step_shape`` is another, or ``N`` is not that of the state.
            TypeError: ``N`` is not an integer.
        """
        checks.check_step_shape(step_shape, self.embed_dim)
        weight = checks.out_weight(self)
        shape = (step_shape[0], self.sequence_len - 1)
        query, key, value = (
            self._to_layout(torch.zeros((*shape, width), dtype=weight.dtype, device=weight.device))
            for width in (self.embed_dim, self.kdim, self.vdim)
        )
        if self.formulation == "input":  # which takes one token for all three
            key = value = query
        with torch.no_grad():
            self.forward_steps(query, key, value)

    @property
    def formulation(self) -> str:
        """What the state caches: ``kv`` or ``input``; ``auto`` as long as that is not decided.

        Setting it converts the state, where there is one: inputs can be projected to keys and
        values, but not the other way.
        """
        if self._clock is None:
            return self._formulation
        return "kv" if self._buffers["_ring_x"] is None else "input"

    @formulation.setter
    def formulation(self, formulation: str) -> None:
        checks.check_formulation(formulation, self.embed_dim, self.kdim, self.vdim)
        state = self._state()
        if state is not None and formulation not in ("auto", self.formulation):
            if not isinstance(state, INPUT_STATES):
                raise ValueError(
                    "keys and values cannot be turned back into inputs; call clean_state() first"
                )
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.cache_dtype is None):
                converted = functional.to_kv(state, self._weights(), self._layout_with("kv"))
            shared = self._rings_are_shared or any(part.requires_grad for part in converted)
            self.clean_state()
            self._store(converted)
            self._rings_are_shared = shared
        self._formulation = formulation

    def _layout(self) -> ring.Layout:
        return self._layout_with(self.formulation)

    def _layout_with(self, formulation: str) -> ring.Layout:
        return self._layouts["input" if formulation == "input" else "kv"]

    def _layout_of_new(self, batch_size: int, like: Tensor, one_token: bool = True) -> ring.Layout:
        formulation = self._formulation
        suits = one_token and self.embed_dim == self.kdim == self.vdim
        if formulation == "auto" and suits and not self.batch_invariant:
            sizes = (batch_size, self.embed_dim, self.num_heads, self.sequence_len)
            formulation = formulations.choose(*sizes, like)
        return self._layout_with(formulation)

    def _layout_of_given(self, state: object) -> ring.Layout:
        inputs = self._layouts["input"]
        left_open = self._formulation == "auto" and self.embed_dim == self.kdim == self.vdim
        sized = isinstance(state, (tuple, list)) and len(state) == len(inputs.state_type()._fields)
        return inputs if left_open and sized else self._layout_with(self._formulation)

    def _like(self) -> Tensor:
        like = None if self._clock is None else ring.like_tokens(self._existing_state())
        return checks.out_weight(self) if like is None else like

    # -- the three forwards ----------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that ``call_mode`` names, with the module's hooks."""
        mode = surrounding_mode() or self._call_mode
        if mode == "forward":
            return super().__call__(*args, **kwargs)
        forward = getattr(self, mode)
        if not self._has_hooks():
            return forward(*args, **kwargs)
        own = self.__dict__.get("forward")  # that of who wraps a module's forward in its place

        handle: RemovableHandle | None = None

        def give_back(module: nn.Module, args: tuple[Any, ...]) -> None:
            _set_forward(module, own)
            if handle is not None:  # another thread's call may be here first
                handle.remove()

        # torch's own call looks `forward` up before it runs the first hook, which gives it back
        handle = self.register_forward_pre_hook(give_back, prepend=True)
        try:
            _set_forward(self, forward)
            return super().__call__(*args, **kwargs)
        finally:
            _set_forward(self, own)
            handle.remove()

    def _has_hooks(self) -> bool:
        names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        own = any(getattr(self, name) for name in names)
        return own or bool(_has_any_global_hook())

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attention of the query at ``query_index`` over a clip. The state plays no part.

        With ``single_output_forward=False`` every token asks, and what is 1 below is ``L``; clips
        and masks may then be of one stream, without the axis ``N``, too.

        Args:
            query: ``(N, L, E)``, ``(N, E, L)`` with ``embed_dim_second``, or ``(L, N, E)`` without
                ``batch_first``. Any length will do: the whole clip is attended to.
            key: the same with ``kdim`` features; the query if None.
            value: the same with ``vdim`` features; the query if None.
            key_padding_mask: ``(N, S)``; True hides a token, a float is added to its score.
            need_weights: whether to compute the attention weights.
            attn_mask: ``(1, S)`` or ``(N * H, 1, S)``; True hides a token, a float is added.
            average_attn_weights: whether to average the weights over the heads.
            is_causal: a hint that ``attn_mask`` is causal, of use to attention of all queries.

        Returns:
            The output ``(N, 1, E)``, ``(N, E, 1)`` or ``(1, N, E)``, and, unless
            ``forward_returns_attn_mask=False``, the weights ``(N, 1, S)`` averaged over the heads,
            or ``(N, H, 1, S)`` of each, or None. As ``torch.nn.MultiheadAttention`` gives them for
            that one query.

        Raises:
            ValueError: a shape or a device does not fit, or ``is_causal`` has no ``attn_mask``.
            TypeError: a dtype does not fit.
        """
        apart, masks = told_apart(query, key, value), (key_padding_mask, attn_mask)
        if not self.single_output_forward and is_unbatched(query):
            rest = (need_weights, attn_mask, average_attn_weights, is_causal)
            return self._unbatched_forward(apart, key_padding_mask, *rest)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            given, trained = apart, None  # masks that train, of which not all kernels know how
            if key_padding_mask is not None or attn_mask is not None:
                given += tuple(mask for mask in masks if mask is not None)
                trained = tuple(getattr(mask, "requires_grad", None) for mask in masks)
            one = True if len(apart) == 1 else _which_are_one(*apart)
            kind = (bool(need_weights), bool(average_attn_weights), bool(is_causal), trained, one)
            again = self._clip_repeats.get(kind)
            if again is not None and again.serves(self, given):
                try:
                    return self._answer(*again.run([self._to_layout(x) for x in apart], *masks))
                except RuntimeError:  # weights may be others behind their parameters
                    self._clip_repeats.clear()
        clips = self._clips(as_tokens(apart))
        checks.check_clips(*clips)
        checks.check_causal(is_causal, attn_mask)
        if not self.single_output_forward:
            how = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self._full_forward(*clips, *how)
        mask, call = self._plan_clip(clips, masks, need_weights, average_attn_weights)
        weights = self._weights()
        way = way_of_clip(clips, weights, mask, call)
        if not compiling and self._comes_again(kind, given):
            self._remember_clip(kind, way, given, weights)
        return self._answer(*way.run(clips, weights, mask))

    def _plan_clip(
        self,
        clips: Tokens,
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor | None, ClipCall]:
        """Both masks as one, and what is asked of these clips."""
        checks.check_query_index(clips[0].shape[1], self.query_index)
        mask = checks.merged_mask(self.num_heads, clips[1], *masks)
        # who asks for weights gets NaN where a mask leaves nothing, even if they are not returned
        wants = (need_weights and self.forward_returns_attn_mask, not need_weights)
        average = average_attn_weights or not self.forward_returns_attn_mask
        return mask, ClipCall(self.num_heads, self.query_index, self._options(), *wants, average)

    def _answer(self, out: Tensor, attn: Tensor | None) -> Any:
        """What ``forward`` returns."""
        out = self._to_layout(out.unsqueeze(1))
        if not self.forward_returns_attn_mask:
            return out
        return out, None if attn is None else attn.unsqueeze(-2).to(out.dtype)

    def _remember_clip(
        self, kind: tuple[Any, ...], way: ClipWay, given: Sequence[Tensor], weights: Weights
    ) -> None:
        """Keep how clips are attended to for calls that repeat this one, if the weights stay where
        they are."""
        found = self._where_weights_are(weights)
        if found is None or any(type(x) is not Tensor for x in given):
            return
        found += self._attributes(*_DECIDING_CLIPS)
        shapes, num_heads = self._weight_shapes, self.num_heads

        def run(apart: Sequence[Tensor], *masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
            checks.check_weights(weights, shapes)
            clips = as_tokens(apart)
            return way.run(clips, weights, checks.merged_mask(num_heads, clips[1], *masks))

        self._clip_repeats[kind] = Repeat(lambda *_: run, found, given, weights)

    def _where_weights_are(self, weights: Weights) -> list[Found] | None:
        """What the weights are and where they were found; None if they may be others in every call,
        as those that are parametrised or pruned, or an adapter may not be merged into them."""
        own, out = self._parameters, self.out_proj
        if not checks.is_linear(out):
            return None
        held = {id(weight) for weight in (*own.values(), *out._parameters.values())}
        if any(x is not None and not (x.is_leaf and id(x) in held) for x in weights):
            return None
        found: list[Found] = [(self._modules, "out_proj", out)]
        found += [(own, name, own.get(name)) for name in _OWN_WEIGHTS]
        found += [(out._parameters, name, out._parameters.get(name)) for name in ("weight", "bias")]
        return found

    def forward_step(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        update_state: bool = True,
        *,
        active: Tensor | None = None,
        pad_end: bool = False,
    ) -> Tensor | None:
        """Take one token per stream and return the output over the last ``sequence_len``.

        Args:
            query: ``(N, E)``.
            key: ``(N, kdim)``; the query if None.
            value: ``(N, vdim)``; the query if None.
            update_state: whether to remember the token.
            active: bool ``(N,)`` on the state's device: which streams have a new token. The others
                keep state and position. None for all, or as ``active_streams`` says.
            pad_end: changes nothing, as there is no padding; ``continual``'s containers pass it.

        Returns:
            ``(N, E)``, or None until ``sequence_len`` tokens were seen. Once ``active``, ``reset``
            or ``start_streams`` let streams differ in age it is always a tensor, and ``ready``
            tells which rows count: a stream that is not ready attends over what it has seen. The
            row of a paused stream is what ``update_state=False`` would give for its token.

        Raises:
            ValueError: a shape or device does not fit, or the batch size is not that of the state.
            TypeError: a dtype does not fit.
            RuntimeError: a gradient is needed, but there is a ``cache_dtype``; or no backend can do
                what ``batch_invariant`` asks for.
        """
        compiling = torch.compiler.is_compiling()
        apart = told_apart(query, key, value)
        again = self._repeat if update_state and not compiling else None
        if again is None or not again.serves(self, apart):
            again, tokens = None, self._tokens(query, key, value)
        active = surrounding_active(compiling) if active is None else active
        if active is not None:
            checks.check_active(active, query)
        if again is not None:
            try:
                return again.run(*apart, active)
            except torch.OutOfMemoryError:  # which may come when a GPU's streams have advanced
                raise
            except RuntimeError:  # weights may be others behind their parameters; nothing advanced
                self._repeat = None
                tokens = self._tokens(query, key, value)
        return self._go_on(tokens, update_state, active)

    def forward_steps(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        update_state: bool = True,
        pad_end: bool = False,
    ) -> Tensor | None:
        """Take ``T`` tokens per stream at once: the outputs of ``T`` calls of ``forward_step``.

        Args:
            query: ``(N, T, E)``, ``(N, E, T)`` with ``embed_dim_second``, or ``(T, N, E)`` without
                ``batch_first``.
            key: the same with ``kdim`` features; the query if None.
            value: the same with ``vdim`` features; the query if None.
            update_state: whether to remember the tokens.
            pad_end: changes nothing, as there is no padding; ``continual``'s containers pass it.

        Returns:
            The outputs of those ``t`` tokens by which ``sequence_len`` were seen, laid out as the
            query, or None where ``t`` is 0.

        Raises:
            ValueError: a shape or device does not fit, or the batch size is not that of the state.
            TypeError: a dtype does not fit.
            RuntimeError: a gradient is needed, but there is a ``cache_dtype``; or no backend can do
                what ``batch_invariant`` asks for; or it is to remember tokens inside an
                ``active_streams`` block.
        """
        compiling = torch.compiler.is_compiling()
        apart = told_apart(query, key, value)
        again = self._many_repeat if update_state and not compiling else None
        if (
            again is not None
            and surrounding_active(compiling) is None
            and again.serves(self, apart)
        ):
            clips = [self._to_layout(x) for x in apart]
            mark = self._mark_before(clips[0].shape[1])
            try:
                return self._to_layout(again.run(*clips))
            except RuntimeError:  # weights may be others behind their parameters
                self.return_to(mark)
                self._many_repeat = None
            except BaseException:
                self.return_to(mark)
                raise
        tokens = self._many_tokens(query, key, value)
        if tokens[0].shape[1] == 0:
            return None
        if update_state and surrounding_active(compiling) is not None:
            raise RuntimeError(
                "forward_steps moves all streams, but active_streams says that only some have "
                "tokens; call forward_step for each token"
            )
        out = self._go_on(tokens, update_state)
        return None if out is None else self._to_layout(out)

    def _forward_step(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        prev_state: State | None = None,
    ) -> tuple[Tensor | None, State]:
        """``forward_step`` as a function of the state: returns the output and the next state.

        Neither ``prev_state`` (None for streams that have seen nothing) nor the module's own state
        changes. Shapes and errors are those of ``forward_step`` and, for the state, of
        ``set_state``, but that nothing is asked of its values. Who advances is said by
        ``active_streams``.
        """
        tokens = self._tokens(query, key, value)
        active = surrounding_active(torch.compiler.is_compiling())
        if active is not None:
            checks.check_active(active, query)
        state = prev_state
        if state is not None:
            layout, weight = self._layout_of_given(state), checks.out_weight(self)
            dtypes = {weight.dtype, *AUTOCAST_DTYPES}
            state = ring.check_parts(state, layout, dtypes, weight.device)
        tokens, state, call = self._plan(tokens, state, update=True)
        if not call.differentiable or self._must_copy(state, differentiable=True):
            state = ring.snapshot(state)
        return self._advance(tokens, state, active, call)

    def _go_on(self, tokens: Tokens, update: bool, active: Tensor | None = None) -> Tensor | None:
        """Take tokens from the module's state; if that raises, the streams are where they were."""
        tokens, state, call = self._plan(tokens, self._state(), update)
        if torch.compiler.is_compiling():
            return self._take(tokens, state, active, call)
        in_place = tokens[0].dim() == 3 and update and not call.differentiable
        in_place = in_place and not self._must_copy(state, differentiable=False)
        mark = self._mark_before(tokens[0].shape[1] if in_place else 0)
        try:
            return self._take(tokens, state, active, call)
        except BaseException:
            self.return_to(mark)
            raise

    def _take(
        self, tokens: Tokens, state: State, active: Tensor | None, call: functional.StepCall
    ) -> Tensor | None:
        """``_advance`` from the module's state, or a new one, and to it if ``call`` says so."""
        if self._must_copy(state, call.differentiable):
            state = ring.snapshot(ring.detach(state))
        out, after = self._advance(tokens, state, active, call)
        if call.update:
            self._store(after)
        shared = call.differentiable
        if (call.update or shared) and self._rings_are_shared != shared:
            self._rings_are_shared = shared
        if call.update:
            self._remember(told_apart(*tokens), state, active, call)
        return out

    def _remember(
        self,
        apart: Sequence[Tensor],
        state: State,
        active: Tensor | None,
        call: functional.StepCall,
    ) -> None:
        """Keep how tokens ``(N, E*)`` or clips ``(N, T, E*)`` were taken for calls that repeat
        this one, if weights and state stay where they are."""
        settled = state.clock is self._clock and all(type(x) is Tensor for x in apart)
        if not settled or torch.compiler.is_compiling():
            return
        many = apart[0].dim() == 3
        if many and not self._comes_again("forward_steps", apart):
            return
        found = self._where_weights_are(call.weights)
        if found is None:
            return
        found += self._attributes(*_DECIDING)
        found += self._where_state_is(of_its_own=not call.differentiable)
        if many:
            run = functional.repeated_steps(apart, state, call)
            found += self._attributes(*_LAYOUT)
            given = [self._to_layout(x) for x in apart]
            again = None if run is None else Repeat(lambda *_: run, found, given, call.weights)
            self._many_repeat = again
            return
        if not call.differentiable:
            prepare = functional.repeated_step(apart, state, active, call)
        elif (node := functional.repeated_node(apart, state, call)) is not None:
            prepare = self._going_on(type(state), call.weights, node)
        else:
            prepare = None
        self._repeat = None if prepare is None else Repeat(prepare, found, apart, call.weights)

    def _going_on(
        self, kind: type, weights: Weights, node: functional.RepeatedNode
    ) -> Callable[..., RepeatedStep]:
        """What prepares steps by ``node``, from whatever parts the state has to new ones."""
        go_on, shapes = self._stepping(kind, node), self._weight_shapes

        def run(*given: Any) -> Tensor:
            checks.check_weights(weights, shapes)
            return go_on(given[:-1], given[-1])

        return lambda *_: run

    def _plan(
        self, tokens: Tokens, state: State | None, update: bool
    ) -> tuple[Tokens, State, functional.StepCall]:
        """Tokens as the state keeps them, the state to go on from, a new one for None, and how.
        Nothing changes yet."""
        query = tokens[0]
        if state is None:
            layout = self._layout_of_new(query.shape[0], query, is_shared(tokens))
            state = ring.new_state(layout, query.shape[0], query)
        else:
            layout = self._layout_with("input" if isinstance(state, INPUT_STATES) else "kv")
            tokens = _as_kept(tokens, state)
        checks.check_continues(state, tokens, layout)
        weights = self._weights()
        differentiable = self._needs_grad(tokens, state, weights)
        if differentiable and (self.cache_dtype is not None or self.batch_invariant):
            kept = f"cache_dtype={self.cache_dtype}"
            option = "batch_invariant=True" if self.cache_dtype is None else kept
            raise RuntimeError(
                f"steps with {option} have no gradient, nor can torch.func transform them; call "
                "them under torch.no_grad() or torch.inference_mode()"
            )
        call = functional.StepCall(
            weights, layout, self._options(), update, differentiable, self.batch_invariant
        )
        return tokens, state, call

    def _advance(
        self, tokens: Tokens, state: State, active: Tensor | None, call: functional.StepCall
    ) -> tuple[Tensor | None, State]:
        """Outputs for tokens ``(N, E*)`` or ``(N, T, E*)``, and the state after them.

        The rings of ``state`` are written in place, unless ``call`` says otherwise.
        """
        length = self.sequence_len
        steps = tokens[0].shape[1] if tokens[0].dim() == 3 else 1
        seen = length if active is not None else state.clock.shape[0]
        first = min(steps, max(0, length - 1 - seen))
        if tokens[0].dim() == 3:
            out, parts = functional.steps(tokens, state, first, call)
        else:
            out, parts = functional.step(tokens, state, active, call)
        clock = state.clock
        if clock.shape[0] < length:
            clock = ring.new_clock(min(seen + steps, length))
        return out if first < steps else None, ring.rebuilt(state, parts, clock)

    # -- helpers ---------------------------------------------------------------------------------

    def _needs_grad(self, tokens: Tokens, state: State, weights: Weights) -> bool:
        return is_transformed() or needs_gradient((*tokens, *ring.rings(state), *weights))

    def _options(self) -> Options:
        return Options(self.add_zero_attn, self.dropout if self.training else 0.0)

    def _weights(self) -> Weights:
        # what is not among the parameters may be parametrised: behind an attribute
        held, out = self._parameters, self.out_proj
        own: dict[str, Any] = {
            name: held[name] if name in held else getattr(self, name) for name in _OWN_WEIGHTS
        }
        packed = own["in_proj_weight"]
        weights = Weights(
            own["q_proj_weight"] if packed is None else packed,
            own["k_proj_weight"],
            own["v_proj_weight"],
            own["in_proj_bias"],
            out.weight,
            out.bias,
            own["bias_k"],
            own["bias_v"],
        )
        checks.check_weights(weights, self._weight_shapes)
        return weights

    def _tokens(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tokens:
        """Checked query, key and value of one step."""
        tokens = as_tokens(told_apart(query, key, value))
        checks.check_tokens(self, tokens, "(N, E)", 1)
        checks.check_same_steps(tokens)
        return tokens

    def _many_tokens(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tokens:
        """Checked query, key and value of many steps, as ``(N, T, E)``."""
        clips = self._clips(as_tokens(told_apart(query, key, value)))
        checks.check_same_steps(clips)
        return clips

    def _clips(self, clips: Tokens) -> Tokens:
        """Checked clips in the module's layout, as ``(N, T, E)``."""
        if self.embed_dim_second:
            checks.check_tokens(self, clips, "(N, E, T)", 1)
        else:
            checks.check_tokens(self, clips, "(N, T, E)" if self.batch_first else "(T, N, E)", 2)
        return of_each(self._to_layout, clips)

    def _to_layout(self, x: Tensor) -> Tensor:
        """From ``(N, T, E)`` to the module's layout, or back: both swap the same axes."""
        if self.embed_dim_second:
            return x.transpose(1, 2)
        return x if self.batch_first else x.transpose(0, 1)

    def _full_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *others: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """``torch.nn.MultiheadAttention`` on ``(N, L, E)``, its output in the module's layout."""
        backends.leave_to_pytorch("a forward of all queries", ONE_QUERY)
        clips = (x if self.batch_first else x.transpose(0, 1) for x in (query, key, value))
        query, key, value = clips
        out, attn = super().forward(query, key, value, *others)
        out = out.transpose(1, 2) if self.embed_dim_second else out
        return (out, attn) if self.forward_returns_attn_mask else out

    def _unbatched_forward(
        self, clips: Sequence[Tensor], key_padding_mask: Tensor | None, *how: Any
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The same for clips of one stream, without an axis for it."""
        axis = 0 if self.batch_first else 1
        made = {id(x): x.unsqueeze(axis) if is_unbatched(x) else x for x in clips}
        query, key, value = (made[id(x)] for x in as_tokens(clips))  # one where one was given
        mask = key_padding_mask
        if isinstance(mask, Tensor) and mask.dim() == 1:
            mask = mask.unsqueeze(0)
        how = (mask, *how)
        returned = SingleOutputMultiheadAttention.forward(self, query, key, value, *how)
        if isinstance(returned, Tensor):
            return returned.squeeze(axis)
        out, attn = returned
        return out.squeeze(axis), None if attn is None else attn.squeeze(0)

    def flops(
        self, include_muls: bool = True, include_adds: bool = False, include_exps: bool = False
    ) -> int:
        """Operations of one call of ``forward`` or, by ``call_mode``, of one step, for one stream.

        Counted as ``continual-inference`` does, so that published figures compare: projections of
        one token (of every token if not ``single_output_forward``), attention over the window, and
        the output projection. ``torch.utils.flop_counter.FlopCounterMode`` counts products, two
        operations for each multiplication, of any call inside it, which plain PyTorch then runs:
        not where another backend is forced, or ``batch_invariant`` asks for kernels.

        Args:
            include_muls: count multiplications.
            include_adds: count additions.
            include_exps: count exponentials.
        """
        embed_dim, length = self.embed_dim, self.sequence_len
        full = self._call_mode == "forward" and not self.single_output_forward
        tokens = length if full else 1
        projection = embed_dim**2 + (embed_dim * (embed_dim - 1) if include_adds else 0)
        if self.in_proj_bias is not None:
            projection += embed_dim * (2 if include_adds else 1)
        count = _full_attention_flops if full else _single_query_flops
        attention = self.num_heads * count(
            length, self.head_dim, include_muls, include_adds, include_exps
        )
        return 3 * tokens * projection + attention + embed_dim * (embed_dim + 1)


def is_unbatched(clip: object) -> bool:
    return isinstance(clip, Tensor) and clip.dim() == 2


def _which_are_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[bool, ...]:
    """Whether key and value are the query, and value the key."""
    return key is query, value is query, value is key


def _as_kept(tokens: Tokens, state: State) -> Tokens:
    """Tokens in the dtype of the state where autocast surrounds the call, which takes any."""
    query, kept = tokens[0], ring.like_tokens(state)
    if kept is None or query.dtype == kept.dtype or autocast_dtype(query.device.type) is None:
        return tokens
    dtype = kept.dtype
    return of_each(lambda x: x.to(dtype), tokens)


# Private to torch: where it is not there, every call takes the way that serves hooks.
_has_any_global_hook = getattr(torch_module, "_has_any_global_hook", lambda: True)


def _set_forward(module: nn.Module, forward: Any) -> None:
    """Let the module have this ``forward`` instead of its class's; None for its class's."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _single_query_flops(length: int, head_dim: int, muls: bool, adds: bool, exps: bool) -> int:
    flops = 2 * length * head_dim + 2 * head_dim if muls else 0
    flops += 2 * length * head_dim - head_dim - 1 if adds else 0
    return flops + (length if exps else 0)


def _full_attention_flops(length: int, head_dim: int, muls: bool, adds: bool, exps: bool) -> int:
    flops = 2 * length**2 * head_dim + 2 * length * head_dim if muls else 0
    flops += 2 * length**2 - length * head_dim - length if adds else 0
    return flops + (length**2 if exps else 0)
