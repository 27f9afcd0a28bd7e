"""The rows of the benchmark and the bars that they are held against: the one place where both are written down.

A row's name never changes, since results of different days are compared by it.
"""

import dataclasses

SYSTEMS = ("native", "tcg", "uml", "hospes")
HIGHER, LOWER = "higher", "lower"

# (row, fio's --rw, block size, depth, what is counted)
FIO = (
    ("fio_seq_read", "read", "1M", 4, "MiB/s"),
    ("fio_seq_write", "write", "1M", 4, "MiB/s"),
    ("fio_rand_read_qd1", "randread", "4k", 1, "IOPS"),
    ("fio_rand_write_qd1", "randwrite", "4k", 1, "IOPS"),
    ("fio_rand_read_qd32", "randread", "4k", 32, "IOPS"),
    ("fio_rand_write_qd32", "randwrite", "4k", 32, "IOPS"),
)
NETWORK = ("iperf_to_guest", "iperf_from_guest", "ab", "ping")

# By the suite's workers, one vCPU: name -> (unit, which is better).
SUITE = {
    "dhrystone": ("DMIPS", HIGHER),
    "whetstone": ("MWIPS", HIGHER),
    "monte_carlo": ("histories/s", HIGHER),
    "openssl_sha256": ("MB/s", HIGHER),
    "openssl_aes256gcm": ("MB/s", HIGHER),
    "openssl_rsa2048": ("sign/s", HIGHER),
    "gzip9": ("s", LOWER),
    "shell_loop": ("s", LOWER),
    "python_mix": ("s", LOWER),
    "getppid": ("/s", HIGHER),
    "pipe": ("round trips/s", HIGHER),
    "context_switch": ("round trips/s", HIGHER),
    "fork_exit": ("/s", HIGHER),
    "fork_exec": ("/s", HIGHER),
    "page_fault": ("/s", HIGHER),
    "mmap_unmap": ("/s", HIGHER),
    "signal": ("/s", HIGHER),
    "tmpfs_files": ("/s", HIGHER),
    "mem_copy": ("GB/s", HIGHER),
    "mem_triad": ("GB/s", HIGHER),
    "chase_64m": ("Mloads/s", HIGHER),
    "shell_500_forks": ("s", LOWER),
    "compile_c": ("s", LOWER),
}
# Where native may use vector instructions that the guest's CPUID does not show: OpenSSL, and the string functions of the C library.
# Whetstone, the Monte-Carlo loop, the triad and the chase have nothing that looks for more than AVX2 and FMA.
LEVELLED = (
    "dhrystone", "openssl_sha256", "openssl_aes256gcm", "openssl_rsa2048", "gzip9", "shell_loop", "python_mix", "mem_copy", "compile_c",
)
LEVEL_SUFFIX = "_native_level"
FAIR = ("fair_one_guest", "fair_five_guests")
VCPUS = {
    "dhrystone_2vcpu_ratio": ("times one copy", HIGHER),
    "fair_one_guest": ("slowest/fastest", HIGHER),
    "fair_one_guest_total": ("DMIPS", HIGHER),
    "fair_five_guests": ("slowest/fastest", HIGHER),
    "fair_five_guests_total": ("DMIPS", HIGHER),
    "idle_beside_busy": ("% of a CPU", LOWER),
}
# name -> vCPUs, each of them busy while it is measured; none: idle after the boot.
MEMORY = {"rss_overhead": None, "rss_overhead_2vcpu": 2, "rss_overhead_16vcpu": 16}
DEVICES = ("boot_to_login", *(row[0] for row in FIO), *NETWORK)
ROWS = {
    "boot_to_user": ("s", LOWER),
    **SUITE,
    **{name + LEVEL_SUFFIX: SUITE[name] for name in LEVELLED},
    **VCPUS,
    **{name: ("MB", LOWER) for name in MEMORY},
    "boot_to_login": ("s", LOWER),
    **{row[0]: (row[4], HIGHER) for row in FIO},
    "iperf_to_guest": ("Gbit/s", HIGHER),
    "iperf_from_guest": ("Gbit/s", HIGHER),
    "ab": ("requests/s", HIGHER),
    "ping": ("ms", LOWER),
}
PROGRAMS = ("shell_500_forks", "compile_c")
# Names for several rows. `first` is what takes less than ten minutes when quick, and all that a quick run measures unasked.
GROUPS = {
    "all": tuple(ROWS),
    "first": ("boot_to_user", *(name for name in SUITE if name not in PROGRAMS), "rss_overhead"),
    "level": tuple(name + LEVEL_SUFFIX for name in LEVELLED),
    "programs": PROGRAMS,
    "vcpus": (*VCPUS, *(name for name in MEMORY if name != "rss_overhead")),
    "disks": tuple(row[0] for row in FIO),
    "network": NETWORK,
}


