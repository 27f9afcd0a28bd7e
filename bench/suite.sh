#!/bin/busybox sh
# Measures rows: suite.sh ROW... Runs inside the benchmark's root file system, the same on every system.
# Prints "ROW name value" a row; a row that cannot be measured prints nothing. The first and last lines carry this
# system's clock, so that the harness can compare it with its own.
export PATH=/bench:/usr/bin:/bin
b=/bin/busybox

clock() { $b awk '{ print $1 }' /proc/uptime; }

# openssl_rate NAME ALGORITHM: MB/s on blocks of 16 KiB.
openssl_rate() {
    openssl speed -elapsed -mr -seconds "$SECONDS_EACH" -bytes 16384 -evp "$2" 2>/dev/null |
        $b awk -F: -v name="$1" '$1 == "+F" { print "ROW", name, $4 / 1e6 }'
}

SECONDS_EACH=$(( (${BENCH_BOX_MS:-1000} + 999) / 1000 ))
echo "CLOCK begin $(clock)"
for row; do
    case $row in
    dhrystone | whetstone | monte_carlo) "$row" ;;
    getppid | pipe | context_switch | fork_exit | fork_exec | page_fault | mmap_unmap | signal | tmpfs_files)
        kernel_ops "$row"
        ;;
    mem_copy | mem_triad | chase_64m) memory "$row" ;;
    openssl_sha256) openssl_rate "$row" sha256 ;;
    openssl_aes256gcm) openssl_rate "$row" aes-256-gcm ;;
    openssl_rsa2048)
        openssl speed -elapsed -mr -seconds "$SECONDS_EACH" rsa2048 2>/dev/null |
            $b awk -F: -v name="$row" '$1 == "+F2" { print "ROW", name, $4 }'
        ;;
    gzip9)
        words 20000000 >/tmp/words
        elapsed "$row" gzip -9 -c /tmp/words
        $b rm -f /tmp/words
        ;;
    shell_loop) elapsed "$row" $b sh -c 'i=0; while [ $i -lt 1000000 ]; do i=$((i + 1)); done' ;;
    python_mix) elapsed "$row" python3.11 -I -S /bench/mix.py ;;
    *) echo "WRONG no row is called $row" ;;
    esac
done
echo "CLOCK end $(clock)"
