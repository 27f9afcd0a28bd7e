#!/bin/sh
# Makes the Debian images of this repository with the monitor's own command:
#
#   guests/debian.sh run     target/guests/debian/run.img: what `make run` boots
#   guests/debian.sh test    target/guests/debian/test.img: with fio, iperf3, nginx and more, for tests and the benchmark
#
# A test image is made anew when its recipe has changed. run.img holds what its guest wrote: it is never written over, and
# a new one comes only where it was removed (`make clean-guests` removes both).
set -eu
. "$(dirname -- "$0")/lib.sh"

hospes=${HOSPES:-${CARGO_TARGET_DIR:-$HOSPES_ROOT/target}/release/hospes}
[ -x "$hospes" ] || die "$hospes is not there: build it with cargo build --release."
mkdir -p "$GUESTS/debian"
directory=$(CDPATH='' cd -- "$GUESTS/debian" && pwd)

# recipe FILE...: a short key for what an image is made by: its options on standard input, its own scripts, those of all.
recipe() { cat - "$@" "$HOSPES_ROOT"/crates/debian/src/*.sh | sha256sum | cut -c1-16; }

# bootable NAME: whether all files that a guest boots from are there.
bootable() {
    for ending in img vmlinuz initrd cfg; do
        [ -f "$directory/$1.$ending" ] || return 1
    done
}

# image NAME OPTION...: makes it, and notes the recipe in $key.
image() {
    name=$1
    shift
    say "making $name.img from the archive, once: a minute or two"
    rm -f "$directory/$name.key"
    "$hospes" image debian --force --hostname "$name" "$@" "$directory/$name.img" >"$directory/$name.files"
    printf '%s\n' "$key" >"$directory/$name.key"
}

# run_image: the disk of `make run`, which stays whatever has become of its recipe.
run_image() {
    key=$(recipe </dev/null)
    if [ ! -f "$directory/run.img" ]; then
        image run
        return 0
    fi
    bootable run || die "beside $directory/run.img the kernel, initrd or configuration that boots it is missing: put it back, or move run.img away for a new disk."
    # The configuration has absolute paths, and the directory may have been moved.
    here=$(printf '%s\n' "$directory" | sed 's/["\\]/\\&/g; s/[&#\\]/\\&/g')
    sed -E 's#("|target=)/(\\.|[^"\\])*/run\.(img|vmlinuz|initrd)"#\1'"$here"'/run.\3"#' "$directory/run.cfg" >"$directory/run.cfg.new"
    if cmp -s "$directory/run.cfg.new" "$directory/run.cfg"; then rm "$directory/run.cfg.new"; else mv "$directory/run.cfg.new" "$directory/run.cfg"; fi
    if [ "$(cat "$directory/run.key" 2>/dev/null)" != "$key" ]; then
        say "run.img was made by an older recipe and stays as it is: \`make clean-guests\` has it made anew, without what its guest wrote"
    fi
}

# test_image: the disk under those of the tests, as the recipe is now.
test_image() {
    script=$HOSPES_ROOT/guests/debian-test.sh
    set -- --packages fio,iperf3,nginx-light,xenstore-utils,python3-minimal --run "$script"
    key=$(printf '%s\n' "$@" | recipe "$script")
    if bootable test && [ "$(cat "$directory/test.key" 2>/dev/null)" = "$key" ]; then
        say "test.img is up to date"
        return 0
    fi
    image test "$@"
}

# repository: one small package as an apt archive, for guests that install it from this machine.
repository() {
    private_apt
    version=$(newest_version hello "$SUITE(-updates|-security)?/")
    [ -n "$version" ] || die "the archive has no package hello: remove $GUESTS/apt and try again."
    mkdir -p "$directory/repository"
    [ -s "$directory/repository/Packages" ] || (
        cd "$directory/repository" &&
            apt-get -c "$APT_CONF" -qq download "hello=$version" >&2 &&
            dpkg-scanpackages --multiversion . >Packages.new 2>/dev/null &&
            mv Packages.new Packages
    ) || die "the package hello could not be fetched: remove $GUESTS/apt and try again."
}

[ $# -gt 0 ] || set -- run
for name; do
    case $name in
    run) run_image ;;
    test)
        test_image
        repository
        ;;
    *) die "unknown image '$name': say run or test." ;;
    esac
done
