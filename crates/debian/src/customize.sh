#!/bin/sh
# mmdebstrap's customize hook: turns the installed packages into a guest, then the tree into a file system.
# $1 is the new root. The environment says what is wanted: HOSTNAME_OF_GUEST, AUTOLOGIN (yes or no), SSH_KEYS (text),
# PASSWORD, RUN (the text of a program to run in the root, or nothing), FS_UUID, FS_BYTES, SOURCE_DATE_EPOCH.
# SCRATCH is where temporary files may lie on this machine.
# IMAGE, KERNEL, INITRD are written: open descriptors under /proc/self/fd, because the hook may run as a user that cannot
# reach the directory they are in.
set -eu
root=$1
step() { printf 'STEP %s\n' "$*" >&2; }

step "setting up the guest"
# Files that the bootstrap took over from this machine, with this machine's modes.
rm -f "$root/etc/hostname" "$root/etc/hosts" "$root/etc/resolv.conf"
printf '%s\n' "$HOSTNAME_OF_GUEST" >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost ip6-localhost ip6-loopback\n' "$HOSTNAME_OF_GUEST" >"$root/etc/hosts"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$FS_UUID" >"$root/etc/fstab"

cat >"$root/etc/systemd/network/80-dhcp.network" <<'END'
[Match]
Name=en* eth*

[Network]
DHCP=yes
IPv6AcceptRA=yes

[DHCPv4]
UseDomains=yes
END
chroot "$root" systemctl --quiet enable systemd-networkd.service
# A guest without a network reaches its login all the same.
chroot "$root" systemctl --quiet disable systemd-networkd-wait-online.service 2>/dev/null || true

if [ -e "$root/lib/systemd/system/systemd-resolved.service" ]; then
    ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
else
    # Without resolved, which needs D-Bus, the name servers of the lease go where the C library looks.
    ln -sf ../run/resolv.conf "$root/etc/resolv.conf"
    cat >"$root/etc/systemd/system/resolv-conf.path" <<'END'
[Unit]
Description=Watch for Name Servers

[Path]
PathChanged=/run/systemd/netif/state

[Install]
WantedBy=multi-user.target
END
    cat >"$root/etc/systemd/system/resolv-conf.service" <<'END'
[Unit]
Description=Write the Name Servers of the Network

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/resolv-conf
END
    cat >"$root/usr/local/sbin/resolv-conf" <<'END'
#!/bin/sh
# Writes resolv.conf from what systemd-networkd has learned.
set -eu
new=/run/resolv.conf.new
while IFS='=' read -r key values; do
    case $key in
    DNS) for server in $values; do echo "nameserver $server"; done ;;
    DOMAINS) [ -z "$values" ] || echo "search $values" ;;
    esac
done </run/systemd/netif/state >"$new"
mv "$new" /run/resolv.conf
END
    chmod 755 "$root/usr/local/sbin/resolv-conf"
    chroot "$root" systemctl --quiet enable resolv-conf.path
fi

# The host orders what goes to the disks of a virtual machine. A scheduler in the guest hands each request to another thread, which costs more than
# it can win.
install -d "$root/etc/udev/rules.d"
cat >"$root/etc/udev/rules.d/60-virtual-disks.rules" <<'END'
ACTION=="add|change", SUBSYSTEM=="block", ENV{DEVTYPE}=="disk", KERNEL=="xvd*|vd*", ATTR{queue/scheduler}="none"
END

# What a small guest on a virtual disk does not need at every boot: updates behind its user's back, a console that is not
# there, mounts for debugging, drivers that are loaded when they are used.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer man-db.timer getty@tty1.service systemd-pstore.service; do
    chroot "$root" systemctl --quiet disable "$unit" 2>/dev/null || true
done
chroot "$root" systemctl --quiet mask sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount modprobe@configfs.service modprobe@fuse.service modprobe@drm.service \
    modprobe@dm_mod.service modprobe@loop.service

if [ "$AUTOLOGIN" = yes ]; then
    install -d "$root/etc/systemd/system/serial-getty@.service.d"
    cat >"$root/etc/systemd/system/serial-getty@.service.d/autologin.conf" <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 - $TERM
END
fi
[ -z "$PASSWORD" ] || printf 'root:%s\n' "$PASSWORD" | chroot "$root" chpasswd

