#!/bin/sh
# Makes the Debian images of this repository with the monitor's own command:
#
#   guests/debian.sh run     target/guests/debian/run.img: what `make run` boots
#   guests/debian.sh test    target/guests/debian/test.img: with fio, iperf3, nginx and more, for tests and the benchmark
#
# An image that was made by the same recipe is kept; `make clean-guests` removes it.
set -eu
. "$(dirname -- "$0")/lib.sh"

hospes=${HOSPES:-${CARGO_TARGET_DIR:-$HOSPES_ROOT/target}/release/hospes}
[ -x "$hospes" ] || die "$hospes is not there: build it with cargo build --release."
directory=$GUESTS/debian
mkdir -p "$directory"

# image NAME OPTION...
image() {
    name=$1
    shift
    key=$(printf '%s\n' "$@" | cat - "$HOSPES_ROOT"/guests/debian-test.sh "$HOSPES_ROOT"/crates/debian/src/*.sh | sha256sum | cut -c1-16)
    if [ -f "$directory/$name.key" ] && [ "$(cat "$directory/$name.key")" = "$key" ] && [ -f "$directory/$name.cfg" ]; then
        say "$name.img is up to date"
        return 0
    fi
    say "making $name.img from the archive, once: a minute or two"
    rm -f "$directory/$name.key"
    "$hospes" image debian --force --hostname "$name" "$@" "$directory/$name.img" >"$directory/$name.files"
    printf '%s\n' "$key" >"$directory/$name.key"
}

# repository: one small package as an apt archive, for guests that install it from this machine.
repository() {
    private_apt
    version=$(newest_version hello "$SUITE(-updates|-security)?/")
    [ -n "$version" ] || die "the archive has no package hello: remove $GUESTS/apt and try again."
    mkdir -p "$directory/repository"
    [ -f "$directory/repository/Packages" ] || (
        cd "$directory/repository"
        apt-get -c "$APT_CONF" -qq download "hello=$version" >&2
        dpkg-scanpackages --multiversion . >Packages.new 2>/dev/null
        mv Packages.new Packages
    ) || die "the package hello could not be fetched: remove $GUESTS/apt and try again."
}

[ $# -gt 0 ] || set -- run
for name; do
    case $name in
    run) image run ;;
    test)
        image test --packages fio,iperf3,nginx-light,xenstore-utils,python3-minimal --run "$HOSPES_ROOT/guests/debian-test.sh"
        repository
        ;;
    *) die "unknown image '$name': say run or test." ;;
    esac
done
