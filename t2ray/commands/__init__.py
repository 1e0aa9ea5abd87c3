"""What each command of `t2ray` does; `t2ray.cli` imports the module that a command needs, and no other."""
