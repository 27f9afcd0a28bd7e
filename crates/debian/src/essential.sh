#!/bin/sh
# mmdebstrap's essential hook, before the kernel is configured: what goes into the initial root file system.
# $1 is the new root.
set -eu
install -d "$1/etc/tiny-initramfs/hooks.end"
# Front ends of Xen first; the same image starts under QEMU, where its disks and network cards are virtio's.
cat >"$1/etc/tiny-initramfs/tiny-initramfs.conf" <<'END'
AUTO_MODULES=no
INCLUDE_MODULES=ext4,xen_blkfront,xen_netfront,virtio_pci,virtio_blk,virtio_net
MICROCODE=no
END
# The archive again, the same bytes from the same files: mktirfs keeps times and inode numbers of its temporary files.
cat >"$1/etc/tiny-initramfs/hooks.end/reproducible" <<'END'
(
    cd "$initramfs_dir"
    # Requests of 1 MiB in place of 128 KiB: the guest works less for each page.
    sed -i 's|^/xen-blkfront\.ko[^ ]*$|& max_indirect_segments=256|' modules
    find . -exec touch -h -d "@${SOURCE_DATE_EPOCH:-0}" {} +
    find . ! -name . -print0 | LC_ALL=C sort -z | cpio --null -o --quiet --reproducible -R 0:0 -H newc | gzip -n -9 >"$image_name"
)
END
