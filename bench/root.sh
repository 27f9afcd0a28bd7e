#!/bin/sh
# Makes the benchmark's root file system from Debian packages and our own programs:
#   target/guests/bench-root/        the tree, used natively by chroot
#   target/guests/initramfs-bench.cpio   the same tree for guests
# The same files run everywhere. No package is installed and no privilege is needed.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# lib.sh finds the repository from $0, which lies as deep as its own directory.
. "$here/../guests/lib.sh"

PACKAGES='libc6 libssl3 zlib1g libexpat1 openssl gzip libpython3.11-minimal python3.11-minimal'
PROGRAMS='dhrystone whetstone monte_carlo kernel_ops memory elapsed words nothing'

mkdir -p "$GUESTS"
private_apt
root=$GUESTS/bench-root
new=$root.new
rm -rf "$new"
mkdir -p "$new/bench" "$new/bin" "$new/proc" "$new/sys" "$new/dev" "$new/tmp"
for package in $PACKAGES; do
    version=$(newest_version "$package" "$SUITE(-updates|-security)?/")
    [ -n "$version" ] || die "the archive has no $package: remove $GUESTS/apt and try again."
    tree=$(unpack_package "$package" "$version")
    (cd "$tree" && tar -cf - --exclude=./.complete --exclude=./usr/share/doc --exclude=./usr/share/man \
        --exclude=./usr/share/locale --exclude=./usr/share/lintian --exclude=gconv .) | tar -xf - -C "$new"
done
version=$(newest_version busybox-static "$SUITE(-updates|-security)?/")
cp "$(unpack_package busybox-static "$version")/bin/busybox" "$new/bin/busybox"
ln -s busybox "$new/bin/sh"
for program in $PROGRAMS; do
    gcc -O2 -Wall -static -o "$new/bench/$program" "$here/programs/$program.c" -lm ||
        die "bench/programs/$program.c does not compile: install gcc and libc6-dev."
done
cp "$here/programs/mix.py" "$here/suite.sh" "$new/bench/"
cp "$here/init.sh" "$new/init"
chmod 755 "$new/init" "$new/bench/suite.sh"
rm -rf "$root"
mv "$new" "$root"
python3 "$HOSPES_ROOT/guests/newc.py" "$GUESTS/initramfs-bench.cpio" "tree:/:$root"

# User-Mode Linux, a peer where it runs. The package need not be installed.
version=$(newest_version user-mode-linux "$SUITE(-updates|-security)?/")
if [ -n "$version" ]; then
    replace_link "$(unpack_package user-mode-linux "$version")/usr/bin/linux.uml" "$GUESTS/linux-uml"
fi
say "bench-root is $(du -sm "$root" | cut -f1) MB"
