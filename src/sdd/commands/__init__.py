"""The commands of `sdd`, one file each."""
