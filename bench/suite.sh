#!/bin/busybox sh
# Measures one row once: suite.sh ROW [ARGUMENT]. Runs inside the benchmark's root file system, the same on every system, and
# prints "ROW name value". A row that cannot be measured prints nothing.
export PATH=/bench:/usr/bin:/bin
b=/bin/busybox
row=$1
seconds=$(((${BENCH_BOX_MS:-1000} + 999) / 1000))

# openssl_rate ALGORITHM: MB/s on blocks of 16 KiB.
openssl_rate() {
    openssl speed -elapsed -mr -seconds "$seconds" -bytes 16384 -evp "$1" 2>/dev/null |
        $b awk -F: -v name="$row" '$1 == "+F" { print "ROW", name, $4 / 1e6 }'
}

case $row in
dhrystone | whetstone | monte_carlo) "$row" ;;
getppid | pipe | context_switch | fork_exit | fork_exec | page_fault | mmap_unmap | signal | tmpfs_files) kernel_ops "$row" ;;
mem_copy | mem_triad | chase_64m) memory "$row" ;;
openssl_sha256) openssl_rate sha256 ;;
openssl_aes256gcm) openssl_rate aes-256-gcm ;;
openssl_rsa2048)
    openssl speed -elapsed -mr -seconds "$seconds" rsa2048 2>/dev/null |
        $b awk -F: -v name="$row" '$1 == "+F2" { print "ROW", name, $4 }'
    ;;
gzip9)
    [ -f /tmp/words ] || words 8000000 >/tmp/words
    elapsed "$row" gzip -9 -c /tmp/words
    ;;
shell_loop) elapsed "$row" $b sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done' ;;
python_mix) elapsed "$row" python3.11 -I -S /bench/mix.py ;;
shell_500_forks) elapsed "$row" $b sh /bench/forks.sh ;;
compile_c) elapsed "$row" $b sh /bench/compile.sh ;;
dhrystone_2vcpu_ratio) dhrystone "$row" 2 over ;;
jobs) dhrystone jobs "$2" ;;
*) echo "WRONG no row is called $row" ;;
esac
