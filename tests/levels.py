"""Guests whose processor has AVX-512, and guests whose processor has not although the host's has.

What programs of the guest come to is held against the same programs on the host.
"""

import os
import pathlib
import re
import subprocess
import tempfile

import newc
import vm

PROGRAM = pathlib.Path(__file__).resolve().parent / "programs" / "avx512.c"
LEVEL = 'cpu_level="x86-64-v4"'
FLAGS = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
EXTENSIONS = {
    "avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq", "avx512_bf16", "gfni", "vaes",
    "vpclmulqdq",
}
BOOT_S = 120
END_S = 120

# RSA with AVX-512 IFMA, SHA-2 and block ciphers with vectors, each with a result that does not depend on the day.
OPENSSL = (
    "openssl dgst -sha256 -sign /check/key /check/data | openssl dgst -sha256",
    "openssl enc -aes-256-ctr -K 00112233 -iv 00 -in /check/data 2>/dev/null | openssl dgst -sha512",
    "openssl enc -chacha20 -K 00112233 -iv 00 -in /check/data 2>/dev/null | openssl dgst -sha1",
)


def host_flags():
    text = pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii")
    return set(re.search(r"^flags\s*:(.*)$", text, re.M).group(1).split())


def run(*argv):
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def compiled(directory):
    """The test program, for guests and for the host."""
    path = os.path.join(directory, "avx512")
    try:
        run("gcc", "-O2", "-static", "-o", path, str(PROGRAM))
    except (OSError, subprocess.CalledProcessError) as error:
        raise vm.GuestError(f"{PROGRAM.name} does not compile ({error}): install gcc and libc6-dev") from None
    return path


def libraries(program):
    """What the dynamic linker needs for a program of the host, with the linker itself."""
    return sorted(set(re.findall(r"(/\S+) \(0x", run("ldd", program))))


def ramdisk(directory, files):
    """The busybox guest with more files, which the kernel unpacks from a second archive behind the first."""
    path = os.path.join(directory, "initramfs")
    with open(path, "wb") as out:
        out.write((vm.GUESTS / "initramfs-busybox.cpio").read_bytes())
        out.write(b"\0" * (-out.tell() % 512))
        archive = newc.Archive(out)
        for place, source in files:
            archive.file(place, 0o755, source)
        archive.finish()
    return path


def ask(guest, command, timeout=END_S):
    """What a command of the guest's shell prints."""
    guest.send(f"echo BEG''IN; {command}; echo EN''D\n")
    guest.wait_for(r"(?m)^BEGIN\n", timeout)
    begin = guest.position
    end = guest.wait_for(r"(?m)^END\n", timeout)
    return guest.console[begin : end.start()]


def boot(bench, directory, files, settings):
    spec = vm.Spec(name="level", command_line="quiet hospes.do=shell", memory_mb=512, vcpus=2, settings=settings)
    spec.ramdisk = ramdisk(directory, files)
    guest = bench.boot(**vars(spec))
    guest.wait_for("guest# ", BOOT_S)
    return guest


def check(condition, sentence):
    if not condition:
        raise vm.GuestError(sentence)


def guest_flags(guest):
    return set(ask(guest, "grep -m 1 ^flags /proc/cpuinfo").split())


def has_avx512(bench, direct):
    """The level shows the host's flags, and programs that use them come to the host's results."""
    if not FLAGS <= host_flags():
        return refuses_without_avx512(bench)
    with tempfile.TemporaryDirectory(prefix="hospes-level-") as directory:
        program = compiled(directory)
        with boot(bench, directory, [("/check/avx512", program)], (LEVEL, f"engine_direct={direct}")) as guest:
            flags = guest_flags(guest)
            want = FLAGS | EXTENSIONS & host_flags()
            check(want <= flags, f"the guest lacks {sorted(want - flags)}")
            check("EVEX is executed" in ask(guest, "/check/avx512 probe"), "the guest refuses an EVEX instruction")
            got = ask(guest, "/check/avx512")
            check(got == run(program), f"the guest computes\n{got}and the host\n{run(program)}")
            guest.send("poweroff -f\n")
            guest.wait(END_S)
    return None


def refuses_without_avx512(bench):
    """A host without AVX-512 says which bit it lacks and what to do."""
    with bench.boot(name="level", settings=(LEVEL,)) as guest:
        status = guest.wait(END_S)
    check(status == 1, f"the exit status is {status} instead of 1")
    check("lacks AVX512" in guest.errors and "x86-64-v3" in guest.errors, f"it says: {guest.errors}")


def has_openssl_with_avx512(bench):
    """OpenSSL and the C library, which choose their code by CPUID, come to the host's results."""
    if not FLAGS <= host_flags():
        return
    with tempfile.TemporaryDirectory(prefix="hospes-level-") as directory:
        key, data = os.path.join(directory, "key"), os.path.join(directory, "data")
        run("openssl", "genrsa", "-out", key, "2048")
        pathlib.Path(data).write_bytes(bytes(n * n // 7 & 255 for n in range(300_001)))
        openssl = run("sh", "-c", "command -v openssl").strip()
        files = [("/check/key", key), ("/check/data", data), ("/usr/bin/openssl", openssl)]
        files += [(path, path) for path in libraries(openssl)]
        with boot(bench, directory, files, (LEVEL,)) as guest:
            ask(guest, "export OPENSSL_CONF=/dev/null PATH=$PATH:/usr/bin LD_LIBRARY_PATH=/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu")
            for command in OPENSSL:
                here = command.replace("/check/key", key).replace("/check/data", data)
                got, want = ask(guest, command), run("sh", "-c", here)
                check(got == want, f"`{command}` says\n{got}and on the host\n{want}")
            for algorithm in ("rsa2048", "-evp aes-256-gcm", "-evp chacha20-poly1305"):
                status = ask(guest, f"openssl speed -elapsed -seconds 1 {algorithm} >/dev/null 2>&1; echo status $?")
                check("status 0" in status, f"openssl speed {algorithm}: {status}")
            guest.send("poweroff -f\n")
            guest.wait(END_S)


def hides_features(bench):
    """Features that the configuration hides are not shown, with what depends on them; others stay."""
    with tempfile.TemporaryDirectory(prefix="hospes-level-") as directory:
        with boot(bench, directory, [], ('cpuid="host,bmi2=0,avx2=0"',)) as guest:
            flags = guest_flags(guest)
            check(not flags & {"bmi2", "avx2", "avx512f"}, f"the guest shows {sorted(flags)}")
            check({"bmi1", "avx", "sse4_2"} <= flags, f"the guest shows only {sorted(flags)}")
            guest.send("poweroff -f\n")
            guest.wait(END_S)


def has_no_avx512(bench):
    """Without the key a guest sees no AVX-512, and the translator refuses its instructions, whatever the host has."""
    with tempfile.TemporaryDirectory(prefix="hospes-level-") as directory:
        with boot(bench, directory, [("/check/avx512", compiled(directory))], ("engine_direct=0",)) as guest:
            found = {flag for flag in guest_flags(guest) if flag.startswith("avx512")}
            check(not found, f"the guest shows {sorted(found)}")
            said = ask(guest, "/check/avx512 probe")
            check("EVEX is refused" in said, f"an EVEX instruction gives: {said}")
            guest.send("poweroff -f\n")
            guest.wait(END_S)
