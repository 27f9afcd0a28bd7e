"""A mix of what interpreters do: calls, attributes, dictionaries, lists, strings, floats, big integers, sorting.

Uses built-ins only, so that Debian's python3-minimal runs it. Exits with 1 when a result is wrong.
"""


class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def plus(self, other):
        return Point(self.x + other.x, self.y + other.y)


def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def sieve(limit):
    flags = bytearray([1]) * (limit + 1)
    flags[0:2] = b"\0\0"
    for number in range(2, int(limit**0.5) + 1):
        if flags[number]:
            flags[number * number :: number] = bytes(len(range(number * number, limit + 1, number)))
    return sum(flags)


def words(count):
    seen, state = {}, 1
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2147483648
        key = "w" + str(state % 997)
        seen[key] = seen.get(key, 0) + 1
    return len(seen), sum(seen.values())


def walk(steps):
    place, step = Point(0, 0), Point(1, 2)
    for _ in range(steps):
        place = place.plus(step)
    return place.x + place.y


def integrate(steps):
    width = 1.0 / steps
    return sum(4.0 / (1.0 + ((i + 0.5) * width) ** 2) for i in range(steps)) * width


def ordered(count):
    items, state = [], 7
    for _ in range(count):
        state = (state * 16807) % 2147483647
        items.append((state % 1000, str(state)))
    items.sort()
    return all(items[i] <= items[i + 1] for i in range(count - 1))


results = (
    fibonacci(24) == 46_368,
    sieve(1_000_000) == 78_498,
    words(150_000) == (997, 150_000),
    walk(150_000) == 450_000,
    abs(integrate(250_000) - 3.141592653589793) < 1e-9,
    ordered(60_000),
    3**20_000 % 1_000_007 == 184940,
)
raise SystemExit(0 if all(results) else 1)
