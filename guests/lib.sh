# shellcheck shell=sh
# Shared by the scripts of this directory: messages, installing packages on this machine, and a private view of the
# Debian archive. Sourced, never run.
#
# Guests are made from Debian 12 whatever this machine runs, and nothing of the machine's own apt configuration is
# changed: lists, cache and sources of the private view live under target/guests/apt.

HOSPES_ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
GUESTS=${HOSPES_GUESTS:-$HOSPES_ROOT/target/guests}
SUITE=bookworm

say() { printf '%s\n' "guests: $*" >&2; }
die() { printf '%s\n' "guests: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# as_root COMMAND...: run it as root, directly or by sudo; fails where neither is possible.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    elif have sudo && [ -t 0 ]; then
        sudo "$@"
    else
        return 1
    fi
}

installed() { dpkg-query -W -f '${Status}\n' "$1" 2>/dev/null | grep -q '^install ok installed$'; }

# install_packages PACKAGE...: install those that are missing.
install_packages() {
    missing=
    for package; do
        installed "$package" || missing="$missing $package"
    done
    # shellcheck disable=SC2086
    [ -z "$missing" ] || install_newest $missing
}

# install_newest PACKAGE...: install or upgrade them, with a fresh list if the machine has none.
install_newest() {
    have apt-get || die "these packages are needed and this machine has no apt-get: $*. Install their equivalents."
    say "installing: $*"
    mkdir -p "$GUESTS"
    log=$GUESTS/install.log
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >"$log" 2>&1; then
        # No lists yet, or lists older than the mirror: refresh once, then it has to work. Where one source is dead, others may do.
        say "refreshing the package lists"
        as_root apt-get update >>"$log" 2>&1 || :
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$log" 2>&1 || {
            tail -n 5 "$log" >&2
            die "these packages could not be installed (see $log): $*. Install them as root and try again."
        }
    fi
}

# host_uri LABEL SUFFIX DEFAULT: the mirror that this machine uses for the archive that calls itself LABEL, if its address ends
# in SUFFIX; where apt has no lists yet, an address at debian.org in its sources. Other vendors' addresses may end so, too.
host_uri() {
    # shellcheck disable=SC2016
    uri=$({
        apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' "Label: $1"
        cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list |
            grep -v '^#' | grep -oE 'https?://[^/[:space:]]+\.debian\.org/[^[:space:]]*'
    } 2>/dev/null | sed 's|/*$||' | grep -E "^https?://.*/$2\$" | head -n 1)
    printf '%s\n' "${uri:-$3}"
}

# private_apt: make the private view if it is missing or older than a day.
private_apt() {
    apt_dir=$GUESTS/apt
    APT_CONF=$apt_dir/apt.conf
    stamp=$apt_dir/updated
    if [ -f "$stamp" ] && [ -z "$(find "$stamp" -mmin +1440)" ]; then
        return 0
    fi
    have apt-get || die "apt-get is needed to fetch Debian packages and is not on this machine: use a Debian host or put the images into $GUESTS."
    mkdir -p "$apt_dir/lists/partial" "$apt_dir/cache/archives/partial" "$apt_dir/sources.d"
    : >"$apt_dir/status"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -f "$keyring" ] || install_packages debian-archive-keyring
    main=$(host_uri Debian debian http://deb.debian.org/debian)
    security=$(host_uri Debian-Security debian-security http://deb.debian.org/debian-security)
    cat >"$apt_dir/sources.list" <<END
deb [signed-by=$keyring] $main $SUITE main
deb [signed-by=$keyring] $main $SUITE-updates main
deb [signed-by=$keyring] $main $SUITE-backports main
deb [signed-by=$keyring] $security $SUITE-security main
END
    cat >"$APT_CONF" <<END
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear Acquire::IndexTargets::deb::DEP-11;
Dir::State "$apt_dir";
Dir::State::lists "$apt_dir/lists";
Dir::State::status "$apt_dir/status";
Dir::Cache "$apt_dir/cache";
Dir::Etc::sourcelist "$apt_dir/sources.list";
Dir::Etc::sourceparts "$apt_dir/sources.d";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "";
Acquire::Languages "none";
END
    say "fetching the package lists of Debian 12"
    apt-get -c "$APT_CONF" -qq update >"$apt_dir/update.log" 2>&1 || {
        if ls "$apt_dir"/lists/*_Packages* >/dev/null 2>&1; then
            say "the package lists could not be refreshed (see $apt_dir/update.log): going on with the old ones"
            return 0
        fi
        cat "$apt_dir/update.log" >&2
        die "the package lists of $main could not be fetched: check the network and the proxy."
    }
    touch "$stamp"
}

# newest_version PACKAGE SUITE_PATTERN: the newest version of a package in the suites that match, empty if none.
newest_version() {
    apt-cache -c "$APT_CONF" madison "$1" |
        awk -F'|' -v suite="$2" '$3 ~ suite && $3 ~ /Packages/ { gsub(/ /, "", $2); print $2 }' |
        while read -r version; do
            if [ -z "${best:-}" ] || dpkg --compare-versions "$version" gt "$best"; then best=$version; fi
            printf '%s\n' "$best"
        done | tail -n 1
}

# unpack_package PACKAGE VERSION: download and unpack it once; prints the directory.
unpack_package() {
    tree=$GUESTS/packages/$1_$(printf '%s' "$2" | tr ':' '_')
    if [ ! -f "$tree/.complete" ]; then
        say "downloading $1 $2"
        rm -rf "$tree"
        mkdir -p "$tree"
        (cd "$tree" && apt-get -c "$APT_CONF" -qq download "$1=$2" >&2) ||
            die "package $1 $2 could not be downloaded: remove $GUESTS/apt and try again."
        dpkg -x "$tree"/*.deb "$tree" || die "package $1 $2 could not be unpacked: remove $tree and try again."
        rm -f "$tree"/*.deb
        touch "$tree/.complete"
    fi
    printf '%s\n' "$tree"
}

# replace_link TARGET NAME: point a symbolic link somewhere else in one step.
replace_link() { ln -sfn "$1" "$2.new" && mv -fT "$2.new" "$2"; }
