"""Rules from checkpoint keys to parameter paths, applied strictly and one tensor at a time, in both directions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from reroute_jax.errors import RerouteError

Dims = tuple[int, ...]
FLOAT_DTYPES = ("F32", "F16", "BF16")
NAMES_SHOWN = 20


@dataclass(frozen=True)
class TensorLayout:
    """How a parameter's shape differs from that of its tensor in the checkpoint: the same numbers in the same order.

    `rank` is that of the parameter, None for any. `hf_shape(shape)` is the tensor's, for a parameter of that shape.
    """

    name: str
    rank: int | None
    hf_shape: Callable[[Dims], Dims]


SAME = TensorLayout("same", None, lambda shape: shape)
# [N*H, D] -> [N, H, D]
SPLIT_HEADS = TensorLayout("split_heads", 3, lambda s: (s[0] * s[1], s[2]))
# [D, N*H] -> [D, N, H]
MERGE_HEADS = TensorLayout("merge_heads", 3, lambda s: (s[0], s[1] * s[2]))
# [N*H] -> [N, H]
HEADS_BIAS = TensorLayout("heads_bias", 2, lambda s: (s[0] * s[1],))
# Queries, keys and values in one: [3*N*H, D] -> [3, N, H, D]
FUSED_HEADS = TensorLayout("fused_heads", 4, lambda s: (s[0] * s[1] * s[2], s[3]))
# [3*N*H] -> [3, N, H]
FUSED_HEADS_BIAS = TensorLayout("fused_heads_bias", 3, lambda s: (s[0] * s[1] * s[2],))


def patches(time: int, side: int) -> TensorLayout:
    """nn.Conv3d over patches that do not overlap, [D, 3, time, side, side] -> [D, 3*time*side*side]: a linear map."""
    return TensorLayout("patches", 2, lambda s: (s[0], 3, time, side, side))


@dataclass(frozen=True)
class Rule:
    """One row: checkpoint key template, parameter path template, layout. `{i}` stands for the same integer in both."""

    source: str
    target: str
    layout: TensorLayout


@dataclass(frozen=True)
class Buffer:
    """A tensor that the model computes: its keys (a regex, in the rules' spelling) and what the config makes of it."""

    pattern: str
    value: np.ndarray

    def agrees(self, stored: np.ndarray) -> bool:
        """Whether `stored` is the same, within the precision of its dtype."""
        if stored.size != self.value.size:
            return False
        stored, expected = np.ravel(stored), np.ravel(self.value)
        if np.issubdtype(stored.dtype, np.integer):
            return bool(np.array_equal(stored, expected))
        kind = stored.dtype  # float16 stores a small frequency with few digits
        error = 2.0**-7 if kind.itemsize == 2 else 1e-5
        stored, expected = stored.astype(np.float64), expected.astype(kind).astype(np.float64)
        return bool(np.allclose(stored, expected, rtol=error, atol=1e-7))


@dataclass(frozen=True)
class ConversionTable:
    """Everything that is known about the keys of one architecture.

    `spellings` are (regex, replacement) pairs, applied in order, that turn any accepted spelling into the one the rules
    use; that one is also written. `buffers` are tensors that hold no parameter. `copies` are (key, key) pairs: the
    first repeats the second, or stands for it where the checkpoint has the first alone.
    """

    rules: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    buffers: tuple[Buffer, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    def canonical(self, key: str) -> str:
        """`key` in the rules' spelling."""
        for pattern, replacement in self.spellings:
            key = re.sub(pattern, replacement, key)
        return key


@dataclass(frozen=True)
class Assignment:
    """Key `key` of the checkpoint becomes parameter `path`, reshaped."""

    key: str
    path: str


def match(
    table: ConversionTable, source: Iterable[tuple[str, str, Dims]], target: Mapping[str, Dims], name: str
) -> list[Assignment]:
    """Pair every (key, safetensors dtype, shape) of `source` with a parameter of `target` (path -> shape), in order.

    `name` is the checkpoint's, for the report. Buffers and copies become no parameter: the caller compares them. Raises
    RerouteError, listing everything at once, if a key is unknown, occurs twice, is mis-shaped or is not floating point,
    or if a parameter is set twice or never.
    """
    unknown, repeated, misshaped, not_float = [], [], [], []
    assignments: list[Assignment] = []
    setters: dict[str, list[str]] = {}
    source = list(source)
    occurrences = Counter(key for key, _, _ in source)
    repeated += [f"{key} is in {n} files" for key, n in occurrences.items() if n > 1]
    held = {table.canonical(key) for key in occurrences}
    for key, dtype, shape in {entry[0]: entry for entry in source}.values():
        canonical = table.canonical(key)
        if any(re.fullmatch(buffer.pattern, canonical) for buffer in table.buffers):
            continue
        original = dict(table.copies).get(canonical)
        if original in held:
            continue
        canonical = original or canonical
        found = _find(table.rules, canonical, lambda rule: rule.source, lambda rule: rule.target)
        if found is None or found[0] not in target:
            unknown.append(key)
            continue
        path, layout = found
        setters.setdefault(path, []).append(key)
        expected = _hf_shape(layout, path, target[path])
        if shape != expected:
            misshaped.append(f"{key} is {list(shape)}, expected {list(expected)}")
        if dtype not in FLOAT_DTYPES:
            not_float.append(f"{key} is {dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        assignments.append(Assignment(key, path))
    repeated += [f"{path} is set by {' and by '.join(keys)}" for path, keys in setters.items() if len(keys) > 1]
    missing = [f"{hf_key(table, path)[0]} (for {path})" for path in target if path not in setters]
    raise_report(
        f"checkpoint {name} does not fit its config.json",
        {"unknown": unknown, "missing": missing, "duplicate": repeated, "mis-shaped": misshaped, "dtype": not_float},
    )
    return assignments


def raise_report(headline: str, problems: Mapping[str, list[str]]) -> None:
    """Raise RerouteError with one headline and the named problems below it, unless there are none."""
    problems = {kind: names for kind, names in problems.items() if names}
    if not problems:
        return
    lines = [f"{headline}: " + ", ".join(f"{len(names)} {kind}" for kind, names in problems.items())]
    for kind, names in problems.items():
        lines += [f"  {kind}: {text}" for text in names[:NAMES_SHOWN]]
        if len(names) > NAMES_SHOWN:
            lines.append(f"  {kind}: ... and {len(names) - NAMES_SHOWN} more")
    raise RerouteError("\n".join(lines))


def hf_key(table: ConversionTable, path: str) -> tuple[str, TensorLayout]:
    """The checkpoint key that parameter `path` is written under, and its layout. Raises RerouteError without a rule."""
    found = _find(table.rules, path, lambda rule: rule.target, lambda rule: rule.source)
    if found is None:
        raise RerouteError(f"no conversion rule for parameter {path}: expected one that its table names")
    return found


def hf_shapes(table: ConversionTable, target: Mapping[str, Dims]) -> dict[str, Dims]:
    """Key -> tensor shape of the checkpoint that holds the parameters `target` (path -> shape)."""
    named = {path: hf_key(table, path) for path in target}
    return {key: _hf_shape(layout, path, target[path]) for path, (key, layout) in named.items()}


def to_hf(table: ConversionTable, params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters as checkpoint tensors (key, array), one at a time, bit for bit and in the written spelling."""
    for path, value in params.items():
        key, layout = hf_key(table, path)
        yield key, np.asarray(value).reshape(layout.hf_shape(value.shape))


def _find(
    rules: tuple[Rule, ...], name: str, left: Callable[[Rule], str], right: Callable[[Rule], str]
) -> tuple[str, TensorLayout] | None:
    """Translate `name` from the `left` template of the rule it fits to the `right` one."""
    for rule in rules:
        pattern = re.escape(left(rule)).replace(re.escape("{i}"), r"(?P<i>0|[1-9]\d*)")
        if found := re.fullmatch(pattern, name):
            return right(rule).format(**found.groupdict()), rule.layout
    return None


def _hf_shape(layout: TensorLayout, path: str, shape: Dims) -> Dims:
    if layout.rank is not None and len(shape) != layout.rank:
        raise RerouteError(
            f"{layout.name} is for parameters of rank {layout.rank}, but {path} is {list(shape)}: correct the rule"
        )
    return layout.hf_shape(shape)
