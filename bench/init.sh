#!/bin/busybox sh
# First process of the benchmark guest: `bench.rows=a,b` and `bench.box_ms=n` on the kernel command line.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t tmpfs tmpfs /tmp
echo 1 >/proc/sys/kernel/printk
rows=
for word in $($b cat /proc/cmdline); do
    case $word in
    bench.rows=*) rows=$(echo "${word#bench.rows=}" | $b tr , ' ') ;;
    bench.box_ms=*) export BENCH_BOX_MS="${word#bench.box_ms=}" ;;
    esac
done
echo "HOSPES-BEGIN mitigations"
$b grep . /sys/devices/system/cpu/vulnerabilities/* 2>/dev/null | $b sed 's,^.*vulnerabilities/,,'
echo "HOSPES-END mitigations"
# shellcheck disable=SC2086
/bench/suite.sh $rows
echo "HOSPES-END suite"
$b poweroff -f
