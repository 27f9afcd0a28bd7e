#!/bin/sh
# Fetches Debian's kernels: target/guests/vmlinuz-{cloud,amd64,bpo}, links to what the archive has today.
#
#   guests/kernels.sh [cloud] [amd64] [bpo]      default: all three
#
# They differ in what matters to a kernel loader: cloud is compressed by lz4, amd64 by xz, the backport by zstd.
set -eu
. "$(dirname -- "$0")/lib.sh"

# real_package META VERSION: the image package that a metapackage depends on.
real_package() {
    apt-cache -c "$APT_CONF" show "$1=$2" | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p' | head -n 1
}

# kernel META SUITES LINK
kernel() {
    version=$(newest_version "$1" "$2")
    [ -n "$version" ] || die "the archive has no $1 in $2: remove $GUESTS/apt and try again."
    package=$(real_package "$1" "$version")
    [ -n "$package" ] || die "$1 $version names no kernel image package: the archive has changed its layout."
    image_version=$(apt-cache -c "$APT_CONF" show "$1=$version" |
        sed -n 's/^Depends: linux-image-[^ ,]* (= \([^)]*\)).*/\1/p' | head -n 1)
    tree=$(unpack_package "$package" "${image_version:-$version}")
    image=$(ls "$tree"/boot/vmlinuz-* | head -n 1)
    replace_link "$image" "$GUESTS/$3"
    say "$3 is $package ${image_version:-$version}"
}

mkdir -p "$GUESTS"
[ $# -gt 0 ] || set -- cloud amd64 bpo
private_apt
for name; do
    case $name in
    cloud) kernel linux-image-cloud-amd64 "$SUITE(-updates|-security)?/" vmlinuz-cloud ;;
    amd64) kernel linux-image-amd64 "$SUITE(-updates|-security)?/" vmlinuz-amd64 ;;
    bpo) kernel linux-image-amd64 "$SUITE-backports/" vmlinuz-bpo ;;
    *) die "unknown kernel '$name': say cloud, amd64 or bpo." ;;
    esac
done
