#!/bin/sh
# First process of the busybox guest. `hospes.do=` on the kernel command line says what to do:
#   shell      an interactive shell on the console (also when nothing is said)
#   visit      print what this machine looks like from inside, compute something, power off
#   poweroff, reboot, halt, panic    print the mark, then end in this way
#   dmesg      print the kernel's log with its levels between two marks, then power off
#   records    check the files of an earlier run on each disk, then write files until the power is cut
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
earlier=0:0
for word in $(cat /proc/cmdline); do
    case $word in
    hospes.do=*) do=${word#hospes.do=} ;;
    hospes.earlier=*) earlier=${word#hospes.earlier=} ;;
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

# What the file number $2 of run $1 contains.
record() {
    yes "run $1 file $2" | head -c $(($2 % 17 * 3000 + 1))
}

# records DISK RUN:COUNT: each run has a directory of its own. That of RUN stays until a run after it is known to be there, so it
# does not matter whether anybody sees what this one prints.
records() {
    while [ ! -b "/dev/$1" ]; do sleep 0.1; done
    mkdir -p "/mnt/$1" && cd "/mnt/$1" || finish
    mount -t ext4 -o discard "/dev/$1" . && cd "/mnt/$1" || { echo "records: $1: the file system does not mount"; finish; }
    run=${2%:*}
    number=0
    while [ $number -lt "${2#*:}" ]; do
        number=$((number + 1))
        record "$run" $number | cmp -s - "$run/$number" || echo "records: $1: file $number of run $run is not what was synced"
    done
    echo "records: $1: $number checked"
    for old in [0-9]*; do
        [ "$old" = "$run" ] || rm -rf "$old"
    done
    run=$((run + 1))
    mkdir $run
    number=0
    while [ $number -lt 600 ]; do
        number=$((number + 1))
        record $run $number | dd of=$run/$number bs=16k conv=fsync 2>/dev/null && echo "records: $1: synced $number"
        # What is rewritten in place has no journal to fall back on.
        dd if=/dev/zero of=place bs=4k seek=$((number % 64)) count=4 conv=notrunc 2>/dev/null
        [ $((number % 40)) = 0 ] && rm -f place
    done
}

case $do in
records)
    # hospes.earlier=RUN:COUNT,RUN:COUNT...: for each disk, how many files of which run were synced before the power was cut.
    letter=a
    for one in $(echo "$earlier" | tr , ' '); do
        records xvd$letter "$one" &
        letter=$(echo $letter | tr a-y b-z)
    done
    wait
    finish
    ;;
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
