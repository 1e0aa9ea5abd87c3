"""`python -m benchmarks learn`: RL on z beside TRL's on LoRA, at equal rollouts.

Each side is a process with one thread (`ours`, `theirs`), which makes a step when it is told to (`turns`): the sides
take turns step by step, so that other load on the machine slows all of them. `theirs` runs in an environment of its
own, that of TRL, and so imports nothing of t2ray but `t2ray.tasks.brief`.
"""
