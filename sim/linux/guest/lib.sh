# What every job uses. Lines "RINGWALL key value" on the console are what the host reads.

# busybox takes its own mke2fs before the real one, whatever PATH says.
mke2fs() {
  /usr/sbin/mke2fs "$@"
}

say() {
  echo "RINGWALL $*"
}

fail() {
  say failed "$*"
  exit 1
}

uptime_s() {
  read -r up idle < /proc/uptime
  echo "$up"
}

# Waits up to $1 seconds until the command behind it succeeds.
wait_for() {
  left=$(($1 * 20))
  shift
  until "$@" 2> /dev/null; do
    left=$((left - 1))
    [ $left -gt 0 ] || return 1
    usleep 50000
  done
}

# Addresses of the virtio disks on the PCI bus, bound or not: vendor 1af4, device 1001 (transitional) or 1042.
disks() {
  for path in /sys/bus/pci/devices/*; do
    [ -e "$path/vendor" ] || continue
    [ "$(cat "$path/vendor")" = 0x1af4 ] || continue
    case $(cat "$path/device") in
      0x1001 | 0x1042) echo "${path##*/}" ;;
    esac
  done
}

# The block device of the PCI function $1, empty while it has none.
block_of() {
  for path in /sys/bus/pci/devices/"$1"/virtio*/block/*; do
    [ -b "/dev/${path##*/}" ] && echo "${path##*/}"
  done
}

has_block() {
  [ -n "$(block_of "$1")" ]
}

has_no_block() {
  ! has_block "$1"
}

# Every disk by its PCI address has its block device, or the job ends; prints the number of disks.
all_disks() {
  [ -n "$(disks)" ] || fail "no virtio disk on the PCI bus"
  for disk in $(disks); do
    wait_for 20 has_block "$disk" || fail "$disk has no block device"
  done
}

# sha256 of what the first $2 KiB of /dev/$1 hold, read from the device and not from memory.
digest_of() {
  found=$(dd if=/dev/"$1" bs=16k count=$(($2 / 16)) iflag=direct 2> /dev/null | sha256sum)
  echo "${found%% *}"
}

# Makes a file $1 of $2 KiB whose text depends on $3 and on nothing else.
make_seed() {
  awk -v lines=$(($2 * 16)) -v key="$3" 'BEGIN {
    x = key % 65521 + 1
    for (i = 0; i < lines; i++) {
      line = ""
      while (length(line) < 63) { x = (x * 17364 + 11) % 65521; line = line sprintf("%x", x) }
      print substr(line, 1, 63)
    }
  }' > "$1"
}

# Requests and sectors of /dev/$1 since it appeared.
say_stat() {
  read -r reads a read_sectors b writes c write_sectors rest < /sys/block/"$1"/stat
  say stat "$1" reads="$reads" read_sectors="$read_sectors" writes="$writes" write_sectors="$write_sectors"
}
