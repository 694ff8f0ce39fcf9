"""make gpu: what a machine with a CUDA GPU can say about this library, in one command and a fixed time.

__main__    the command: stages, time, exit status; imports neither torch nor vkernels
supervise   a stage as a process of its own, watched: a crash or a hang costs one case, not the run
worker      what runs in such a process and reports line by line
proof       every op against float64   cases     what is raced, and the targets
report      the JSON and the table     race      one case: correct first, then in turn
preferences which of our backends was the faster, for the dispatcher
"""
