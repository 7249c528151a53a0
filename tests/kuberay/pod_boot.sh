#!/bin/bash
# First process of a pod (tests/kuberay/pods.py): makes its network and its root, then becomes the container.
# From the environment: ROOT ADDRESS GATEWAY READ_ONLY HOSTS BINDS MOUNTS SCRIPTS; arguments: what to run inside.
set -eu
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY" # nothing answers there: it only tells programs which address is theirs

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$ROOT"
cd "$ROOT"
bind() { # SOURCE TARGET [ro]
  mkdir -p ".$2"
  mount --bind "$1" ".$2"
  [ "${3:-}" != ro ] || mount -o remount,bind,ro ".$2"
}
for link in /bin /sbin /lib /lib64; do [ ! -L "$link" ] || cp -d "$link" .; done
bind /usr /usr ro
cp -a /etc etc
printf 'nameserver 127.0.0.1\n' >etc/resolv.conf # nobody listens: what is not in the hosts file is not found at once
rm -f etc/hosts && touch etc/hosts
mount --bind "$HOSTS" etc/hosts
mkdir -p proc sys dev srv/shoal/bin var/tmp
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom; do touch "dev/$device" && mount --bind "/dev/$device" "dev/$device"; done
ln -s /proc/self/fd dev/fd && ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout && ln -s /proc/self/fd/2 dev/stderr
mkdir dev/shm && mount -t tmpfs -o mode=1777 tmpfs dev/shm
cp -a "$SCRIPTS/." srv/shoal/bin
while read -r kind source target; do
  case $kind in
  memory) mkdir -p ".$target" && mount -t tmpfs -o "mode=1777${source:+,size=${source%i}}" tmpfs ".$target" ;;
  read) bind "$source" "$target" ro ;;
  write) bind "$source" "$target" && chmod 1777 ".$target" ;;
  esac
done <<<"$MOUNTS"
# Where the code is on this machine; an image has it in a place of its own.
while read -r path; do bind "$path" "$path" ro; done <<<"$BINDS"
[ -z "$READ_ONLY" ] || mount -o remount,ro "$ROOT"
hostname "${ADDRESS//./-}"
exec chroot "$ROOT" "$@"
