"""Data sets made ready: archives unpacked, shards written, what is there checked."""
