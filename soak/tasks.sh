#!/bin/busybox sh
# shellcheck shell=dash
# One round of the soak: prints "RESULT name value" a task, the value being a digest of everything it printed and its exit
# status. Natively the same script gives the expected values. `tasks.sh stress SECONDS` runs the stressors, which check
# themselves: their value is "ok", or the first complaint. SOAK_SKIP=a,b leaves tasks out.
export PATH=/soak:/usr/bin:/bin HOME=/tmp LC_ALL=C
b=/bin/busybox

# task NAME COMMAND...; the status of one that is a function here says whether all of it worked
task() {
    name=$1
    shift
    case ",${SOAK_SKIP:-}," in
    *",$name,"*) return ;;
    esac
    echo "START $name"
    "$@" >/tmp/task.out 2>&1
    status=$?
    # What a program prints is the same everywhere except for process ids and addresses, which the tasks avoid.
    echo "RESULT $name $($b sha256sum </tmp/task.out | $b cut -c1-24)-$status"
    if [ -n "${SOAK_SHOW:-}" ]; then $b sed "s/^/OUTPUT $name /" /tmp/task.out; fi
}

ciphers() {
    words=/soak/check64-O3
    for digest in sha1 sha256 sha512 sha3-256 blake2b512 md5; do openssl dgst -"$digest" "$words" || return; done
    for cipher in aes-128-cbc aes-256-ctr chacha20 camellia-128-cbc; do
        openssl enc -"$cipher" -pbkdf2 -S 0011223344556677 -k soak -in "$words" -out /tmp/encrypted &&
            openssl dgst -sha256 /tmp/encrypted &&
            openssl enc -d -"$cipher" -pbkdf2 -S 0011223344556677 -k soak -in /tmp/encrypted | $b cmp - "$words" || return
    done
}

signatures() {
    for kind in rsa ed25519 ec; do
        case $kind in
        rsa) openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out /tmp/key 2>/dev/null ;;
        ed25519) openssl genpkey -algorithm ED25519 -out /tmp/key ;;
        ec) openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out /tmp/key ;;
        esac
        openssl pkey -in /tmp/key -pubout -out /tmp/public &&
            openssl pkeyutl -sign -inkey /tmp/key -rawin -in /soak/jit.lua -out /tmp/signature &&
            openssl pkeyutl -verify -pubin -inkey /tmp/public -rawin -in /soak/jit.lua -sigfile /tmp/signature || return
    done
}

files() {
    $b rm -rf /tmp/files
    $b mkdir /tmp/files
    $b cp /soak/* /tmp/files/
    (cd /tmp/files && $b tar -cf - . | $b gzip -9 | $b gunzip | $b tar -tf - | $b sort)
    (cd /tmp/files && $b sha256sum ./* | $b sort -k2)
    $b bzip2 -k /tmp/files/parallel && $b bunzip2 -c /tmp/files/parallel.bz2 | $b sha256sum || return
    $b rm -rf /tmp/files
}

debugger() {
    gdb -batch -nx -x /soak/debug.gdb /soak/debuggee 2>&1 | $b sed 's/process [0-9]*/process/'
}

shell_loop() {
    i=0 sum=0
    while [ "$i" -lt 100000 ]; do
        i=$((i + 1))
        sum=$(((sum * 31 + i) % 1000003))
    done
    echo "$sum"
    for word in $($b seq 1 200); do echo "$word" | $b tr 0-9 a-j; done | $b sort -r | $b md5sum
}

# Objects made by two compilers at a time.
objects() {
    $b rm -rf /tmp/objects
    $b mkdir /tmp/objects
    make -j2 -f /soak/objects.mk -C /soak OUT=/tmp/objects && (cd /tmp/objects && $b sha256sum ./*.o) || return
    $b rm -rf /tmp/objects
}

# More busy processes than the kernel keeps address spaces apart in the processor for.
many() {
    for n in 1 2 3 4 5 6 7 8; do check64-O2 >/tmp/many.$n & done
    wait
    $b sha256sum /tmp/many.*
    $b rm -f /tmp/many.*
}

# The first complaint of stress-ng, or ok.
stress() {
    stress_name=$1
    shift
    case ",${SOAK_SKIP:-}," in
    *",stress_$stress_name,"*) return ;;
    esac
    echo "START stress_$stress_name"
    if stress-ng --quiet --verify --metrics-brief --temp-path /tmp -t "$seconds" "$@" >/tmp/stress.out 2>&1; then
        complaint=$($b grep -iE 'fail|mismatch|error' /tmp/stress.out | $b head -n 1)
        echo "RESULT stress_$stress_name ${complaint:-ok}"
    else
        echo "RESULT stress_$stress_name status-$?: $($b head -n 1 /tmp/stress.out)"
    fi
}

if [ "${1:-}" = stress ]; then
    seconds=$2
    stress cpu --cpu 1 --cpu-method all
    stress vm --vm 1 --vm-bytes 64M --vm-method all
    stress memory --memcpy 1 --stream 1 --matrix 1 --qsort 1 --bsearch 1
    stress scheduler --yield 2 --nice 1 --context 1 --sem 2 --affinity 1
    stress kernel --fork 1 --pipe 1 --switch 1 --timer 1 --sigq 1 --futex 1 --mmap 1 --mmap-bytes 16M
    exit 0
fi

for program in check64-O0 check64-O2 check64-O3 check32-O0 check32-x87 check32-sse threads64 threads32 parallel; do
    task "$program" "$program"
done
task luajit luajit /soak/jit.lua
task luajit_interpreter luajit -joff /soak/jit.lua
task python python3 -I -S /soak/check.py
task debugger debugger
task ciphers ciphers
task signatures signatures
task files files
task shell shell_loop
task spaces spaces
task forks forks
task large large 1200
task many many
task objects objects
