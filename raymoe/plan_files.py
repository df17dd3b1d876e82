"""The files of `raymoe plan` and `raymoe simulate`: counts, placements, fleets."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from placement.autoscale import Kind
from placement.errors import PlacementError
from placement.types import DEFAULT_TOKENS_PER_S, Fleet, GroupSpec, Placement, check_load

_FLEET_KEYS = {
    "expert_bytes",
    "groups",
    "kinds",
    "tokens_per_s",
    "survive",
    "reserve_bytes",
    "experts_of_layer",
}


def read_counts(path: str) -> npt.NDArray[np.float64]:
    """`counts` [windows, layers, experts] of an .npz file."""
    arrays = _read_npz(path)
    if "counts" not in arrays:
        raise PlacementError(
            f"{path} holds {sorted(arrays) or 'nothing'}; it must hold `counts` "
            "[windows, layers, experts]"
        )
    if np.iscomplexobj(arrays["counts"]):
        raise PlacementError(f"counts in {path} are complex numbers; give whole ones")
    counts = check_load(arrays["counts"])
    if counts.ndim != 3 or not counts.size:
        raise PlacementError(
            f"counts in {path} have shape {counts.shape}; they must be [windows, layers, experts], "
            "each at least 1"
        )
    return counts


def read_placement(path: str, counts: npt.NDArray[np.float64], fleet: Fleet) -> Placement:
    """A PLACEMENT.npz that fits the counts and the fleet."""
    arrays = _read_npz(path)
    if not {"resident", "share"} <= set(arrays):
        raise PlacementError(f"{path} must hold `resident` and `share` [layers, experts, groups]")
    want = (*counts.shape[1:], len(fleet.groups))
    for name in ("resident", "share"):
        if arrays[name].shape != want:
            raise PlacementError(
                f"{name} in {path} has shape {arrays[name].shape}; counts and fleet need {want}"
            )
    share = arrays["share"]
    if share.dtype.kind not in "biuf" or not np.isfinite(share).all() or (share < 0).any():
        raise PlacementError(f"share in {path} must be numbers from 0 up")
    share = share.astype(np.float64)
    return Placement(resident=arrays["resident"].astype(np.bool_), share=share)


def write_placement(path: str, placement: Placement) -> None:
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, resident=placement.resident, share=placement.share)
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror}") from None


def _read_npz(path: str) -> dict[str, npt.NDArray[Any]]:
    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.ndarray):
            with data:
                return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise PlacementError(f"{path} does not exist") from None
    except (OSError, EOFError, BadZipFile) as error:
        raise PlacementError(f"{path} is not an .npz file: {error}") from None
    except ValueError:  # numpy's own sentence advises to load it unsafely
        raise PlacementError(f"{path} is not an .npz file of plain arrays") from None
    raise PlacementError(f"{path} is one array; give an .npz file")


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise PlacementError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlacementError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise PlacementError(f"{path} must be a mapping with `expert_bytes` and `groups`")
    _refuse_unknown(data, _FLEET_KEYS, path)
    for name in ("expert_bytes", "groups"):
        if data.get(name) is None:
            raise PlacementError(f"{path} lacks `{name}`")
    if not isinstance(data["groups"], list):
        raise PlacementError(f"{path}: `groups` must be a list")
    return data


def read_fleet(path: str, layers: int) -> tuple[Fleet, list[str]]:
    """FLEET.yaml -> the fleet, and what was assumed. Unknown fields are refused by name."""
    data = _read_yaml(path)
    notes = []
    if "tokens_per_s" not in data:
        notes.append(
            f"tokens_per_s is not given; taken as {DEFAULT_TOKENS_PER_S:g} pairs/s at speed 1"
        )
    groups = tuple(_group(entry, i, path) for i, entry in enumerate(data["groups"]))
    fleet = Fleet(
        groups=groups,
        expert_bytes=_expert_bytes(data["expert_bytes"], layers, path),
        experts_of_layer=_experts_of_layer(data.get("experts_of_layer"), path),
        survive=str(data.get("survive", "none")),
        reserve_bytes=_integer(data.get("reserve_bytes", 0), "reserve_bytes", path),
        tokens_per_s=_number(data.get("tokens_per_s", DEFAULT_TOKENS_PER_S), "tokens_per_s", path),
    )
    return fleet, notes


def read_kinds(path: str) -> tuple[Kind, ...]:
    """The kinds of groups that can be had: FLEET.yaml's `kinds`, or else those of its groups."""
    data = _read_yaml(path)
    entries = data.get("kinds")
    if entries is None:
        found: dict[str, Kind] = {}
        for i, entry in enumerate(data["groups"]):
            group = _group(entry, i, path)
            found.setdefault(group.kind, _kind_of(group))
        return tuple(found.values())
    if not isinstance(entries, list) or not entries:
        raise PlacementError(f"{path}: `kinds` must be a list of at least one kind")
    kinds = []
    for i, entry in enumerate(entries):
        where = f"{path}: kind {i}"
        _check_entry(
            entry, {f.name for f in fields(Kind)}, ("name", "memory_bytes", "speed"), where
        )
        values = {k: _number(v, k, where) for k, v in entry.items() if k not in ("name", "most")}
        values["memory_bytes"] = _integer(entry["memory_bytes"], "memory_bytes", where)
        if "most" in entry:
            values["most"] = _integer(entry["most"], "most", where)
        kinds.append(Kind(name=str(entry["name"]), **values))  # type: ignore[arg-type]
    return tuple(kinds)


