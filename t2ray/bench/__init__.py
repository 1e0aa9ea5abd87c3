"""The core's speed as ratios: `t2ray bench` runs it; the peers it is held against run beside it on the same weights."""