def measured_as(row):
    """The row whose measurement gives this one's figures: itself, or the one without a suffix."""
    for suffix in (LEVEL_SUFFIX, "_total"):
        if row.endswith(suffix):
            return row.removesuffix(suffix)
    return row


@dataclasses.dataclass(frozen=True)
class Bar:
    """What Hospes has to reach in a row: `factor` times as good as another system, or a value of its own.

    `against` is a system, "direct_off" for Hospes without direct execution, or "least" and "most" for a value that is compared with
    `factor` itself.
    """

    row: str
    against: str
    factor: float


def _held(rows, against, factor):
    return (Bar(row, against, factor) for row in rows)


# At the guest's CPUID level, where that makes a difference.
CPU_BOUND = (
    "dhrystone", "whetstone", "monte_carlo", "openssl_sha256", "openssl_aes256gcm", "openssl_rsa2048", "gzip9", "python_mix",
)
COMPUTE = (*CPU_BOUND, "shell_loop")
OPERATIONS = ("pipe", "context_switch", "fork_exit", "fork_exec", "mmap_unmap", "tmpfs_files")


def at_level(row):
    return row + LEVEL_SUFFIX if row in LEVELLED else row


BARS = (
    Bar("boot_to_user", "tcg", 3),
    *_held(map(at_level, CPU_BOUND), "native", 0.94),
    *_held(COMPUTE, "tcg", 1.3),
    *_held(("mem_copy", "mem_triad", "chase_64m"), "native", 0.9),
    *_held(("getppid", "page_fault", "signal"), "tcg", 2),
    *_held(OPERATIONS, "tcg", 4),
    *_held(OPERATIONS, "uml", 2),
    *_held(("shell_500_forks", "compile_c"), "tcg", 5),
    *_held(SUITE, "direct_off", 0.97),
    Bar("dhrystone_2vcpu_ratio", "native", 0.95),
    *_held(FAIR, "least", 0.9),
    *_held((row + "_total" for row in FAIR), "native", 0.94),
    Bar("idle_beside_busy", "most", 1),
    Bar("rss_overhead", "most", 64),
    Bar("rss_overhead_2vcpu", "most", 96),
    Bar("rss_overhead_16vcpu", "most", 160),
    Bar("boot_to_login", "tcg", 5),
    *_held(("fio_seq_read", "fio_seq_write"), "native", 0.9),
    *_held((row[0] for row in FIO if row[0].startswith("fio_rand")), "tcg", 3),
    *_held(("iperf_to_guest", "iperf_from_guest", "ab"), "tcg", 8),
)
# Geometric means over rows: how fast against native, at least.
MEANS = (
    ("CPU-bound rows at the guest's CPUID level", tuple(map(at_level, CPU_BOUND)), 0.97),
    # OpenSSL's RSA has vector instructions natively that no guest of the level x86-64-v3 has.
    ("compute rows but openssl_rsa2048", tuple(row for row in COMPUTE if row != "openssl_rsa2048"), 1 / 2.8),
)
