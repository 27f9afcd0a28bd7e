#!/bin/sh
# Makes the small initial root file systems:
#   target/guests/initramfs-busybox.cpio   busybox and guests/init.sh, which does what the kernel command line asks
#   target/guests/initramfs-net.cpio       the same with the network driver of the kernel vmlinuz-cloud and a DHCP client, where that kernel is there
#   target/guests/initramfs-disk.cpio      the same with the disk driver of that kernel
#   target/guests/initramfs-devices.cpio   the same with both drivers
#   target/guests/initramfs-tricks.cpio    the same with tests/programs/tricks.c, which tries what programs do not do
#   target/guests/initramfs-init.cpio      one static program that prints a mark and powers off: measures boot time
set -eu
. "$(dirname -- "$0")/lib.sh"

here=$HOSPES_ROOT/guests
have python3 || install_packages python3
have gcc || install_packages gcc libc6-dev
mkdir -p "$GUESTS"

private_apt
version=$(newest_version busybox-static "$SUITE(-updates|-security)?/")
[ -n "$version" ] || die "the archive has no busybox-static: remove $GUESTS/apt and try again."
busybox=$(unpack_package busybox-static "$version")/bin/busybox

python3 "$here/newc.py" "$GUESTS/initramfs-busybox.cpio" \
    dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/root dir:/etc dir:/run dir:/mnt \
    "file:/bin/busybox:0755:$busybox" link:/bin/sh:busybox "file:/init:0755:$here/init.sh"

cloud=$(readlink -f "$GUESTS/vmlinuz-cloud" || :)
netfront=$(find "${cloud%/boot/*}/lib/modules" -name xen-netfront.ko 2>/dev/null | head -n 1)
if [ -n "$netfront" ]; then
    python3 "$here/newc.py" "$GUESTS/initramfs-net.cpio" \
        dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/root dir:/etc dir:/run dir:/mnt \
        "file:/bin/busybox:0755:$busybox" link:/bin/sh:busybox "file:/init:0755:$here/init.sh" \
        "file:/etc/udhcpc/default.script:0755:$here/udhcpc.sh" "file:/lib/modules/xen-netfront.ko:0644:$netfront"
fi

blkfront=$(find "${cloud%/boot/*}/lib/modules" -name xen-blkfront.ko 2>/dev/null | head -n 1)
if [ -n "$blkfront" ]; then
    python3 "$here/newc.py" "$GUESTS/initramfs-disk.cpio" \
        dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/root dir:/etc dir:/run dir:/mnt \
        "file:/bin/busybox:0755:$busybox" link:/bin/sh:busybox "file:/init:0755:$here/init.sh" \
        "file:/lib/modules/xen-blkfront.ko:0644:$blkfront"
fi

if [ -n "$netfront" ] && [ -n "$blkfront" ]; then
    python3 "$here/newc.py" "$GUESTS/initramfs-devices.cpio" \
        dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/root dir:/etc dir:/run dir:/mnt \
        "file:/bin/busybox:0755:$busybox" link:/bin/sh:busybox "file:/init:0755:$here/init.sh" \
        "file:/lib/modules/xen-netfront.ko:0644:$netfront" "file:/lib/modules/xen-blkfront.ko:0644:$blkfront"
fi

gcc -O1 -Wall -static -mno-red-zone -mfsgsbase -mavx -o "$GUESTS/tricks" "$here/../tests/programs/tricks.c" ||
    die "tests/programs/tricks.c does not compile: install gcc and libc6-dev."
python3 "$here/newc.py" "$GUESTS/initramfs-tricks.cpio" \
    dir:/bin dir:/dev dir:/proc dir:/sys dir:/tmp dir:/root dir:/etc dir:/run dir:/mnt \
    "file:/bin/busybox:0755:$busybox" link:/bin/sh:busybox "file:/init:0755:$here/init.sh" "file:/bin/tricks:0755:$GUESTS/tricks"

gcc -O2 -static -o "$GUESTS/init-mark" "$here/init_mark.c" ||
    die "init_mark.c does not compile: install gcc and libc6-dev."
python3 "$here/newc.py" "$GUESTS/initramfs-init.cpio" dir:/dev "file:/init:0755:$GUESTS/init-mark"
say "initramfs-busybox.cpio has busybox-static $version; initramfs-init.cpio is ready"
