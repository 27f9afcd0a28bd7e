#!/bin/sh
# Makes the benchmark's root file system from Debian packages and our own programs:
#   target/guests/bench-root/            the tree, used natively by chroot
#   target/guests/initramfs-bench.cpio   the same tree for guests
#   target/guests/initramfs-jobs.cpio    busybox and Dhrystone alone, for guests of which several run at once
# The same files run everywhere. No package is installed and no privilege is needed.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# lib.sh finds the repository from $0, which lies as deep as its own directory.
. "$here/../guests/lib.sh"

PACKAGES='libc6 libssl3 zlib1g libexpat1 openssl gzip libpython3.11-minimal python3.11-minimal'
# A C compiler, without what compiling and linking C does not use.
COMPILER='gcc-12 cpp-12 binutils-x86-64-linux-gnu libbinutils libctf0 libjansson4 libisl23 libmpc3 libmpfr6 libgmp10 libzstd1
    libgcc-12-dev libgcc-s1 libc6-dev linux-libc-dev libcrypt-dev'
PROGRAMS='dhrystone whetstone monte_carlo kernel_ops memory elapsed words nothing'

# add PACKAGE...: the files of packages, without documentation.
add() {
    for package; do
        version=$(newest_version "$package" "$SUITE(-updates|-security)?/")
        [ -n "$version" ] || die "the archive has no $package: remove $GUESTS/apt and try again."
        tree=$(unpack_package "$package" "$version")
        (cd "$tree" && tar -cf - --exclude=./.complete --exclude=./usr/share/doc --exclude=./usr/share/man \
            --exclude=./usr/share/locale --exclude=./usr/share/lintian --exclude=gconv .) | tar -xf - -C "$new"
    done
}

mkdir -p "$GUESTS"
private_apt
root=$GUESTS/bench-root
new=$root.new
rm -rf "$new"
mkdir -p "$new/bench" "$new/bin" "$new/proc" "$new/sys" "$new/dev" "$new/tmp"
# shellcheck disable=SC2086
add $COMPILER
find "$new" -name '*.a' ! -name libgcc.a ! -name libc_nonshared.a -delete
(
    cd "$new/usr/bin"
    rm -f -- *gold* *dwp* *gprof* *lto-dump* *gcov* *elfedit* *readelf* *objdump* *objcopy* *strip* *nm* *ranlib* *addr2line* *c++filt*
    ln -s gcc-12 gcc
    ln -s x86_64-linux-gnu-as as
    ln -s x86_64-linux-gnu-ld.bfd ld
    cd ../lib/gcc/x86_64-linux-gnu/12
    rm -rf lto1 g++-mapper-server plugin lto-wrapper lib*san*.so lib*san*.o
)
# shellcheck disable=SC2086
add $PACKAGES
version=$(newest_version busybox-static "$SUITE(-updates|-security)?/")
cp "$(unpack_package busybox-static "$version")/bin/busybox" "$new/bin/busybox"
ln -s busybox "$new/bin/sh"
for program in $PROGRAMS; do
    gcc -O2 -Wall -static -o "$new/bench/$program" "$here/programs/$program.c" -lm ||
        die "bench/programs/$program.c does not compile: install gcc and libc6-dev."
done
python3 "$here/programs/modules.py" "$new/bench/modules"
cp "$here/programs/mix.py" "$here/programs/forks.sh" "$here/programs/compile.sh" "$here/suite.sh" "$here/worker.sh" "$new/bench/"
cp "$here/init.sh" "$new/init"
chmod 755 "$new/init" "$new"/bench/*.sh
rm -rf "$root"
mv "$new" "$root"
python3 "$HOSPES_ROOT/guests/newc.py" "$GUESTS/initramfs-bench.cpio" "tree:/:$root"
python3 "$HOSPES_ROOT/guests/newc.py" "$GUESTS/initramfs-jobs.cpio" dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/bench \
    "file:/bin/busybox:0755:$root/bin/busybox" link:/bin/sh:busybox "file:/init:0755:$root/init" \
    "file:/bench/suite.sh:0755:$root/bench/suite.sh" "file:/bench/worker.sh:0755:$root/bench/worker.sh" \
    "file:/bench/dhrystone:0755:$root/bench/dhrystone"

# User-Mode Linux, a peer where it runs. The package need not be installed.
version=$(newest_version user-mode-linux "$SUITE(-updates|-security)?/")
if [ -n "$version" ]; then
    replace_link "$(unpack_package user-mode-linux "$version")/usr/bin/linux.uml" "$GUESTS/linux-uml"
fi
say "bench-root is $(du -sm "$root" | cut -f1) MB"