if [ -n "$SSH_KEYS" ]; then
    install -d -m 700 "$root/root/.ssh"
    printf '%s\n' "$SSH_KEYS" >"$root/root/.ssh/authorized_keys"
    chmod 600 "$root/root/.ssh/authorized_keys"
fi
if [ -e "$root/etc/ssh/sshd_config" ]; then
    # Each guest makes host keys of its own, at its first start.
    rm -f "$root"/etc/ssh/ssh_host_*
    install -d "$root/etc/systemd/system/ssh.service.d"
    cat >"$root/etc/systemd/system/ssh.service.d/host-keys.conf" <<'END'
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
END
fi

if [ -d "$root/etc/cloud/cloud.cfg.d" ]; then
    # Its own default is a locale that is not made here, and that fails at each boot; user-data may name one.
    echo 'locale: C.UTF-8' >"$root/etc/cloud/cloud.cfg.d/90_locale.cfg"
fi

if [ -n "$RUN" ]; then
    step "running your program in it"
    printf '%s' "$RUN" >"$root/tmp/hospes-run"
    chmod 755 "$root/tmp/hospes-run"
    chroot "$root" /tmp/hospes-run >&2
fi

step "copying kernel and initial root file system"
newest() { find "$root/boot" -name "$1" | sort -V | tail -n 1; }
kernel=$(newest 'vmlinuz-*')
initrd=$(newest 'initrd.img-*')
if [ -z "$kernel" ] || [ -z "$initrd" ]; then
    echo "the new root has no kernel with an initial root file system in /boot" >&2
    exit 1
fi
cat "$kernel" >"$KERNEL"
cat "$initrd" >"$INITRD"

# mmdebstrap's own apt configuration lies in the root until it is done. Without it mmdebstrap's apt-get would work on this
# machine's package lists, and mmdebstrap ends with an error where it cannot remove it: it is set aside, and comes back.
aside=$(mktemp -d -p "$SCRATCH")
own=$(mktemp -d -p "$SCRATCH")
find "$root/etc/apt/apt.conf.d" -name '??mmdebstrap' -exec mv -t "$own" {} +
find "$root/tmp" -mindepth 1 -maxdepth 1 -name 'mmdebstrap.*' -exec mv -t "$aside" {} +

# What differs from one run to the next, and what each guest has to find out for itself.
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/apt "$root"/tmp/* "$root"/var/tmp/* \
    "$root"/var/cache/ldconfig/aux-cache "$root"/var/lib/systemd/random-seed "$root"/var/lib/dbus/machine-id
find "$root/var/log" -type f -delete
find "$root/var/lib/dpkg" "$root/var/cache/debconf" "$root/etc" -xdev -name '*-old' -delete
find "$root/etc" -xdev \( -name 'passwd-' -o -name 'group-' -o -name 'shadow-' -o -name 'gshadow-' -o -name 'subuid-' -o -name 'subgid-' \) -delete
: >"$root/etc/machine-id"

step "writing the file system"
# The tree alone: what is mounted in it now (/proc, /sys, devices) does not follow a bind mount.
tree=$(mktemp -d -p "$SCRATCH")
# The variables of the inner script are its own.
# shellcheck disable=SC2016
unshare --mount --propagation private sh -euc '
    mount --bind "$1" "$2"
    find "$2" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mke2fs -q -F -t ext4 -U "$FS_UUID" -L root -d "$2" \
        -E "hash_seed=$FS_UUID,root_owner=0:0" "$IMAGE" "$((FS_BYTES / 1024))k"
' sh "$root" "$tree" >&2
rmdir "$tree"
find "$aside" -mindepth 1 -exec mv -t "$root/tmp" {} +
find "$own" -mindepth 1 -exec mv -t "$root/etc/apt/apt.conf.d" {} +
rmdir "$aside" "$own"

# mke2fs takes the times of last access and of last change from this machine. Its inodes are numbered without a gap from the
# first that is not reserved.
field() { dumpe2fs -h "$IMAGE" 2>/dev/null | sed -n "s/^$1: *//p"; }
inode=$(field 'First inode')
last=$(($(field 'Inode count') - $(field 'Free inodes')))
while [ "$inode" -le "$last" ]; do
    printf 'set_inode_field <%d> ctime @%d\nset_inode_field <%d> atime @%d\n' \
        "$inode" "$SOURCE_DATE_EPOCH" "$inode" "$SOURCE_DATE_EPOCH"
    inode=$((inode + 1))
done | E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH debugfs -w -f - "$IMAGE" >/dev/null
