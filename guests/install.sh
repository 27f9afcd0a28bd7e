#!/bin/sh
# Installs on this machine what a target of the Makefile needs and does not find.
#
#   guests/install.sh build|run|test|commands|net|debian|bench|soak...
set -eu
. "$(dirname -- "$0")/lib.sh"

PATH=$PATH:$HOME/.cargo/bin
MINIMUM_RUST=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$HOSPES_ROOT/Cargo.toml" | head -n 1)

# new_enough: is there a cargo at all, and is its rustc at least MINIMUM_RUST?
new_enough() {
    have cargo && have rustc || return 1
    found=$(rustc --version 2>/dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$MINIMUM_RUST" "$found" | sort -V | head -n 1)" = "$MINIMUM_RUST" ]
}

rust() {
    new_enough && return 0
    say "no Rust $MINIMUM_RUST or newer here: taking the archive's rustc-web and cargo-web"
    if installed rustc || installed cargo; then
        die "the installed packages rustc and cargo are older than $MINIMUM_RUST and exclude rustc-web: remove them (apt-get remove rustc cargo), or install rustup."
    fi
    # Security updates bring newer ones: the lists have to be of today.
    as_root apt-get -qq update >&2 || say "the package lists could not be refreshed: going on with the old ones"
    # One that is installed may be too old.
    install_newest rustc-web cargo-web
    new_enough || die "the archive's rustc-web is $(rustc --version | cut -d' ' -f2), needed is $MINIMUM_RUST: add bookworm-security to the apt sources (or install rustup) and try again."
}

build() {
    have gcc || install_packages gcc libc6-dev
    [ -f /usr/include/stdio.h ] || install_packages libc6-dev
    have python3 || install_packages python3
    have git || install_packages git
    [ -e /etc/ssl/certs/ca-certificates.crt ] || install_packages ca-certificates
    rust
}

# Lints and formatting come with rustup, or as packages beside rustc-web.
lints() {
    cargo fmt --version >/dev/null 2>&1 || { installed rustc-web && install_packages rustfmt-web; } ||
        die "cargo fmt is missing: rustup component add rustfmt."
    cargo clippy --version >/dev/null 2>&1 || { installed rustc-web && install_packages rust-web-clippy; } ||
        die "cargo clippy is missing: rustup component add clippy."
}

# What NAT networks need, which only root can make.
nat_tools() {
    install_packages iproute2 nftables dnsmasq-base
}

# What makes disk images, and what their networks need: a NAT network as root, a user-mode network otherwise.
image_tools() {
    install_packages mmdebstrap e2fsprogs
    if [ "$(id -u)" = 0 ]; then
        nat_tools
    else
        install_packages uidmap passt
    fi
}

[ $# -gt 0 ] || set -- build
for purpose; do
    build
    case $purpose in
    build) ;;
    test)
        lints
        # The oracle of the tests of disk images.
        have qemu-img || install_packages qemu-utils
        # Reads the completion script that is made for it.
        have fish || install_packages fish
        # The clients of the tests of the store.
        have xenstore-ls || install_packages xenstore-utils
        # The tests that make networks in namespaces of their own, which needs root.
        [ "$(id -u)" != 0 ] || nat_tools
        ;;
    run) image_tools ;;
    debian)
        image_tools
        # fio runs in the guest; here are the other ends, and an apt archive for the guest.
        install_packages qemu-utils iperf3 apache2-utils iputils-ping dpkg-dev xenstore-utils
        ;;
    bench)
        image_tools
        have qemu-system-x86_64 || install_packages qemu-system-x86
        install_packages qemu-utils iperf3 apache2-utils iputils-ping
        ;;
    commands)
        nat_tools
        install_packages util-linux xenstore-utils
        ;;
    net)
        nat_tools
        install_packages passt util-linux busybox iputils-ping
        ;;
    soak)
        have go || install_packages golang-go
        # 32-bit self-checking programs need the 32-bit C library.
        [ -e /usr/include/gnu/stubs-32.h ] || [ -e /usr/include/x86_64-linux-gnu/gnu/stubs-32.h ] ||
            install_packages gcc-multilib libc6-dev-i386
        ;;
    *) die "unknown purpose '$purpose': say build, run, test, commands, net, debian, bench or soak." ;;
    esac
done
