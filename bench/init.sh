#!/bin/busybox sh
# First process of the benchmark's guests: shows the mitigations, then does what the harness writes to the console.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
$b mount -t tmpfs tmpfs /tmp
echo 1 >/proc/sys/kernel/printk
$b stty -echo
echo "HOSPES-BEGIN mitigations"
$b grep . /sys/devices/system/cpu/vulnerabilities/* 2>/dev/null | $b sed 's,^.*vulnerabilities/,,'
echo "HOSPES-END mitigations"
/bench/worker.sh
$b poweroff -f