def _kind_of(group: GroupSpec) -> Kind:
    return Kind(
        name=group.kind,
        speed=group.speed,
        memory_bytes=group.memory_bytes,
        bandwidth_bytes_per_s=group.bandwidth_bytes_per_s,
        alpha_s=group.alpha_s,
        gamma_s=group.gamma_s,
    )


def _check_entry(entry: Any, known: set[str], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict):
        raise PlacementError(f"{where} must be a mapping")
    _refuse_unknown(entry, known, where)
    for name in needed:
        if name not in entry:
            raise PlacementError(f"{where} lacks `{name}`")


def _group(entry: Any, number: int, path: str) -> GroupSpec:
    where = f"{path}: group {number}"
    _check_entry(entry, {f.name for f in fields(GroupSpec)}, ("id", "memory_bytes"), where)
    values: dict[str, Any] = {"id": str(entry["id"]), "node": str(entry.get("node", "node"))}
    values["memory_bytes"] = _integer(entry["memory_bytes"], "memory_bytes", where)
    if "kind" in entry:
        values["kind"] = str(entry["kind"])
    for name in ("speed", "bandwidth_bytes_per_s", "alpha_s", "gamma_s"):
        if name in entry:
            values[name] = _number(entry[name], name, where)
    return GroupSpec(**values)


def _expert_bytes(value: Any, layers: int, path: str) -> npt.NDArray[np.int64]:
    sizes = value if isinstance(value, list) else [value] * layers
    if len(sizes) != layers:
        raise PlacementError(
            f"{path}: expert_bytes lists {len(sizes)} layers, the counts have {layers}: "
            "give one size, or one for each layer"
        )
    return np.array([_integer(size, "expert_bytes", path) for size in sizes], np.int64)


def _experts_of_layer(value: Any, path: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise PlacementError(f"{path}: experts_of_layer must be a list, one number a layer")
    return tuple(_integer(count, "experts_of_layer", path, "numbers") for count in value)


def check_counts(counts: npt.NDArray[np.float64], fleet: Fleet) -> None:
    """Raises PlacementError when tokens were counted for experts that a layer does not have."""
    layer, expert = np.nonzero(counts.any(0) & ~fleet.present(counts.shape[2]))
    if len(layer):
        raise PlacementError(
            f"the load has tokens for expert {expert[0]} of layer {layer[0]}, which "
            f"experts_of_layer says has {fleet.experts_of_layer[layer[0]]}: make them agree"
        )


def _refuse_unknown(data: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(map(str, data)) - known)
    if unknown:
        raise PlacementError(
            f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, str):  # YAML reads 1e9 as text
        try:
            return float(value)
        except ValueError:
            raise PlacementError(f"{where}: {name} is {value!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlacementError(f"{where}: {name} is {value!r}, not a number")
    return float(value)


def _integer(value: Any, name: str, where: str, what: str = "bytes") -> int:
    number = _number(value, name, where)
    if not number.is_integer():
        raise PlacementError(f"{where}: {name} is {value!r}; give whole {what}")
    return int(number)


def parse_bytes(text: str) -> int:
    """ "1500", "2GiB", "300MB" -> bytes."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units[f"{letter}B"], units[f"{letter}IB"] = 1000**power, 1024**power
    stripped = text.strip()
    number = stripped.rstrip("BbIiKkMmGgTt ")
    unit = stripped[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise PlacementError(f"{text!r} is no number of bytes; write e.g. 1500 or 2GiB") from None


def window_seconds(
    given: float | None, counts: npt.NDArray[np.float64], fleet: Fleet
) -> tuple[float, list[str]]:
    """Seconds a window took; when not given, what a level fleet would need for the busiest one."""
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise PlacementError("--window-s must be a positive number of seconds")
        return given, []
    seconds = float(counts.sum((1, 2)).max()) / float(fleet.pair_rate.sum())
    if seconds <= 0:
        return 1.0, ["the counts are all zero: an even load is planned for"]
    return seconds, [
        f"--window-s is not given; taken as {seconds:.4g} s, what the fleet needs for the "
        "busiest window when level"
    ]
