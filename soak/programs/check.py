"""Interpreter work of many kinds; prints what it computes. Built-ins only, so that Debian's python3-minimal runs it."""

import gc
import itertools
import math
import re
import sys


def queens(size):
    return sum(
        1
        for columns in itertools.permutations(range(size))
        if len({column + row for row, column in enumerate(columns)}) == size
        and len({column - row for row, column in enumerate(columns)}) == size
    )


def generator_chain(count):
    stage = iter(range(count))
    for _ in range(10):
        stage = (value * 3 % 10007 for value in stage)
    return sum(stage)


def floats():
    values = [math.sin(i) * math.exp(-i / 50) + math.sqrt(i) + math.fmod(i * 1.1, 0.7) for i in range(2000)]
    # Rounded: the C library picks its variant of sin and exp by the processor's features.
    return [f"{value:.9f}" for value in (math.fsum(values), min(values), max(values), math.lgamma(7.5), math.atan2(1, -2))]


def texts():
    text = " ".join(f"{i:x}={i * i}" for i in range(5000))
    found = re.findall(r"([0-9a-f]+)=(\d*7\d*)", text)
    return len(found), found[-1], len(text.encode("utf-16")), "żółć-🦀".encode().decode("utf-8")


def exceptions(count):
    caught = 0
    for i in range(count):
        try:
            if i % 3 == 0:
                raise ValueError(i)
            _ = 1 // (i % 2)
        except (ValueError, ZeroDivisionError):
            caught += 1
    return caught


class Ring:
    """Garbage that only the cycle collector frees."""

    def __init__(self):
        self.me = self


def cycles(count):
    gc.collect()
    for _ in range(count):
        Ring()
    return gc.collect() >= 0


def deep(depth):
    return 0 if depth == 0 else 1 + deep(depth - 1)


sys.setrecursionlimit(5000)
print("queens", queens(7))
print("generators", generator_chain(20_000))
print("floats", floats())
print("texts", texts())
print("exceptions", exceptions(30_000))
print("cycles", cycles(20_000))
print("deep", deep(3000))
print("power", pow(3, 10**400, 10**60 + 7))
print("digits", sum(map(int, str(2**9000))))
print("sorted", hash(tuple(sorted((i * 7919) % 100003 for i in range(50_000)))))
