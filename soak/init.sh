#!/bin/busybox sh
# shellcheck shell=dash
# First process of the soak guest: `soak.seconds=n` on the kernel command line says for how long, `soak.skip=a,b`
# which tasks not. Prints the rounds'
# results, meanwhile a time stamp every second, at the end the kernel's log, then powers off.
export PATH=/usr/bin:/bin
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t tmpfs tmpfs /tmp
$b mkdir -p /dev/shm && $b mount -t tmpfs tmpfs /dev/shm
$b ip link set lo up
$b dmesg -n 1
seconds=60
for word in $($b cat /proc/cmdline); do
    case $word in
    soak.seconds=*) seconds=${word#soak.seconds=} ;;
    soak.skip=*) export SOAK_SKIP="${word#soak.skip=}" ;;
    esac
done

uptime_s() { $b cut -d. -f1 /proc/uptime; }

end=$(($(uptime_s) + seconds))
stress=$((seconds / 20))
[ "$stress" -ge 2 ] || stress=2
[ "$stress" -le 60 ] || stress=60
echo "HOSPES-BEGIN soak"
/soak/clock &
clock=$!
round=0
while [ "$(uptime_s)" -lt "$end" ] || [ "$round" = 0 ]; do
    round=$((round + 1))
    echo "ROUND $round"
    /soak/tasks.sh
    /soak/tasks.sh stress "$stress"
done
kill "$clock"
wait "$clock" 2>/dev/null
echo "HOSPES-BEGIN dmesg"
$b dmesg -r
echo "HOSPES-END dmesg"
echo "HOSPES-END soak"
$b poweroff -f
