#!/usr/bin/env bash
# Downloads Tiny ImageNet (237 MB) and unpacks it beside this script: `bash tinyimagenet.sh [ARCHIVE]`.
# An interrupted download goes on where it stopped; what is there already is left alone. ARCHIVE is a copy of
# tiny-imagenet-200.zip on disk. A mirror, or a part of the set, has its address and checksum in
# TINY_IMAGENET_URL and TINY_IMAGENET_MD5.
set -euo pipefail

url=${TINY_IMAGENET_URL:-http://cs231n.stanford.edu/tiny-imagenet-200.zip}
md5=${TINY_IMAGENET_MD5:-90528d7ca1a48142e341f4ef8d21d0de}
name=tiny-imagenet-200
# Marks the folder as unpacked to the end.
complete=$name/.complete

fail() { echo "error: $*" >&2; exit 2; }

checksum() { if command -v md5sum >/dev/null; then md5sum <"$1" | cut -d ' ' -f 1; else md5 -q "$1"; fi; }

# The shell leaves the ~ of '~/x' and --flag=~/x alone.
expand_home() {
    local home=${1%%/*}
    if [[ $home =~ ^~[A-Za-z0-9._-]*$ ]]; then eval "home=$home"; fi
    echo "$home${1#"${1%%/*}"}"
}

download() {
    if command -v curl >/dev/null; then
        curl --fail --location --show-error --continue-at - --output "$1" "$url"
    elif command -v wget >/dev/null; then
        wget --continue --output-document "$1" "$url"
    else
        fail "neither curl nor wget is installed; fetch $url by hand and name the file: bash tinyimagenet.sh ARCHIVE"
    fi
}

unpack() {
    rm -rf "$name.tmp"
    mkdir "$name.tmp"
    if command -v unzip >/dev/null; then unzip -q "$1" -d "$name.tmp"; else python3 -m zipfile -e "$1" "$name.tmp"; fi
    [ -d "$name.tmp/$name" ] || fail "$1 holds no folder $name"
    touch "$name.tmp/$complete"
    mv "$name.tmp/$name" "$name"
    rm -r "$name.tmp"
}

[ $# -le 1 ] || fail "one argument at most: the archive"
archive=$(expand_home "${1:-}")
case $archive in '' | /*) ;; *) archive=$PWD/$archive ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -e "$complete" ]; then
    echo "$PWD/$name is there already"
    exit 0
fi
[ ! -e "$name" ] || fail "$PWD/$name is not from this script, or was not unpacked to the end; move it away, or use it as it is"
if [ -z "$archive" ]; then
    archive=$name.zip
    if [ ! -e "$archive" ] || [ "$(checksum "$archive")" != "$md5" ]; then
        download "$archive" || fail "cannot download $url; run this again to go on (if $PWD/$archive is damaged, delete it \
first), or without a network bring the file by other means and name it: bash tinyimagenet.sh ARCHIVE"
    fi
fi
[ -r "$archive" ] || fail "cannot read $archive"
if [ "$(checksum "$archive")" != "$md5" ]; then
    [ $# -eq 0 ] || fail "$archive is not $name.zip, or is damaged: its md5 is not $md5"
    fail "$PWD/$archive is damaged (wrong md5); delete it and run this again"
fi
unpack "$archive"
echo "unpacked to $PWD/$name"
