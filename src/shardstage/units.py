"""Quantities at the edge: SI inside the library, pretty text for people.

Inside, every quantity is a plain number in bytes, seconds, FLOPs or bytes per second; its name ends in that unit.
Memory is printed in powers of 1024 (``GiB``), rates and FLOPs in powers of 1000, as the field does.
"""

from __future__ import annotations

import math
import re
from typing import Final

from shardstage.errors import ConfigError

__all__ = [
    "DTYPE_BYTES",
    "GIB",
    "KIB",
    "MIB",
    "dtype_bytes",
    "format_bytes",
    "format_bytes_per_s",
    "format_count",
    "format_flops",
    "format_flops_per_s",
    "format_ratio",
    "format_s",
    "parse_bytes",
]

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3

DTYPE_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?)[bB]?\s*")


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a dtype named as torch names it, such as ``"bfloat16"``."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def parse_bytes(text: str) -> int:
    """Bytes in ``"512"``, ``"80GiB"`` (powers of 1024) or ``"80GB"`` (powers of 1000)."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{text!r} is not an amount of memory", hint='"80GiB", "512MB" or a number of bytes'
        )
    number, prefix, binary = match.groups()
    power = _DECIMAL.index(prefix.replace("K", "k"))
    return round(float(number) * math.pow(1024 if binary else 1000, power))


def format_bytes(num_bytes: float) -> str:
    """``1536`` → ``"1.50 KiB"``."""
    value, power = _scaled(num_bytes, 1024, len(_BINARY) - 1)
    return f"{value:.0f} B" if power == 0 else f"{_three_digits(value)} {_BINARY[power]}"


def format_s(seconds: float) -> str:
    """``0.00123`` → ``"1.23 ms"``; from two minutes on, minutes and hours."""
    if not math.isfinite(seconds):
        return str(seconds)
    if abs(seconds) >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if abs(seconds) >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return "0 s" if seconds == 0 else f"{_three_digits(seconds / 1e-9)} ns"


def format_flops(flops: float) -> str:
    """``3.2e12`` → ``"3.20 TFLOP"``."""
    return f"{_decimal(flops)}FLOP"


def format_flops_per_s(flops_per_s: float) -> str:
    """``3.2e12`` → ``"3.20 TFLOP/s"``."""
    return f"{_decimal(flops_per_s)}FLOP/s"


def format_bytes_per_s(bytes_per_s: float) -> str:
    """``4.5e11`` → ``"450 GB/s"`` (powers of 1000, as networks are sold)."""
    return f"{_decimal(bytes_per_s)}B/s"


def format_count(count: float) -> str:
    """``8_030_000_000`` → ``"8.03 G"``; small counts stay whole."""
    return f"{count:.0f}" if abs(count) < 1000 else _decimal(count).rstrip()


def format_dollars(dollars: float) -> str:
    """``0.000285`` → ``"$0.000285"``, ``1234.5`` → ``"$1,234.50"``: at least three digits that count."""
    decimals = 2 if dollars <= 0 else max(2, 2 - math.floor(math.log10(dollars)))
    return f"${dollars:,.{decimals}f}"


def format_ratio(ratio: float) -> str:
    """``0.1234`` → ``"12.3 %"``."""
    return f"{100 * ratio:.1f} %"


def _decimal(value: float) -> str:
    scaled, power = _scaled(value, 1000, len(_DECIMAL) - 1)
    return f"{_three_digits(scaled)} {_DECIMAL[power]}"


def _scaled(value: float, base: int, max_power: int) -> tuple[float, int]:
    power = 0
    while power < max_power and abs(value) >= base:
        value, power = value / base, power + 1
    return value, power


def _three_digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
