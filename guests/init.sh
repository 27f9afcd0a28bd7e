#!/bin/sh
# First process of the busybox guest. `hospes.do=` on the kernel command line says what to do:
#   shell      an interactive shell on the console (also when nothing is said)
#   visit      print what this machine looks like from inside, compute something, power off
#   poweroff, reboot, halt, panic    print the mark, then end in this way
#   dmesg      print the kernel's log with its levels between two marks, then power off
#   idle       print the mark, then sleep until told otherwise
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /tmp /run
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
# What the kernel runs when it is asked from outside; this script is no init that busybox' own commands could ask.
for way in poweroff reboot halt; do
    printf '#!/bin/sh\nsync\nexec /bin/%s -f\n' $way >/sbin/$way
    chmod 755 /sbin/$way
done
export PATH=/sbin:/bin HOME=/root TERM="${TERM:-linux}" PS1='guest# '
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
read -r up _ </proc/uptime

# Drivers that the initial root file system came with.
for module in /lib/modules/*.ko; do
    [ -f "$module" ] && insmod "$module"
done

do=shell
for word in $(cat /proc/cmdline); do
    case $word in
    hospes.do=*) do=${word#hospes.do=} ;;
    esac
done

# Kernel messages stay in dmesg: the console is for what is asked for.
dmesg -n 1
echo "HOSPES-GUEST ready after $up s of uptime"

finish() {
    sync
    poweroff -f
    sleep 60
}

case $do in
visit)
    echo "HOSPES-BEGIN visit"
    echo "== kernel"
    cat /proc/version
    dmesg | grep -E 'Hypervisor detected|Booting kernel on'
    echo "== processor"
    grep -m 4 -E '^(vendor_id|model name|cpu MHz|flags)' /proc/cpuinfo
    echo "processors: $(grep -c '^processor' /proc/cpuinfo)"
    echo "== mitigations"
    (cd /sys/devices/system/cpu/vulnerabilities && grep . ./*)
    echo "== memory"
    grep -E '^(MemTotal|MemFree)' /proc/meminfo
    echo "== computation"
    echo "sha256 $(yes hospes | head -c 8000000 | sha256sum)"
    echo "== time"
    date -u
    echo "boot to first process: $up s"
    echo "HOSPES-END visit"
    finish
    ;;
dmesg)
    echo "HOSPES-BEGIN dmesg"
    dmesg -r
    echo "HOSPES-END dmesg"
    finish
    ;;
poweroff) finish ;;
reboot) reboot -f ;;
halt) halt -f ;;
panic)
    echo 1 >/proc/sys/kernel/sysrq
    echo c >/proc/sysrq-trigger
    ;;
idle)
    while :; do sleep 3600; done
    ;;
shell)
    cat <<BANNER

This is a shell inside the guest: $(uname -sr).
  poweroff -f   powers the guest off
  Ctrl-]        leaves the console

BANNER
    cd /root || cd /
    setsid cttyhack sh
    echo "The shell has ended: powering off."
    finish
    ;;
*)
    echo "hospes.do=$do is not known to this guest: use shell, visit, dmesg, idle, poweroff, reboot, halt or panic."
    finish
    ;;
esac
sleep 60
