#!/bin/sh
# Makes the soak's root file system: Debian's own programs with everything they depend on, and our self-checking programs.
#   target/guests/soak-root/             the tree, used on this machine for the expected results
#   target/guests/initramfs-soak.cpio    the same tree for the guest
# The packages are unpacked, not installed: no privilege is needed. Packages are cached by version.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# lib.sh finds the repository from $0, which lies as deep as its own directory.
. "$here/../guests/lib.sh"

PACKAGES='busybox-static openssl python3-minimal gdb-minimal luajit stress-ng gcc libc6-dev make'

mkdir -p "$GUESTS/packages/archives/partial"
private_apt
say "fetching the soak's Debian packages"
# shellcheck disable=SC2086
apt-get -c "$APT_CONF" -qq -y --no-install-recommends --download-only -o Dir::Cache::archives="$GUESTS/packages/archives" \
    install $PACKAGES >"$GUESTS/soak-root.log" 2>&1 || {
    tail -n 5 "$GUESTS/soak-root.log" >&2
    die "the packages could not be fetched (see $GUESTS/soak-root.log): remove $GUESTS/apt and try again."
}
# shellcheck disable=SC2086
wanted=$(apt-get -c "$APT_CONF" -qq -y --no-install-recommends -s install $PACKAGES |
    sed -n 's/^Inst \([^ ]*\) (\([^ ]*\) .*/\1_\2/p' | sed 's/:/%3a/g')

root=$GUESTS/soak-root
key=$(printf '%s\n' "$wanted" | cat - "$0" "$here"/programs/* "$here"/*.sh | sha256sum | cut -c1-16)
if [ -f "$root/.key" ] && [ "$(cat "$root/.key")" = "$key" ] && [ -f "$GUESTS/initramfs-soak.cpio" ]; then
    say "soak-root is up to date"
    exit 0
fi

new=$root.new
rm -rf "$new"
# One tree for programs and libraries, as Debian has it once it is installed.
mkdir -p "$new/soak" "$new/usr/bin" "$new/usr/sbin" "$new/usr/lib" "$new/usr/lib64" "$new/proc" "$new/sys" "$new/dev" "$new/tmp" "$new/etc"
for directory in bin sbin lib lib64; do ln -s "usr/$directory" "$new/$directory"; done
say "unpacking $(printf '%s\n' "$wanted" | wc -l) packages"
for package in $wanted; do
    dpkg --fsys-tarfile "$GUESTS/packages/archives/$package"_*.deb | tar -xf - --keep-directory-symlink -C "$new" \
        --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale --exclude=./usr/share/X11 \
        --exclude=gconv --exclude=lto1 --exclude=lto-dump-12 --exclude='lib*san.*' --exclude='*-lto-dump-12' --exclude=plugin || die "package $package could not be unpacked: remove $GUESTS/packages/archives and try again."
done
ln -s busybox "$new/usr/bin/sh"

# compile OUTPUT SOURCE FLAGS...
compile() {
    output=$1 source=$2
    shift 2
    gcc -Wall -static -o "$new/soak/$output" "$here/programs/$source" "$@" -lm ||
        die "soak/programs/$source does not compile with $*: run guests/install.sh soak."
}
say "compiling the self-checking programs"
compile check64-O0 selfcheck.c -m64 -O0
compile check64-O2 selfcheck.c -m64 -O2
compile check64-O3 selfcheck.c -m64 -O3
compile check32-O0 selfcheck.c -m32 -O0
compile check32-x87 selfcheck.c -m32 -O2 -mfpmath=387 -mno-sse2
compile check32-sse selfcheck.c -m32 -O2 -msse2 -mfpmath=sse
compile threads64 threads.c -m64 -O2 -pthread
compile threads32 threads.c -m32 -O2 -pthread
compile clock clock.c -O2
compile spaces spaces.c -O2 -pthread
compile forks forks.c -O2
compile large large.c -O2
compile debuggee debuggee.c -g -O0 -no-pie
(cd "$here/programs" && GOCACHE=$GUESTS/go-cache GOFLAGS=-mod=mod CGO_ENABLED=0 GO111MODULE=off \
    go build -o "$new/soak/parallel" parallel.go) || die "soak/programs/parallel.go does not compile: run guests/install.sh soak."
cp "$here"/programs/*.c "$here/programs/objects.mk" "$here/programs/jit.lua" "$here/programs/debug.gdb" "$here/programs/check.py" "$here/tasks.sh" "$new/soak/"
cp "$here/init.sh" "$new/init"
chmod 755 "$new/init" "$new/soak/tasks.sh"
rm -rf "$root"
mv "$new" "$root"
python3 "$HOSPES_ROOT/guests/newc.py" "$GUESTS/initramfs-soak.cpio" "tree:/:$root"
printf '%s\n' "$key" >"$root/.key"
say "soak-root is $(du -sm "$root" | cut -f1) MB"
